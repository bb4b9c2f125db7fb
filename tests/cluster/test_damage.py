"""Damaged and foreign checkpoints: the newest sound one is found, saying so; nothing foreign is unpickled."""

import json
import shutil

import pytest

from megatron_opt.checkpointing import folders
from tests.cluster.conftest import LIMIT
from tests.cluster.harness import compare, losses


@pytest.fixture(scope="module")
def stopped(bench):
    """A run of 12 steps with checkpoints of 5, 10 and 12, to be copied and damaged."""
    from tests.cluster.conftest import flags_of
    from tests.cluster.harness import Run

    folder = bench / "stopped"
    run = Run(folder, flags_of(folder, "--exit-interval", "12"))
    assert run.finish(LIMIT) == 0, run.tail()
    assert folders.iterations(folder / "checkpoints") == [12, 10, 5]
    return folder


def resumed(job, stopped, *more):
    """A run that begins with a copy of the stopped one's checkpoints; (run, its save folder)."""
    run = job(*more, "--keep-last", "2")
    run.folder.mkdir()
    shutil.copytree(stopped / "checkpoints", run.folder / "checkpoints")
    shutil.copy(stopped / "metrics.jsonl", run.folder)
    return run, run.folder / "checkpoints"


def test_the_newest_sound_checkpoint_is_used(job, stopped, reference):
    run, save = resumed(job, stopped)
    with (save / "iter_0000012" / "__1_0.distcp").open("r+b") as stream:
        stream.seek(4000)
        stream.write(b"\xff\xff\xff\xff")
    (save / "iter_0000010" / "__0_0.distcp").unlink()
    assert run.finish(LIMIT) == 0, run.tail()
    assert [entry["iteration"] for entry in run.events("damaged")] == [12, 10]
    assert run.events("resume")[0]["iteration"] == 5
    assert "the checkpoint of iteration 12" in run.tail(400) and folders.MISMATCH in run.tail(400)
    assert (save / "iter_0000012.damaged").is_dir()
    assert compare(reference, losses(run.folder)) == []


def test_when_none_is_sound_the_run_does_not_start_anew(job, stopped):
    run, save = resumed(job, stopped)
    for iteration in folders.iterations(save):
        (save / folders.name_of(iteration) / ".metadata").write_bytes(b"")
    assert run.finish(LIMIT) == 2
    assert "no checkpoint under" in run.tail()
    assert folders.iterations(save) == [12, 10, 5]


def test_a_checkpoint_of_unknown_origin_is_refused_unless_trusted(job, stopped):
    run, save = resumed(job, stopped, "--exit-interval", "13")
    for iteration in folders.iterations(save):
        (save / folders.name_of(iteration) / folders.MANIFEST).unlink()
    assert run.finish(LIMIT) == 2
    assert "--trust-checkpoint" in run.tail() and folders.MANIFEST in run.tail()
    run.flags.append("--trust-checkpoint")
    assert run.finish(LIMIT) == 0, run.tail()
    assert run.events("resume")[0]["iteration"] == 12


def test_a_hostile_pickle_is_refused_although_its_checksums_are_right(job, stopped, tmp_path):
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    run, save = resumed(job, stopped)
    for iteration in folders.iterations(save):
        folder = save / folders.name_of(iteration)
        (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
        content = json.loads((folder / folders.MANIFEST).read_text())
        content["files"][".metadata"] = folders.sha256(folder / ".metadata")
        (folder / folders.MANIFEST).write_text(json.dumps(content))
    assert run.finish(LIMIT) == 2
    assert "would import posix.system" in run.tail() and not (tmp_path / "ran").exists()
