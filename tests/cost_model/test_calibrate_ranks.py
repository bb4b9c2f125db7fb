"""What several processes measure: numbers a machine can have, also while others use it."""

from typing import Any

import pytest

from megatron_opt.cost_model import calibrate_ranks, cluster
from megatron_opt.errors import UserError


def test_a_link_between_processes_is_measured() -> None:
    bandwidth, latency, amid, shares = calibrate_ranks.link(2)
    assert 1e6 < bandwidth < 1e12 and 0 < latency <= amid < 5
    assert set(shares) == set(cluster.COLLECTIVES) and all(0.001 < share < 1000 for share in shares.values())


def test_a_small_transfer_that_was_delayed_makes_no_infinite_rate() -> None:
    assert calibrate_ranks.rate_of(8e6, 5e-3, 1e-3) == pytest.approx(2e9)
    assert calibrate_ranks.rate_of(8e6, 5e-3, 7e-3) == pytest.approx(3.2e9)


def test_ranks_that_work_at_once_take_from_one_another() -> None:
    share, bandwidth = calibrate_ranks.together(2)
    assert 0.05 < share <= 1 and 1e8 < bandwidth < 1e13


def test_the_engine_itself_takes_time() -> None:
    step, element, matrix, layer = calibrate_ranks.engine()
    assert 0 <= step < 1 and 0 < element < 0.1 and 0 < matrix < 0.1 and 0 < layer < 10


def _fails(rank: int, ranks: int, barrier: Any, results: Any) -> None:
    raise ValueError("no")


def test_a_process_that_fails_ends_the_calibration() -> None:
    with pytest.raises(UserError, match="process of the calibration failed"):
        calibrate_ranks.answers(_fails, 2, 2)
