"""Computations that must know flags on the host: generators that yield them and are sent their values, many in one wait."""

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FlagCoroutine = Generator[Tensor, list[bool], T]  # yields flags (k,), is sent k values


def joined(runs: "Sequence[FlagCoroutine[T]]") -> "FlagCoroutine[list[T]]":
    """Several as one: what all of them ask for at once is asked for together."""
    results: list[Any] = [None] * len(runs)
    asked: dict[int, Tensor] = {}

    def resume(index: int, values: list[bool] | None) -> None:
        try:
            asked[index] = runs[index].send(values)  # type: ignore[arg-type]
        except StopIteration as stopped:
            results[index] = stopped.value

    for index in range(len(runs)):
        resume(index, None)
    while asked:
        waiting = dict(asked)
        asked.clear()
        values = iter((yield torch.cat(list(waiting.values()))))
        for index, flags in waiting.items():
            resume(index, list(islice(values, len(flags))))
    return results


def answered(run: "FlagCoroutine[T]") -> T:
    """Its result; every question of its is a wait."""
    values = None
    while True:
        try:
            values = run.send(values).tolist()  # type: ignore[arg-type]
        except StopIteration as stopped:
            result: T = stopped.value
            return result


def together(runs: "Sequence[FlagCoroutine[T]]") -> list[T]:
    """The results of several, in one wait for each round of questions."""
    return answered(joined(runs))
