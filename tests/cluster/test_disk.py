"""Full and read-only disks: earlier checkpoints stay whole, the run ends or goes on as it was told."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from megatron_opt.checkpointing import folders
from tests.cluster.conftest import ITERATIONS, LIMIT
from tests.cluster.harness import compare, losses, saving


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
    assert kept and not list((disk / "checkpoints" / folders.STAGING).glob("*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, timeout=30)
    assert run.finish(LIMIT) == 0, run.tail()
    assert run.events("resume")[0]["iteration"] == kept[0]
    assert compare(reference, losses(run.folder)) == []


@pytest.mark.parametrize("more", [(), ("--async-save",)], ids=["sync", "async"])
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
    assert "cannot be written to" in run.tail()  # before anything is built


THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


@pytest.fixture
def slow_disk(tmp_path):
    """A file system that writes 150 kB a second: a checkpoint takes four."""
    if os.geteuid() != 0 or not THROTTLE.exists() or shutil.which("mkfs.ext4") is None:
        pytest.skip("a throttled loop device needs root, the blkio controller (cgroup v1) and mkfs.ext4")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    run = partial(subprocess.run, capture_output=True, text=True, timeout=30)
    run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = run(["losetup", "-f", "--show", str(image)]).stdout.strip()
    if not device:
        pytest.skip("there are no loop devices")
    number = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()
    try:
        run(["mount", device, str(folder)], check=True)
        THROTTLE.write_text(f"{number} 150000")
        yield folder
    finally:
        THROTTLE.write_text(f"{number} 0")
        run(["umount", "-l", str(folder)])
        run(["losetup", "-d", device])


def test_a_slow_disk_is_waited_for(job, slow_disk, reference):
    run = job(save=slow_disk / "checkpoints", interval=20)
    assert run.finish(LIMIT) == 0, run.tail()
    assert max(entry["seconds"] for entry in run.events("save")) > 2
    assert sound(slow_disk / "checkpoints") == [60, 40, 20]
    assert compare(reference, losses(run.folder)) == []


def test_training_goes_on_while_a_slow_disk_is_written(job, slow_disk, reference):
    save = slow_disk / "checkpoints"
    run = job("--async-save", save=save, interval=20)
    run.start()
    run.until(lambda: run.iteration() >= 25, LIMIT, "steps after the first save")
    assert saving(save) and not run.events("save")
    assert run.wait(LIMIT) == 0, run.tail()
    assert sound(save) == [60, 40, 20]
    assert compare(reference, losses(run.folder)) == []
