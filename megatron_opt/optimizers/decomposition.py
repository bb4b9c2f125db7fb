"""Batched decompositions that may fail: seen by one flag, mended block by block, or the old result is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_opt.optimizers.flag_coroutines import FlagCoroutine

Results = list[tuple[Tensor, ...] | None]


class Decomposition(NamedTuple):
    """Stacks (B, …) of a decomposition's results, and the blocks where it failed and what was given is kept."""

    parts: tuple[Tensor, ...]
    failed: list[int]


def _parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _like(part: Tensor, old: Tensor) -> Tensor:
    if part.dtype == old.dtype and part.stride() == old.stride():
        return part
    return torch.empty_like(old).copy_(part)


def decompose_or_keep(
    compute: Callable[..., Any], arguments: tuple[Tensor, ...], *rest: Any, keep: tuple[Tensor, ...]
) -> FlagCoroutine[Decomposition]:
    """Results of a batched decomposition; where it fails, once more in fp64; where that fails too, `keep`.

    `compute(*arguments, *rest, doubts=…)` adds flags to `doubts`, true where its result is wrong because it did not wait;
    without `doubts` it waits. Results have type and layout of `keep`: products of other layouts round differently.
    """
    doubts: list[Tensor] = []
    try:
        parts = _parts(compute(*arguments, *rest, doubts=doubts))
        sound = torch.stack([part.isfinite().all() for part in parts if part.is_floating_point()]).all()
        finite, *sure = yield torch.stack([sound, *(~doubt for doubt in doubts)])
        if finite and all(sure):
            return Decomposition(tuple(_like(part, old) for part, old in zip(parts, keep, strict=True)), [])
        again = _apart if all(sure) else _waiting
    except torch.linalg.LinAlgError:
        again = _apart
    results = again(compute, arguments, *rest)
    failed = [block for block, result in enumerate(results) if result is None]
    stacks = []
    for which, old in enumerate(keep):
        stack = old.clone()
        for block, result in enumerate(results):
            if result is not None:
                stack[block] = result[which]
        stacks.append(stack)
    return Decomposition(tuple(stacks), failed)


def _waiting(compute: Callable[..., Any], arguments: tuple[Tensor, ...], *rest: Any) -> Results:
    """Results one a block, read at once; where the batch fails, those of `_apart`."""
    try:
        parts = _parts(compute(*arguments, *rest))
        if all(bool(part.isfinite().all()) for part in parts):
            return list(zip(*parts))
    except torch.linalg.LinAlgError:
        pass
    return _apart(compute, arguments, *rest)


def _apart(compute: Callable[..., Any], arguments: tuple[Tensor, ...], *rest: Any) -> Results:
    """Results of a batch that failed: block by block, then in fp64; None where that fails too."""
    if len(arguments[0]) > 1:
        rows = zip(*(argument.split(1) for argument in arguments))
        return [single for row in rows for single in _waiting(compute, row, *rest)]
    dtype = arguments[0].dtype
    if dtype == torch.float64:
        return [None]
    (single,) = _waiting(compute, tuple(argument.double() for argument in arguments), *rest)
    if single is None:
        return [None]
    return [tuple(part.to(dtype) if part.is_floating_point() else part for part in single)]
