"""Any local tensor, cut into rectangles of logical matrices, has the elements that the whole matrices have there."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.distributed.compute_shards import shape2d
from megatron_opt.distributed.param_shards import rectangles
from megatron_opt.errors import UserError
from megatron_opt.layout.matrices import ParamView
from megatron_opt.torch.matrices import Declarer, canonical_names

SIDE = st.integers(1, 5)


@st.composite
def local_tensors(draw: Any) -> tuple[tuple[int, ...], Any, list[torch.Tensor]]:
    """A shape, a split, and what one rank may hold of each side: any rows, a run of the other sides."""
    shape = tuple(draw(st.lists(SIDE, min_size=1, max_size=4)))
    split: Any = draw(st.sampled_from(["stack", "flatten", "rows"] if len(shape) > 2 else ["none", "rows"]))
    if split == "rows":
        first = draw(st.integers(0, shape[0]))
        split = {suffix: rows for suffix, rows in (("a", first), ("b", shape[0] - first)) if rows}
    axes = [torch.arange(size) for size in shape]
    rows = draw(st.sets(st.integers(0, shape[0] - 1), min_size=1))
    axes[0] = torch.tensor(sorted(rows))
    for side in range(1, len(shape) if split == "stack" else min(2, len(shape))):
        start = draw(st.integers(0, shape[side] - 1))
        axes[side] = torch.arange(start, draw(st.integers(start + 1, shape[side])))
    return shape, split, axes


@settings(max_examples=50)
@given(local_tensors())
def test_rectangles_hold_what_the_matrices_hold(drawn: tuple[tuple[int, ...], Any, list[torch.Tensor]]) -> None:
    shape, split, axes = drawn
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    local = whole[torch.meshgrid(*axes, indexing="ij")]
    declared = Declarer(None, None if split == "none" else {"w": split}).declare("w", whole)
    assert sum(info.numel for info in declared.infos) == whole.numel()
    stacked = whole.reshape(-1, shape[-1]) if split == "stack" else whole.reshape(shape[0], -1)
    matrices = dict(
        zip([i.name for i in declared.infos], stacked.split([shape2d(i)[0] for i in declared.infos]), strict=True)
    )
    pieces, rows, cols = declared.mappings(axes)
    assert rows * cols == local.numel()
    view = ParamView("w", local, rows, cols, pieces, False, False)  # type: ignore[arg-type]
    rects = rectangles(view, 0, local.numel())
    assert sum(rect.numel for rect in rects) == local.numel()
    for rect in rects:
        held = rect.run(local.reshape(-1)).view(rect.region.shape)
        assert torch.equal(held, rect.region.of(matrices[rect.matrix]))


def test_columns_that_are_no_run_are_refused() -> None:
    whole = torch.ones(4, 3, 2)
    declared = Declarer(None, {"w": "flatten"}).declare("w", whole)
    with pytest.raises(UserError, match="not rectangles"):
        declared.mappings([torch.arange(4), torch.arange(3), torch.arange(1)])


def test_wrappers_leave_no_trace_in_names() -> None:
    names = ["module._orig_mod.layers.0._checkpoint_wrapped_module.w", "module.head._fsdp_wrapped_module.w"]
    assert [name for name, _ in canonical_names([(name, None) for name in names])] == ["layers.0.w", "head.w"]
    assert [name for name, _ in canonical_names([("module.w", None), ("other.w", None)])] == ["module.w", "other.w"]
