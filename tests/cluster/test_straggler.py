"""A rank that dawdles is named, once, and nobody else."""

import pytest

from tests.cluster.conftest import LIMIT
from tests.cluster.harness import LAYOUTS


@pytest.mark.parametrize("layout", ["DP2", "TP2"])
def test_a_slow_rank_is_named(job, layout):
    env = {"SLOW_RANK": "1", "SLOW_SECONDS": "0.2", "SLOW_FROM": "10"}
    run = job("--straggler-window", "10", "--straggler-factor", "2", *LAYOUTS[layout], iterations=40, interval=1000,
              launcher=("--nproc-per-node", "2", "--module", "tests.cluster.slow"), env=env)  # fmt: skip
    assert run.finish(LIMIT) == 0, run.tail()
    (event,) = run.events("straggler")
    assert event["guilty"] == [1] and event["rank"] == 1 and event["iteration"] == 20
    assert event["factor"] > 2 and event["seconds"] > 0.2 > event["others"]
