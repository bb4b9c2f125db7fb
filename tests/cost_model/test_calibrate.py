"""Calibration writes a cluster file that can be read back; tables are whole."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opt.cost_model import calibrate, cluster, tables
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.step import predict


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUDGET", 0.001)
    monkeypatch.setattr(calibrate, "GEMM_SIZES", (32, 64))
    monkeypatch.setattr(calibrate, "SMALL_SIZES", (16, 32))
    monkeypatch.setattr(calibrate, "FACTOR_SIZES", (16, 32))
    monkeypatch.setattr(calibrate, "PASS_SIZES", (1 << 10, 1 << 14))
    monkeypatch.setattr(calibrate, "together", lambda ranks: (0.8, 3e10))
    monkeypatch.setattr(calibrate, "link", lambda ranks: (1e9, 1e-4, 3e-4, {"all_gather": 0.5}))
    monkeypatch.setattr(calibrate, "engine", lambda: (2e-4, 3e-5, 5e-5, 6e-4))
    monkeypatch.setattr(calibrate, "CACHE_BYTES", 1 << 16)


def test_measured_file_reads_back_and_predicts(quick: None, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "machine.yaml"
    file.write_text(calibrate.calibrate(2))
    assert torch.get_num_threads() == threads
    found = cluster.load(str(file))
    assert set(found.rates) == {*cluster.CLASSES, cluster.LAYER} and "calibrate" in found.sources[0]
    assert [rate > 0 for _, rate in found.passes] == [True, True] and set(found.overheads.by_optimizer) >= {
        "muon",
        "soap",
    }
    assert all(rate > 1e5 for by in found.rates.values() for curve in by.values() for _, rate in curve)
    assert found.ring(1e6, 2, kind="all_gather") == pytest.approx(2e6 / 1e9 + 1e-4)
    assert found.ring(1e6, 2, kind="all_reduce") == pytest.approx(1e6 / 1e9 + 1e-4)
    assert found.reduction(2) == pytest.approx(3e-4) and found.reduction(1) == 0
    assert all(rate > 0 for _, rate in found.reads) and found.read_seconds(1e6) > 0
    assert (found.overheads.step, found.overheads.layer) == (2e-4, 6e-4) and 0 <= found.overheads.fragment <= 3e-5
    step = predict(parse("--preset demo --optimizer soap".split())[0], found, 1)
    assert step.seconds > 0 and step.optimizer.host > 0


def test_timing_takes_the_median_of_several_calls() -> None:
    calls = []
    assert calibrate.timed(lambda: calls.append(sum(range(2000))), torch.device("cpu"), 0.0) > 0
    assert len(calls) == 4  # one to warm up, three that count


def test_ranks_beyond_the_cores_take_turns(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "pass_rates", lambda device: ({1 << 20: 4e10, 1 << 24: 6e10}, {1 << 20: 2e10}))
    file = tmp_path / "machine.yaml"
    file.write_text(calibrate.calibrate(2))
    found = cluster.load(str(file))
    assert found.shared_cores >= 1
    found = dataclasses.replace(found, shared_cores=2)  # the tests' machines may have one
    assert found.crowding(2) == pytest.approx(1 / 0.8) and found.crowding(8) == pytest.approx(4 / 0.8)
    assert found.crowding(2, memory=True) == pytest.approx(2) and found.crowding(1, memory=True) == 1
    assert cluster.load("h100").crowding(10000) == 1


def test_tables_hold_every_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the sizes and four numbers of GPUs: all of them take minutes."""
    monkeypatch.setattr(tables, "CASES", tuple(case for case in tables.CASES if case.name in ("130M", "7B", "1T")))
    monkeypatch.setattr(tables, "GPUS", (8, 128, 2048, 16384))
    summary = tables.write_tables(cluster.load("h100"), ["adamw", "soap"], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"sweeps.csv", "scaling.txt", "batch.png", "width.png", "gpus.png"}
    rows = list(csv.DictReader((tmp_path / "sweeps.csv").open()))
    assert {row["sweep"] for row in rows} == {"batch", "width", "gpus"}
    models = {row["model"] for row in rows if row["sweep"] == "gpus"}
    assert models == {case.name for case in tables.CASES}
    assert {int(float(row["x"])) for row in rows if row["sweep"] == "gpus"} >= {8, 16384}
    shares = [float(r["share"]) for r in rows if r["sweep"] == "batch" and r["optimizer"] == "soap" and r["share"]]
    assert shares == sorted(shares, reverse=True)  # larger batches hide the optimizer
    assert summary.count("\n") >= 2 * len(tables.CASES)
    assert "no matrix work" in summary  # SOAP at widths beyond its limit is Adam
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("batch", "width", "gpus"))
