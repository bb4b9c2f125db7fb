"""The doctor: verdicts, and two real ranks of which one is odd."""

import importlib
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_opt import doctor, doctor_probes
from megatron_opt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_minority_is_odd():
    assert doctor.compare("torch", ["2.14", "2.14"]).verdict == "ok"
    finding = doctor.compare("torch", ["2.14", "2.13", "2.14"])
    assert (finding.verdict, finding.odd, finding.summary) == (
        "FAIL",
        (1,),
        "2.14, but 2.13; wanted: the same on all ranks",
    )
    assert doctor.compare("torch", ["a", "b"]).odd == (1,)


def test_complaints_limits_and_speeds():
    assert doctor.worst("clock", [None, None]).verdict == "ok"
    assert doctor.worst("clock", [None, "off"], "warn").odd == (1,)
    assert doctor.limited("space", [50.0, 5.0, None], 10.0, "{:.0f} GB").odd == (1,)
    assert doctor.limited("locked", [None, None], 1.0, "{}").summary == "unlimited"
    slow = doctor.speeds("copy", [1.0, 1.1, 5.0, 0.9], 2.0)
    assert slow.verdict == "warn" and slow.odd == (2,)
    assert doctor.speeds("copy", [1.0, 1.1]).verdict == "ok"


def test_table_names_rank_and_host():
    text = doctor.table([doctor.compare("torch", ["2.14", "2.13"])], ["node1", "node2"])
    assert text == "torch  FAIL  2.14, but 2.13; wanted: the same on all ranks  <- rank 1 (node2)"


def layout(tp=1, pp=1, cp=1, ep=1):
    return Namespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
    )


def test_groups_are_those_of_the_layout():
    groups = doctor.layout_groups(layout(tp=2, pp=2), 8)
    assert groups["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["dp"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["pp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert list(doctor.layout_groups(layout(), 4)) == ["world"]
    assert sorted(map(tuple, doctor.layout_groups(layout(tp=2, ep=2), 8)["ep"]))[0] == (0, 2)
    with pytest.raises(UserError, match="not divisible"):
        doctor.layout_groups(layout(tp=3), 8)


def examine(tmp_path, body, *flags):
    """Two ranks under torchrun, whose module runs `body` before the doctor."""
    (tmp_path / "odd.py").write_text(
        "import os, sys\nrank = int(os.environ['RANK'])\nfrom megatron_opt import doctor, doctor_probes as probes\n"
        f"{body}\nsys.exit(doctor.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "odd", *flags]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)


def line(done, check):
    return next(row for row in done.stdout.splitlines() if row.startswith(check))


def test_two_sound_ranks(tmp_path):
    done = examine(
        tmp_path,
        "",
        "--tensor-model-parallel-size",
        "2",
        "--megabytes",
        "1",
        "--shared-dir",
        str(tmp_path),
        "--free-gb",
        "0.001",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 hosts: fit" in done.stdout
    for check in (
        "torch",
        "native kernels",
        "clock",
        "world all-reduce",
        "world reduce-scatter",
        "world all-gather",
        "world all-to-all",
        "shared folder",
        "durable write",
    ):
        assert line(done, check)
    assert not list(tmp_path.glob(".doctor*"))


def test_the_odd_rank_is_named(tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    body = f"""
if rank == 1:
    probes.VERSIONS["torch"] = lambda: "0.0"
    right = probes._all_reduce
    import pathlib
    real = probes._expected
    probes._expected = lambda f, r, n: [v + (f is right) for v in real(f, r, n)]
    original = probes.shared_folder_complaint
    probes.shared_folder_complaint = lambda folder, r, n: original(pathlib.Path({str(private)!r}), r, n)
"""
    done = examine(tmp_path, body, "--megabytes", "1", "--shared-dir", str(tmp_path), "--data-path", "nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL" in line(done, "torch") and "<- rank 1 (" in line(done, "torch")
    assert "wrong numbers" in line(done, "world all-reduce") and "<- rank 1" in line(done, "world all-reduce")
    assert "ok" in line(done, "world all-gather")
    assert "does not see rank" in line(done, "shared folder")
    assert "<- rank 0" in line(done, "dataset nowhere")
    assert "NOT fit" in done.stdout


def test_a_shared_folder_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_probes.dist, "barrier", lambda: None)
    complaint = doctor_probes.shared_folder_complaint(tmp_path / "tpyo", 0, 1)
    assert complaint == f"cannot write to {tmp_path / 'tpyo'}: No such file or directory" and not list(
        tmp_path.iterdir()
    )


def test_alone_on_this_machine(tmp_path):
    command = [sys.executable, "-m", "megatron_opt.cli", "doctor", "--shared-dir", str(tmp_path), "--free-gb", "1e9"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warn" in line(done, "free space") and "1 ranks on 1 hosts: fit" in done.stdout


def test_what_is_wanted_stands_beside_what_is_warned_of():
    assert doctor.limited("space", [50.0, 5.0], 10.0, "{:.0f} GB").summary == "at least 5 GB; wanted: 10 GB"
    assert "wanted: below 2" in doctor.speeds("copy", [1.0, 1.0, 5.0]).summary
    assert "wanted: the same on all ranks" in doctor.compare("torch", ["a", "b"]).summary
    assert "wanted" not in doctor.limited("space", [50.0], 10.0, "{:.0f} GB").summary


def test_remedies_for_a_transformer_engine_that_does_not_load():
    probes = importlib.import_module("megatron_opt.doctor_probes")
    symbol = "OSError: libtransformer_engine.so: undefined symbol: cublasLtGroupedMatrixLayoutInit_internal"
    assert "nvidia-cublas>=13.2" in probes.te_remedy(symbol)
    assert "--no-build-isolation" in probes.te_remedy("ModuleNotFoundError: No module named 'transformer_engine_torch'")


def test_help_needs_no_torch():
    code = "import sys; from megatron_opt import doctor; doctor._parser('x').format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
