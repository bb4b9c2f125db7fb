"""Hostile and damaged pickles are refused without being run."""

import collections
import io
import os
import pickle
import sys
import tarfile
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_opt.checkpointing.trusted import checked_extra_state, refused_names


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


KEY = "decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1"


@pytest.fixture(
    params=[
        "transformer_engine.common.recipe.DelayedScaling",
        "megatron.core.extensions.transformer_engine.TEDelayedScaling",
    ]
)
def recipe(monkeypatch, request):
    """What delayed scaling keeps, with Transformer Engine's recipe or Megatron's, without Transformer Engine."""
    path, _, name = request.param.rpartition(".")
    module = types.ModuleType(path)
    parents = path.split(".")
    for depth in range(1, len(parents)):
        parent = ".".join(parents[:depth])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, path, module)
    setattr(module, name, type(name, (), {"__module__": path}))
    made = getattr(module, name)()
    made.margin, made.amax_history_len = 0, 16
    return made


def _extra_state(recipe, **more):
    state = {"recipe": recipe, "scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3)}
    state |= {"extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True}, **more}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def _saved_as_megatron_does(*values):
    return values  # a list would be taken apart by torch


def test_extra_state_of_delayed_scaling_is_harmless(checkpoint, recipe):
    state = _extra_state(recipe)
    folder = checkpoint(**{KEY: _saved_as_megatron_does(state, torch.empty(0, dtype=torch.uint8), None)})
    assert refused_names(folder) == {}


def test_hostile_extra_state_is_refused_and_not_run(checkpoint, recipe, tmp_path):
    mark = tmp_path / "ran"
    outer = _extra_state(recipe, hook=Hostile(mark))
    aside = torch.cat([_extra_state(recipe), outer])[-len(outer) :]  # a view: the storage begins harmlessly
    for value in (outer, aside):
        assert refused_names(checkpoint(**{KEY: _saved_as_megatron_does(value)})) == {KEY: {"posix.system"}}
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["tensor", "tar", "zip"])
def test_a_hostile_pickle_in_a_tensors_bytes_is_refused(checkpoint, tmp_path, kind):
    mark = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save(Hostile(mark), inner, _use_new_zipfile_serialization=kind == "zip")
    data = inner.getvalue() if kind != "tar" else _tar(pickle.dumps(Hostile(mark)))

    class Tensor:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (data,)

    state = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Tensor()})), dtype=torch.uint8)
    folder = checkpoint(**{KEY: _saved_as_megatron_does(state)})
    assert refused_names(folder) == {KEY: {"posix.system"} if kind == "tensor" else {"unreadable"}}
    assert not mark.exists()


def _tar(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def test_transformer_engines_switch_is_on_while_a_checked_checkpoint_is_loaded(monkeypatch):
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with pytest.raises(KeyError), checked_extra_state():
            assert os.environ[name] == "1"
            raise KeyError
        assert os.environ.get(name) == before
