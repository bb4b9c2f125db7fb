"""How a rank ends."""

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
