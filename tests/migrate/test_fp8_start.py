"""A warm start for weights kept in FP8: the run with the flag is the run without, and so is the file."""

import os
from pathlib import Path

import pytest
import torch

from tests.distributed.test_transformer_engine import PACKAGES
from tests.migrate.runs import STOP, convert, launch, losses, tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"requirements-te.txt is not installed in {PACKAGES}"),
]
MODEL = (
    "--transformer-impl transformer_engine --bf16 --fp8-format e4m3 --fp8-recipe tensorwise --use-distributed-optimizer "
    "--hidden-size 64 --num-layers 1"
).split()
GATHER = "--fp8-param-gather"


def test_a_warm_start_with_the_flag_is_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGES), *os.environ.get("PYTHONPATH", "").split(":")]))
    found = {}
    for name, flag in (("on", [GATHER]), ("off", [])):
        saving = ["--optimizer", "adamw", "--save", str(tmp_path / f"adamw-{name}"), "--exit-interval", str(STOP)]
        launch("megatron_opt.pretrain", 1, [*MODEL, *flag, *saving, "--save-interval", str(STOP)], tmp_path)
        convert(tmp_path, f"adamw-{name}", f"muon-{name}", 1, *MODEL, *flag, "--optimizer", "muon")
        going_on = ["--optimizer", "muon", "--load", str(tmp_path / f"muon-{name}"), "--override-opt_param-scheduler"]
        found[name] = losses(launch("megatron_opt.pretrain", 1, [*MODEL, *flag, *going_on], tmp_path))
    assert len(found["on"]) == 16 - STOP and found["on"] == found["off"]
    on, off = (tensors(tmp_path / f"muon-{name}", "") for name in ("on", "off"))
    assert on.keys() == off.keys() and len(on) > 10
    assert all(torch.equal(on[key], off[key]) for key in on)
