"""Pools of ranks, started once for the whole folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four ranks."""
    made = Pool(Path(tmp_path_factory.mktemp("pool")), 4)
    yield made
    made.close()


@pytest.fixture(scope="session")
def big_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Eight ranks, for tests marked slow."""
    made = Pool(Path(tmp_path_factory.mktemp("big_pool")), 8)
    yield made
    made.close()
