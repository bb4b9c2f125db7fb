"""The report on a GPU, as far as it can be tried without one: its tables, the page that it fills, what it refuses."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"


@pytest.fixture(scope="module")
def report() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = {
    "tokens_per_s": 12345.6, "step_ms": 10.0, "optimizer_ms": 0.5, "optimizer_share": 0.05, "mfu": 0.41,
    "peak_memory_gb": 12.0, "losses": [5.0, 4.5],
}  # fmt: skip
FOUND = {
    "machine": {"card": "a card", "transformer-engine": None},
    "correctness": {"code": 1, "passed": 3, "failed": 1, "failures": ["tests/gpu/test_x.py::test_y reason"]},
    "steps": {
        "rows": [{"rule": "muon", "case": "1b", "ours": 20.0, "bound": 10.0, "peers": {"torch": 40.0, "other": 30.0}}],
        "unreached": ["kron on 1b: out of time"],
    },
    "products": {"ceiling": 7e14, "rows": [{"k": 512, "K": 512, "count": 8, "ms": 1.0, "flops_per_s": 3.5e14, "share": 0.5}]},
    "training": {"130m adam": RUN, "130m muon": {"unreached": "exit code 2: no"}},
    "precision": {"unreached": "transformer-engine is not installed"},
}  # fmt: skip


def test_the_page_has_a_place_for_every_table(report: Any) -> None:
    made = report.tables(FOUND)
    assert set(made) == {"machine", *report.PARTS}
    page = report.fill((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), made)
    for line in (
        "| card | a card |",
        "| failed | tests/gpu/test_x.py::test_y reason |",
        "| muon | 1b | 20.00 | other 30.00, torch 40.00 | 1.50 | 10.00 |",
        "| kron on 1b: out of time | | | | | |",
        "| 512 × 512, 8 | 1.00 | 350 | 50% |",
        "| 130m adam | 12,346 | 41.0% | 10.0 | 0.5 ms, 5.0% | 12.0 | 4.5 |",
        "transformer-engine is not installed",
    ):
        assert line in page, line
    assert report.fill(page, made) == page  # filled again
    with pytest.raises(SystemExit, match="marker"):
        report.fill("nothing", made)


def test_a_part_runs_on_the_cpu(report: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(device="cpu", smoke=True, limit=60.0, json=tmp_path / "found.json")
    made = report.Report(args)
    made.start("products")
    made.write("products", report.products(made))
    assert made.found["products"]["rows"] and "64 × 64" in report.tables(made.found)["products"]
    assert made.found["machine"]["torch"] == torch.__version__ and args.json.exists()
    made.ends = 0.0
    assert made.run("-c", "pass") is None  # out of time


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [[], ["--device", "cpu"]])
def test_it_refuses_what_it_cannot_measure(
    report: Any, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *flags])
    assert report.main() == 2 and "--smoke" in capsys.readouterr().err
