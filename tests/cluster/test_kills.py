"""The short form of tools/kill_test.py: a rank, a save and the agent killed, the same losses bit for bit."""

import random

from tests.cluster.conftest import ITERATIONS, LIMIT, flags_of
from tests.cluster.harness import compare, disturbed


def test_kills_leave_no_trace(bench, reference):
    folder = bench / "killed"
    targets, draw = ["save", "agent", "rank"], random.Random(3)
    outcome, got = disturbed(folder, flags_of(folder), targets, draw, folder / "checkpoints", LIMIT)
    assert sum(outcome.kills.values()) >= 2 and outcome.orphans == 0
    assert compare(reference, got) == [] and len(reference) > ITERATIONS
