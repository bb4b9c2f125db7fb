"""Checkpoint folders on disk: publish, verify, retain."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.checkpointing import folders


def write(save, iteration, ranks=2):
    """A save by several ranks, not yet published."""
    folder = save / folders.STAGING / folders.name_of(iteration)
    folder.mkdir(parents=True)
    for rank in range(ranks):
        (folder / f"__{rank}_0.distcp").write_bytes(os.urandom(1000 + rank))
        folders.sum_files(folder, rank)
    (folder / ".metadata").write_bytes(b"index")
    (folder / "metadata.json").write_text("{}")
    return folder


def test_a_checkpoint_is_invisible_until_published(tmp_path):
    write(tmp_path, 10)
    assert folders.iterations(tmp_path) == []
    size = folders.publish(tmp_path, 10)
    assert folders.iterations(tmp_path) == [10]
    assert (tmp_path / folders.TRACKER).read_text() == "10"
    assert size == 1000 + 1001 + 5 + 2
    files = folders.manifest(tmp_path, 10)
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    assert folders.damage(tmp_path / "iter_0000010", files) is None


def test_megatron_verifies_the_manifest(tmp_path):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    write(tmp_path, 10)
    folders.publish(tmp_path, 10)
    verify_integrity_manifest(str(tmp_path / "iter_0000010"))
    (tmp_path / "iter_0000010" / "__1_0.distcp").write_bytes(b"other")
    with pytest.raises(CheckpointingException):
        verify_integrity_manifest(str(tmp_path / "iter_0000010"))


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_every_kind_of_damage_is_found_by_some_rank(tmp_path, shares):
    write(tmp_path, 5)
    folders.publish(tmp_path, 5)
    folder, files = tmp_path / "iter_0000005", folders.manifest(tmp_path, 5)

    def found():
        return [text for rank in range(shares) if (text := folders.damage(folder, files, rank, shares))]

    assert found() == []
    data = (folder / "__1_0.distcp").read_bytes()
    for broken in (data[:-1], data + b"\0", data[:500] + bytes([data[500] ^ 1]) + data[501:], b""):
        (folder / "__1_0.distcp").write_bytes(broken)
        assert len(found()) == 1 and folders.MISMATCH in found()[0]
    (folder / "__1_0.distcp").unlink()
    assert found() == ["__1_0.distcp: No such file or directory"]


def test_an_unreadable_manifest_is_an_error_and_a_missing_one_is_none(tmp_path):
    write(tmp_path, 5)
    folders.publish(tmp_path, 5)
    path = tmp_path / "iter_0000005" / folders.MANIFEST
    for text in ("", "{", "[]", '{"files": {}}', '{"algorithm": "md5", "files": {"a": "b"}}'):
        path.write_text(text)
        with pytest.raises(ValueError):
            folders.manifest(tmp_path, 5)
    path.unlink()
    assert folders.manifest(tmp_path, 5) is None


def test_publishing_again_replaces(tmp_path):
    write(tmp_path, 5)
    folders.publish(tmp_path, 5)
    before = folders.manifest(tmp_path, 5)
    write(tmp_path, 5)
    folders.publish(tmp_path, 5)
    after = folders.manifest(tmp_path, 5)
    assert before != after and folders.damage(tmp_path / "iter_0000005", after) is None
    folders.delete_discarded(tmp_path, staging=True)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", folders.TRACKER]


@given(st.sets(st.integers(1, 500)), st.integers(0, 6), st.integers(0, 50))
def test_retention(found, last, every):
    kept = folders.retained(sorted(found), last, every)
    assert kept <= found
    if not last:
        assert kept == found
        return
    newest = sorted(found)[-last:]
    assert set(newest) <= kept
    assert all(n in newest or (every and n % every == 0) for n in kept)
    assert all(n in kept for n in found if every and n % every == 0)


def test_prune_keeps_links_and_the_damaged(tmp_path):
    for iteration in (10, 20, 30, 40):
        write(tmp_path, iteration)
        folders.publish(tmp_path, iteration)
    folders.set_apart(tmp_path, 30)
    elsewhere = tmp_path / "elsewhere"
    os.rename(tmp_path / "iter_0000010", elsewhere)
    os.symlink(elsewhere, tmp_path / "iter_0000010")
    assert folders.prune(tmp_path, 1, 0) == [20]
    folders.delete_discarded(tmp_path, staging=True)
    left = sorted(os.listdir(tmp_path))
    assert left == ["elsewhere", "iter_0000010", "iter_0000030.damaged", "iter_0000040", folders.TRACKER]


def test_manifest_is_json_for_others(tmp_path):
    write(tmp_path, 5)
    folders.publish(tmp_path, 5)
    content = json.loads((tmp_path / "iter_0000005" / "integrity.json").read_text())
    assert content["algorithm"] == "sha256"
