"""Many copies at once are the single ones: other types, strides, nothing to copy, memory that is the target's already."""

import torch

from megatron_opt.kernels.copies import copy_all


def test_every_pair_is_copied() -> None:
    a = torch.arange(24.0).view(4, 6)
    targets = [torch.empty(4, 2), torch.empty(2, 6, dtype=torch.bfloat16), torch.empty(0, 3), torch.empty(1, 6)]
    sources = [a[:, 2:4], a[:2], a[:0, :3], a[3:4]]
    copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.float(), source)


def test_parts_of_a_target_leave_the_rest() -> None:
    a, b = torch.arange(24.0).view(4, 6), torch.zeros(4, 6)
    copy_all([b[:, 1:3], b[3:]], [a[:, 1:3], a[3:]])
    assert b[1].tolist() == [0, 7, 8, 0, 0, 0] and torch.equal(b[3], a[3])
    copy_all([b], [b])
    copy_all([], [])
    assert torch.equal(b[3], a[3])
