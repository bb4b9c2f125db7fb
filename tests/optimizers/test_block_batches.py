"""Which matrices of a call step together, and when that is found anew."""

from dataclasses import replace

import torch

from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.block_batches import SMALL, Planner
from megatron_opt.optimizers.blocks import Grid, apart, batched, put_back

SHAPES = [(8, 8), (24, 8), (8, 8), (8, 4), (2 * SMALL, 8), (2 * SMALL, 8), (5,)]


def planner(block):
    return Planner(lambda info: Grid.of((*info.shape, 1)[:2], (block, block)), lambda info: (len(info.shape),))


def call(shapes=SHAPES, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes], [MatrixInfo(f"w{i}", s) for i, s in enumerate(shapes)]


def test_equal_blocks_are_one_family_and_large_ones_are_alone():
    plan = planner(0x1000)(*call())
    groups = {tuple(batch.members): (batch.shape, batch.whole) for batch in plan.batches}
    assert groups == {
        ((0, 0), (2, 0)): ((8, 8), True),
        ((1, 0),): ((24, 8), True),
        ((3, 0),): ((8, 4), True),
        ((4, 0),): ((2 * SMALL, 8), True),
        ((5, 0),): ((2 * SMALL, 8), True),
        ((6, 0),): ((5, 1), True),
    }
    assert plan.cut == []


def test_blocks_of_a_matrix_join_no_whole_ones():
    plan = planner(8)(*call([(8, 8), (24, 8), (12, 8)]))
    groups = {tuple(batch.members): (batch.shape, batch.whole) for batch in plan.batches}
    assert groups == {((0, 0),): ((8, 8), True), ((1, 0), (2, 0)): ((8, 8), False), ((2, 1),): ((4, 8), False)}
    assert plan.cut == [1, 2]
    batch = plan.batches[1]
    assert batch.names([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], plan.infos) == ["w1", "w1", "w1", "w2"]


def test_a_plan_is_kept_until_something_differs():
    plans = planner(8)
    grads, infos = call()
    first = plans(grads, infos)
    assert plans(grads, [replace(info) for info in infos]) is first
    assert plans(grads[:3], infos[:3]) is not first
    other = plans(grads, infos)
    wider = [replace(infos[0], shape=(8, 9)), *infos[1:]]
    assert plans(grads, wider) is not other and plans(grads, wider).batches[0].shape == (8, 8)
    assert plans(*call(dtype=torch.float64)).types[0][0] == torch.float64
    assert plans([], []).batches == []


def test_stacks_come_apart_again():
    for parts in ([torch.rand(3, 2) for _ in range(4)], [torch.rand(n, 3, 2) for n in (1, 3)]):
        stack = batched(parts)
        assert stack.shape == (4, 3, 2)
        for part, again in zip(parts, apart(stack, parts), strict=True):
            assert torch.equal(part, again)
        stack.add_(1)
        put_back(stack, parts)
        assert torch.equal(batched(parts), stack)
    alone = torch.rand(3, 2)
    batched([alone]).zero_()
    assert not alone.any()
