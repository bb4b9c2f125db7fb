"""A newcomer's path: a rule in one file of another package trains on TP2×DP2, saves, and goes on in another layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import outside
from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_curve, assert_same_matrices, assert_same_state
from tests.distributed.pool import Pool, Run

STEPS, TOTAL = 8, 12  # a run stops after the first, what loads it goes to the end of the same schedule
DENSE = [*c.DENSE, "--num-layers", "2"]
RULE = "--optimizer two_averages --two-averages-beta3 0.99 --two-averages-alpha 2".split()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    packages = Path(tmp_path_factory.mktemp("packages"))
    made = Pool(Path(tmp_path_factory.mktemp("outside")), 4, outside.install(packages))
    yield made
    made.close()


def _case(layout: Layout, name: str, **options: Any) -> Case:
    return case(DENSE, RULE, layout, name, steps=TOTAL, hook="checkpoint", options=options)


@pytest.fixture(scope="module")
def runs(ranks: Pool) -> dict[str, Run]:
    saved = _case(c.TP2_DP2_DIST, "saved", save="outside", interval=STEPS, stop=STEPS)
    made = ranks.run([_case(c.ONE, "one", stop=STEPS), saved])
    return made | ranks.run([_case(c.PP2, "loaded", load="outside"), _case(c.ONE, "whole")])


@pytest.mark.slow
def test_it_repeats_one_process(runs: dict[str, Run]) -> None:
    assert_same_curve(runs["saved"], runs["one"], steps=STEPS)
    assert_same_state(runs["saved"], runs["one"])
    assert set(runs["one"].state) == {"exp_avg", "exp_avg_slow", "exp_avg_sq"}


@pytest.mark.slow
def test_its_state_is_loaded_by_another_layout(runs: dict[str, Run]) -> None:
    assert_same_matrices(runs["loaded"].weights, runs["whole"].weights, 1e-4, "weights")
    assert runs["loaded"].losses == pytest.approx(runs["whole"].losses[STEPS:], rel=1e-5)


def test_it_is_one_file_of_less_than_100_lines() -> None:
    assert len(Path(outside.__file__).with_name("two_averages.py").read_text().splitlines()) < 100
