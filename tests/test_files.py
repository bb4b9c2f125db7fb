"""Files that appear whole or not at all."""

import os

import pytest

from megatron_opt.files import write_atomic


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "tracker"
    write_atomic(path, "1")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomic(path, "2")
    assert path.read_text() == "1" and os.listdir(tmp_path) == ["tracker"]
