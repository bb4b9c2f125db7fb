"""Cluster files: every key that is read, with every value that it cannot have, is refused by its whole name."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opt.cost_model import cluster
from megatron_opt.cost_model.cluster_file import KEYS, Reader
from megatron_opt.errors import UserError

NONSENSE = (-1, float("nan"), float("inf"), 1e30, "eight", "", True, None, [1], {"a": 1}, "2024-01-01")
WHOLE = {
    "name": "full", "title": "a file with every key", "sources": ["made up"], "measured": True, "devices": 64,
    "device": {
        "capability": 9.0,
        "peak": {"bf16": "1e+15", "fp32": 1e14}, "memory": 8e10, "reserved": 0, "memory_bandwidth": {1000: 1e12, 1e9: 2e12},
        "read_bandwidth": 3e12, "shared_cores": 2, "together": {"compute": 0.9, "memory": 0.5},
    },
    "rates": {
        kind: {"fp32": {128: 1e12, 1024: 2e12}, "bf16": {1024: 4e12}}
        for kind in ("gemm", "small_gemm", "qr", "eigh", "solve", "attention", "layer")
    },
    "node": {"gpus": 8, "bandwidth": 4e11, "latency": 1e-5}, "network": {"bandwidth": 5e10, "latency": 2e-5},
    "host": {"bandwidth": 6e10, "latency": 1e-5},
    "efficiency": {"elementwise": 0.8, "node": 0.7, "network": 0.7, "host": 0.6, "step": 0.9, "optimizer": 0.9, "overlap": 0},
    "overheads": {"matrix": 1e-4, "fragment": 2e-5, "bucket": 5e-5, "step": 1e-3, "layer": 0, "reduction": 0},
    "rule_overheads": {"muon": 1e-4}, "collectives": {"all_reduce": 0.9, "reduce_scatter": 1, "all_gather": 1.1},
}  # fmt: skip


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def refusal(content: Any) -> str:
    with pytest.raises(UserError) as error:
        Reader("c.yaml").cluster(content, "c")
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(WHOLE)
    section: Any = content
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return content


def test_every_key_is_read() -> None:
    found = Reader("c.yaml").cluster(WHOLE, "c")
    assert (
        found.name == "full" and found.peak == {"bf16": 1e15, "fp32": 1e14} and found.devices == 64 and found.measured
    )
    assert found.passes == ((1e3, 0.8e12), (1e9, 1.6e12)) and found.node.bandwidth == pytest.approx(0.7 * 4e11)
    have = {".".join(map(str, path)) for path in leaves(WHOLE)}
    assert {f"{section}.{key}" for section, keys in KEYS.items() for key in keys} <= {
        name for leaf in have for name in (leaf, leaf.rpartition(".")[0])
    }


NUMBERS = [path for path in leaves(WHOLE) if path[0] not in ("name", "title", "sources", "measured")]


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_numbers_that_cannot_be_meant(path: tuple[Any, ...]) -> None:
    for value in NONSENSE:
        if path == ("device", "read_bandwidth") and isinstance(value, dict):
            continue  # sizes and rates are taken there
        said = refusal(changed(path, value))
        assert f"c.yaml: {'.'.join(map(str, path))} is " in said and "; it must be " in said, said


@pytest.mark.parametrize("path", [
    ("device",), ("rates",), ("node",), ("network",), ("efficiency",), ("overheads",), ("rule_overheads",), ("collectives",),
    ("device", "peak"), ("device", "together"), ("rates", "gemm"), ("rates", "gemm", "fp32"),
], ids=".".join)  # fmt: skip
def test_sections_that_are_none(path: tuple[str, ...]) -> None:
    for value in (3, "x", None, [1]):
        assert f"{'.'.join(path)} is {value!r}" in refusal(changed(path, value))
    assert f"{'.'.join(path)}." in refusal(changed((*path, "nope"), 1)) or path[-1] == "fp32"


@pytest.mark.parametrize(("path", "value", "said"), [
    (("name",), -1, "name is -1"), (("name",), "", "name is ''"), (("title",), 3, "title is 3"), (("sources",), "a", "sources"),
    (("sources",), [1], "sources"), (("measured",), "yes please", "measured is 'yes please'; it must be true or false"),
    (("node", "gpus"), 0, "node.gpus is 0"), (("node", "gpus"), 1.5, "whole number"), (("devices",), 0, "devices is 0"),
    (("device", "memory"), 80, "device.memory is 80; it must be a finite number from 1e+06 to 1e+15 (bytes)"),
    (("device", "reserved"), 8e10, "device.reserved is 80000000000.0; it must be below device.memory, 8e+10"),
    (("network", "bandwidth"), 400, "(bytes/s)"), (("network", "latency"), 61, "(seconds)"),
    (("efficiency", "step"), 1.1, "efficiency.step is 1.1"), (("efficiency", "step"), 0, "efficiency.step is 0"),
    (("device", "together", "memory"), 2, "device.together.memory is 2"), (("rates", "gemm", "fp32"), {}, "rates.gemm.fp32 is {}"),
    (("rates", "gemm", "fp32", 0), 1e12, "a size of rates.gemm.fp32 is 0"),
    (("rates", "gemm", "fp32", "x"), 1e12, "a size of rates.gemm.fp32 is 'x'"),
    (("rates", "gemm", "fp32", "1024.0"), 1e12, "each size stands once"),
    (("rates", "gem"), {"fp32": {1: 1e9}}, "Did you mean gemm?"), (("rates", "gemm", "bf17"), {1: 1e9}, "Did you mean bf16?"),
    (("nod",), 3, "Did you mean node?"), (("node", "bandwith"), 1e9, "node.bandwith is no key that is read"),
    (("rule_overheads", "mun"), 1e-3, "Did you mean muon?"), (("collectives", "all_redue"), 1, "Did you mean all_reduce?"),
])  # fmt: skip
def test_other_values_that_cannot_be_meant(path: tuple[Any, ...], value: Any, said: str) -> None:
    assert said in refusal(changed(path, value))


@pytest.mark.parametrize("path", [
    ("device",), ("rates",), ("node",), ("network",), ("device", "peak"), ("device", "memory"), ("device", "memory_bandwidth"),
    ("node", "gpus"), ("node", "bandwidth"), ("network", "bandwidth"), ("rates", "qr"),
], ids=".".join)  # fmt: skip
def test_what_is_missing_is_named(path: tuple[str, ...]) -> None:
    content = copy.deepcopy(WHOLE)
    section: Any = content
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    said = refusal(content)
    assert path[-1] in said and "missing" in said


@pytest.mark.parametrize("text", ["", "7", "- 1", "a: [", "name: a\nname: b\n"])
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml is"):
        cluster.load(str(file))


def test_a_file_is_read_as_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(WHOLE))
    assert cluster.load(str(tmp_path / "c.yaml")) == Reader(str(tmp_path / "c.yaml")).cluster(WHOLE, "c")


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    ("memory: 8e+10", "memory: 80", 12, "device.memory is 80; it must be"), ("gpus: 8, ", "", 27, "node.gpus is missing"),
    ("{bandwidth: 5e+10, ", "{bandwith: 5e+10, ", 28, "network.bandwith is no key"),
    ("name: h100", "nme: h100", 1, "Did you mean name?"),
    ("256: 2.47e+13", "0: 2.47e+13", 17, "a size of rates.gemm.bf16 is '0'"), ("node: {", "nodes: {", 27, "nodes is no key"),
])  # fmt: skip
def test_mistakes_have_their_lines(old: str, new: str, line: int, said: str, tmp_path: Path) -> None:
    text = (Path(cluster.__file__).parent / "clusters" / "h100.yaml").read_text()
    assert old in text
    (tmp_path / "c.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        cluster.load(str(tmp_path / "c.yaml"))
    assert f"c.yaml:{line}: " in str(error.value) and said in str(error.value)
