"""The table that fits read: one final loss for each optimizer, model size and token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Dataset


@dataclass(frozen=True)
class Observations:
    """Final losses; arrays have one entry an observation."""

    optimizers: tuple[str, ...]
    """the baseline first"""
    index: np.ndarray
    """position of the observation's optimizer in `optimizers`"""
    n: np.ndarray
    """non-embedding parameters"""
    d: np.ndarray
    """training tokens"""
    loss: np.ndarray
    runs: tuple[str, ...] = ()
    """runs behind each loss, divided by spaces"""
    seeds: tuple[frozenset[int], ...] = ()
    """seeds whose mean each loss is; none: one seed, the same for all"""

    @property
    def counts(self) -> np.ndarray:
        """Runs behind each loss."""
        return np.array([float(len(seeds)) for seeds in self.seeds]) if self.seeds else np.ones(len(self))

    def shared_seeds(self) -> np.ndarray:
        """|S_i ∩ S_j| / (|S_i|·|S_j|): covariance of two means over seeds, of a noise common to a seed."""
        if not self.seeds:
            return np.ones((len(self), len(self)))
        every = sorted(set().union(*self.seeds))
        member = np.array([[seed in of_one for seed in every] for of_one in self.seeds], float)
        member /= member.sum(1, keepdims=True)
        return member @ member.T

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, mask: np.ndarray) -> Observations:
        """The observations that a boolean mask keeps; optimizers keep their positions."""
        runs = tuple(run for run, keep in zip(self.runs, mask) if keep)
        seeds = tuple(of_one for of_one, keep in zip(self.seeds, mask) if keep)
        return Observations(self.optimizers, self.index[mask], self.n[mask], self.d[mask], self.loss[mask], runs, seeds)

    def of(self, optimizer: str) -> Observations:
        """The observations of one optimizer, alone."""
        kept = self.where(self.index == self.optimizers.index(optimizer))
        return Observations((optimizer,), np.zeros(len(kept), int), kept.n, kept.d, kept.loss, kept.runs, kept.seeds)

    def rebased(self, baseline: str) -> Observations:
        """The same observations with another optimizer first."""
        names = (baseline, *(name for name in self.optimizers if name != baseline))
        position = np.array([names.index(name) for name in self.optimizers])
        return Observations(names, position[self.index], self.n, self.d, self.loss, self.runs, self.seeds)

    @property
    def sizes(self) -> np.ndarray:
        """Distinct model sizes, ascending."""
        return np.unique(self.n)


def observations(dataset: Dataset, optimizers: list[str] | None = None) -> Observations:
    """The best final loss of every cell of unique tokens of a dataset, mean over seeds; raises UserError without a
    baseline.
    """
    dataset.check_tokenizers()
    names = optimizers or dataset.optimizers
    unknown = [name for name in names if name not in dataset.optimizers]
    if unknown:
        raise UserError(f"no runs of {', '.join(unknown)}; there are {', '.join(dataset.optimizers)}")
    best = dataset.best()
    if dataset.baseline not in dataset.optimizers:
        raise UserError(f"the baseline {dataset.baseline!r} has no runs; run it, or name another with --baseline")
    once = [regime for regime in dataset.regimes if regime.epochs == 1]  # repeated tokens: fits/repetition.py
    cells = [(name, regime) for name in names for regime in once if (name, regime) in best]
    for name, regime in cells:
        if (dataset.baseline, regime) not in best:
            raise UserError(
                f"regime {regime} has results of {name} but none of the baseline {dataset.baseline}; run the "
                "baseline there, or leave the regime out"
            )
    if not cells:
        raise UserError("no finished run to fit; run the study first")
    chosen = [best[cell] for cell in cells]
    return Observations(
        tuple(names),
        np.array([names.index(name) for name, _ in cells]),
        np.array([float(b.record.parameters) for b in chosen]),
        np.array([float(b.record.tokens) for b in chosen]),
        np.array([b.loss for b in chosen]),
        tuple(" ".join(b.ids) for b in chosen),
        tuple(frozenset(b.seeds) for b in chosen),
    )
