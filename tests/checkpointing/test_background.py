"""The writer of background saves: values as they were at the save, errors told, a dead writer noticed."""

import io
import os
import signal
import time

import pytest
import torch
from torch.distributed.checkpoint.planner_helpers import _create_write_item_for_bytesio, _create_write_item_for_tensor

from megatron_opt.checkpointing.background import Publication, Writer, _read_results

SHAPES = [((5, 3), torch.float32), ((1000, 70), torch.float32), ((), torch.float32), ((0, 4), torch.float32),
          ((33,), torch.bfloat16), ((7,), torch.int64)]  # fmt: skip


@pytest.fixture
def writer():
    made = Writer(nice=0)
    yield made
    os.kill(made.pid, signal.SIGKILL)
    os.waitpid(made.pid, 0)


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(shape, generator=generator) * 100).to(dtype) for shape, dtype in SHAPES]


def plan_of(tensors):
    items = [_create_write_item_for_tensor(f"t{i}", tensor) for i, tensor in enumerate(tensors)]
    note = _create_write_item_for_bytesio("note", io.BytesIO(b"12"))
    return [("__0_0.distcp", [note], items[:3]), ("__0_1.distcp", [], items[3:])]


def read_back(folder):
    found = {}
    for result in _read_results(folder / ".results-0"):
        where = result.storage_data
        with (folder / where.relative_path).open("rb") as stream:
            stream.seek(where.offset)
            data = stream.read(where.length)
        name = result.index.fqn
        found[name] = data if name == "note" else torch.load(io.BytesIO(data), weights_only=True)
    return found


def test_values_are_those_of_the_save_whatever_comes_after(tmp_path, writer):
    plan, live = plan_of(random_tensors(0)), random_tensors(1)
    for number in range(3):  # the same plan thrice: sent once
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = [tensor.clone() for tensor in live]
        writer.save(folder, 0, plan, [b"%02d" % number], live, constant_until_step=[True, False] * 3)
        for tensor in live[1::2]:  # those that were not promised to keep still
            tensor.add_(1)
        writer.settle()
        for tensor in live[::2]:
            tensor.mul_(3)
        writer.wait()
        assert writer.written() is None
        found = read_back(folder)
        assert found.pop("note") == b"%02d" % number
        assert len(found) == len(SHAPES)
        for i, tensor in enumerate(expected):
            assert torch.equal(found[f"t{i}"], tensor) and found[f"t{i}"].dtype == tensor.dtype
        assert (folder / ".sums-0").is_file()


def test_a_larger_plan_gets_a_larger_buffer(tmp_path, writer):
    for number, size in enumerate((10, 100_000, 50)):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensor = torch.arange(float(size))
        writer.save(
            folder, 0, [("__0_0.distcp", [], [_create_write_item_for_tensor("t", tensor)])], [], [tensor], [True]
        )
        writer.wait()
        assert writer.written() is None
        assert torch.equal(read_back(folder)["t"], tensor)


def test_what_goes_wrong_is_told(tmp_path, writer):
    tensor = torch.ones(3)
    plan = [("__0_0.distcp", [], [_create_write_item_for_tensor("t", tensor)])]
    writer.save(tmp_path / "nowhere", 0, plan, [], [tensor], [True])
    writer.wait()
    assert "No such file" in writer.written()
    writer.save(tmp_path, 0, plan, [], [tensor], [True])
    writer.wait()
    assert writer.written() is None


def test_a_dead_writer_is_an_error_not_a_hang(tmp_path):
    writer, tensor = Writer(), torch.ones(3)
    os.kill(writer.pid, signal.SIGKILL)
    os.waitpid(writer.pid, 0)
    plan = [("__0_0.distcp", [], [_create_write_item_for_tensor("t", tensor)])]
    for _ in range(2):
        writer.save(tmp_path, 0, plan, [], [tensor], [True])
        writer.wait()
        assert "died" in writer.written()


def test_nothing_is_published_before_all_ranks_have_written(tmp_path, writer):
    """Rank 0's writer waits for the files of rank 1, which does not write; told so, it publishes nothing."""
    folder = tmp_path / ".saving" / "iter_0000005"
    folder.mkdir(parents=True)
    tensor = torch.ones(3)
    plan = [("__0_0.distcp", [], [_create_write_item_for_tensor("t", tensor)])]
    writer.save(folder, 0, plan, [], [tensor], [True])
    writer.publish(Publication(tmp_path, 5, 2, None, None, 0, 0))
    writer.wait()
    assert writer.written() is None
    time.sleep(0.2)
    assert writer.published(block=False) is None
    writer.cancel()
    assert "another rank" in writer.published(block=True)
    assert not (tmp_path / "iter_0000005").exists()
    writer.save(folder, 0, plan, [], [tensor], [True])  # it goes on after that
    writer.wait()
    assert writer.written() is None
