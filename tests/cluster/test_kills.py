"""The short form of tools/kill_test.py: a rank, a save and the agent killed: the same losses bit for bit, no sample lost."""

import random

import pytest

from megatron_opt.training.samples import consumed
from tests.cluster.conftest import ITERATIONS, LIMIT, flags_of
from tests.cluster.harness import compare, disturbed, resumes


@pytest.mark.parametrize("more", [(), pytest.param(("--async-save",), marks=pytest.mark.slow)], ids=["sync", "async"])
def test_kills_leave_no_trace(bench, reference, more):
    folder = bench / f"killed{len(more)}"
    targets, draw = ["save", "agent", "rank"], random.Random(3)
    flags = flags_of(folder, "--log-samples", *more)
    outcome, got = disturbed(folder, flags, targets, draw, folder / "checkpoints", LIMIT)
    assert sum(outcome.kills.values()) >= 2 and outcome.orphans == 0
    assert compare(reference, got) == [] and len(reference) > ITERATIONS
    seen = consumed(folder, resumes(folder))
    assert [sorted(seen[n]) for n in sorted(seen)] == [list(range(8 * n, 8 * n + 8)) for n in range(ITERATIONS)]
