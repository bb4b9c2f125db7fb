"""Hostile and damaged pickles are refused without being run."""

import collections
import io
import os
import pickle
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_opt.checkpointing.trusted import refused_names


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def checkpoint(tmp_path):
    """torch's own distributed checkpoint of a tensor and objects."""

    def make(**objects):
        folder = tmp_path / "checkpoint"
        state = {"weight": torch.arange(10.0), **{k: v for k, v in objects.items()}}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return folder

    return make


def test_a_checkpoint_as_written_is_harmless(checkpoint):
    args = Namespace(lr=1e-3, path=Path("x"), dtype=torch.bfloat16, nested=types.SimpleNamespace(a=(1, {2, 3})))
    folder = checkpoint(args=args, rng=torch.get_rng_state(), order=collections.OrderedDict(a=1))
    assert refused_names(folder) == {}


def test_a_hostile_object_is_refused_and_not_run(checkpoint, tmp_path):
    mark = tmp_path / "ran"
    folder = checkpoint(args=Hostile(mark))
    assert refused_names(folder) == {"args": {"posix.system"}}
    assert not mark.exists()


def test_hostile_metadata_is_refused_before_anything_else(checkpoint, tmp_path):
    mark = tmp_path / "ran"
    folder = checkpoint()
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    assert refused_names(folder) == {".metadata": {"posix.system"}}
    assert not mark.exists()


def test_hostile_legacy_file_is_refused(tmp_path):
    mark = tmp_path / "ran"
    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    torch.save({"args": Hostile(mark)}, folder / "model_optim_rng.pt")
    assert refused_names(tmp_path) == {"model_optim_rng.pt": {"posix.system"}}
    (folder / "model_optim_rng.pt").write_bytes(pickle.dumps(Hostile(mark)))
    assert refused_names(tmp_path) == {"model_optim_rng.pt": {"posix.system"}}
    assert not mark.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "os.system"])
def test_dangerous_names_are_not_on_the_list(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    stream = io.BytesIO()
    stream.write(b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n.")
    (tmp_path / "common.pt").write_bytes(stream.getvalue())
    assert refused_names(tmp_path) == {"common.pt": {name}}


@pytest.mark.parametrize("cut", [0, 1, 20, 0.5])
def test_a_cut_pickle_is_unreadable(checkpoint, cut):
    folder = checkpoint()
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    assert refused_names(folder) == {".metadata": {"unreadable"}}
