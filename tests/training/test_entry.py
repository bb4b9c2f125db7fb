"""How a rank ends."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_opt import pretrain


@pytest.mark.parametrize(("end", "code"), [(None, 0), (SystemExit(0), 0), (SystemExit(None), 0)])
def test_no_process_group_is_left_when_a_run_ends_well(monkeypatch, tmp_path, end, code):
    """A group that is left has threads, which may abort the process; --exit-interval ends by SystemExit."""

    def run(argv):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        if end is not None:
            raise end

    monkeypatch.setattr(pretrain, "run", run)
    try:
        assert pretrain.main([]) == code
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("code", [0, 3])
def test_leaving_writes_what_is_due_and_nothing_aborts_the_process(code):
    """A thread that never ends stands for one that a library would abort by."""
    program = (
        "import atexit, threading; from megatron_opt.training import entry; atexit.register(print, 'written');"
        f"threading.Thread(target=threading.Event().wait).start(); print('text'); entry.exit_process({code})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.split() == (["text"] if code else ["text", "written"])
