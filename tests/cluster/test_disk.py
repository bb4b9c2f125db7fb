"""Full and read-only disks: earlier checkpoints stay whole, the run ends or goes on as it was told."""

import os
import subprocess

import pytest

from megatron_opt.training import folders
from tests.cluster.conftest import ITERATIONS, LIMIT
from tests.cluster.harness import compare, losses


def mount(folder, kilobytes):
    """A small file system of its own, which needs root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=30).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")


@pytest.fixture
def disk(tmp_path):
    """Room for two checkpoints of 0.56 MB and not for a third."""
    folder = tmp_path / "disk"
    mount(folder, 1400)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], timeout=30)


def sound(save):
    """Published checkpoints, each verified."""
    found = folders.iterations(save)
    for iteration in found:
        assert folders.damage(save / folders.name_of(iteration), folders.manifest(save, iteration)) is None
    return found


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(job, disk, reference):
    run = job(save=disk / "checkpoints")
    assert run.finish(LIMIT) == 2, run.tail()
    assert "could not be saved" in run.tail() and "--on-save-failure continue" in run.tail()
    kept = sound(disk / "checkpoints")
    assert kept and not list((disk / "checkpoints" / folders.ASIDE).glob("*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, timeout=30)
    assert run.finish(LIMIT) == 0, run.tail()
    assert run.events("resume")[0]["iteration"] == kept[0]
    assert compare(reference, losses(run.folder)) == []


@pytest.mark.parametrize("more", [(), ("--async-save", "--async-strategy", "mcore")], ids=["sync", "async"])
def test_a_full_disk_is_passed_over_when_told(job, disk, reference, more):
    run = job("--on-save-failure", "continue", *more, save=disk / "checkpoints")
    assert run.finish(LIMIT) == 0, run.tail()
    assert len(run.events("save_failed")) >= 3 and sound(disk / "checkpoints")
    assert compare(reference, losses(run.folder)) == []


def test_a_disk_that_fills_while_writing(job, disk, reference):
    """The room is there when the save begins and gone in its middle: the first checkpoint has no size to go by."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * 1_200_000)
    run = job("--on-save-failure", "continue", save=disk / "checkpoints", interval=20)
    run.start()
    run.until(lambda: run.events("save_failed"), LIMIT, "a failed save")
    ballast.unlink()
    assert run.wait(LIMIT) == 0, run.tail()
    assert run.events("save")[-1]["iteration"] == ITERATIONS
    assert sound(disk / "checkpoints")[0] == ITERATIONS
    assert compare(reference, losses(run.folder)) == []


def test_a_read_only_folder(job, disk):
    run = job(save=disk / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
    assert run.finish(LIMIT) == 2
    assert "Read-only file system" in run.tail()
