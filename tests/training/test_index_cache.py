"""The cache of sample indices while two jobs share it."""

import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_opt.training.index_cache import whole_arrays


def test_a_reader_never_sees_half_an_array(tmp_path: Path) -> None:
    target, array, done = tmp_path / "index.npy", np.arange(200_000), threading.Event()

    def write() -> None:
        while not done.is_set():
            np.save(target, array)

    with whole_arrays():
        np.save(target, array)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert all(np.array_equal(np.load(target), array) for _ in range(50))
        finally:
            done.set()
            writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["index.npy"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with whole_arrays(), pytest.raises(ValueError, match="pickle"):
        np.save(tmp_path / "index", np.array([object()]), allow_pickle=False)
    assert not list(tmp_path.iterdir())


def test_numpy_is_itself_again_afterwards(tmp_path: Path) -> None:
    save = np.save
    with whole_arrays():
        np.save(tmp_path / "index", np.arange(3))  # numpy appends the suffix, and so does this
    assert np.save is save and np.array_equal(np.load(tmp_path / "index.npy"), np.arange(3))
