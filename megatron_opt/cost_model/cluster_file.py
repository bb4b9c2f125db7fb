"""Reads a cluster's YAML by a schema; whatever cannot be meant is one sentence that names the file and the whole key."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opt.cost_model.cluster import CLASSES, COLLECTIVES, LAYER, Cluster, Curve, Link, Overheads
from megatron_opt.errors import UserError, did_you_mean
from megatron_opt.optimizers import registry
from megatron_opt.yaml_files import LocatedDict

TYPES = ("bf16", "fp16", "fp32", "tf32", "fp8", "fp4", "fp64")


@dataclass(frozen=True)
class Range:
    """Finite numbers of a unit, both ends included; wide enough for any machine, and too narrow for another unit."""

    unit: str
    low: float
    high: float
    whole: bool = False


MEMORY = Range("bytes", 1e6, 1e15)
RESERVED = Range("bytes", 0, 1e15)
RATE = Range("FLOP/s", 1e3, 1e19)
BANDWIDTH = Range("bytes/s", 1e3, 1e16)
SIZE = Range("rows or bytes", 1, 1e15)
SECONDS = Range("seconds", 0, 60)
SHARE = Range("of the whole", 1e-6, 1)
PART = Range("of the whole", 0, 1)
RELATIVE = Range("of the links' bandwidth", 1e-6, 1e3)
CAPABILITY = Range("CUDA's compute capability", 1, 99)
COUNT = Range("devices", 1, 1e7, whole=True)
CORES = Range("cores", 0, 1e6, whole=True)

_SHARES = ("elementwise", "node", "network", "host", "step", "optimizer")
_SECONDS = ("matrix", "fragment", "bucket", "step", "layer", "reduction")
# section -> its keys
KEYS: Mapping[str, tuple[str, ...]] = {
    "device": (
        "peak",
        "capability",
        "memory",
        "reserved",
        "memory_bandwidth",
        "read_bandwidth",
        "shared_cores",
        "together",
    ),
    "device.together": ("compute", "memory"),
    "node": ("gpus", "bandwidth", "latency"),
    "network": ("bandwidth", "latency"),
    "host": ("bandwidth", "latency"),
    "efficiency": (*_SHARES, "overlap"),
    "overheads": _SECONDS,
}
_TOP = (
    "name", "title", "sources", "measured", "devices", "device", "rates", "node", "network", "host", "efficiency", "collectives",
    "overheads", "rule_overheads",
)  # fmt: skip


class Reader:
    """A cluster file's content, key by key."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.content: Any = None

    def error(self, key: str, sentence: str) -> UserError:
        """A sentence behind the file and the line of `section.key`, or of the nearest section around it."""
        line, content = "", self.content
        for part in key.split("."):
            if not isinstance(content, LocatedDict) or part not in content.lines:
                break
            line, content = f":{content.lines[part]}", content[part]
        return UserError(f"cluster file {self.path}{line}: {sentence}")

    def refuse(self, key: str, value: Any, wants: str) -> UserError:
        shown = repr(value) if isinstance(value, str) else str(value)
        return self.error(key.removeprefix("a size of "), f"{key} is {shown[:60]}; it must be {wants}.")

    def number(self, key: str, value: Any, of: Range) -> float:
        """A number of a range; YAML's readers take 8e+10 for a word, so words that are numbers count."""
        wants = f"a {'whole' if of.whole else 'finite'} number from {of.low:g} to {of.high:g} ({of.unit})"
        try:
            parsed = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.refuse(key, value, wants) from None
        if not of.low <= parsed <= of.high or (of.whole and parsed != int(parsed)):
            raise self.refuse(key, value, wants)
        return parsed

    def get(self, section: Mapping[str, Any], where: str, key: str, of: Range, default: float | None = None) -> float:
        """The number `where.key`, or the default where the file has none."""
        name = f"{where}.{key}" if where else key
        if key not in section and default is None:
            raise self.error(name, f"{name} is missing; see clusters/h100.yaml.")
        return self.number(name, section[key], of) if key in section else float(default or 0.0)

    def word(self, content: Mapping[str, Any], key: str, default: str) -> str:
        value = content.get(key, default)
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise self.refuse(key, value, "a word or a line")
        return value

    def known(self, where: str, section: Iterable[Any], names: Iterable[str]) -> None:
        """Refuse keys of a section that nothing reads."""
        names = list(names)
        for key in section:
            if key not in names:
                name = f"{where}.{key}" if where else str(key)
                near = did_you_mean(str(key), names)
                has = f"{where or 'a cluster file'} has {', '.join(names)}.{near}"
                raise self.error(name, f"{name} is no key that is read; {has}")

    def section(self, content: Mapping[str, Any], key: str, where: str = "", optional: bool = False) -> dict[str, Any]:
        """A mapping of names; its keys are checked where they are listed."""
        name = f"{where}.{key}" if where else key
        if key not in content:
            if optional:
                return {}
            raise self.error(name, f"section `{name}` is missing; see clusters/h100.yaml.")
        value = content[key]
        if not isinstance(value, dict):
            raise self.refuse(name, value, "a section of keys; see clusters/h100.yaml")
        if name in KEYS:
            self.known(name, value, KEYS[name])
        return value

    def curve(self, values: Any, where: str, of: Range) -> Curve:
        """Size -> rate, in rising sizes."""
        if not isinstance(values, dict) or not values:
            raise self.refuse(where, values, f"a map of sizes to {of.unit}")
        points = sorted(
            (self.number(f"a size of {where}", size, SIZE), self.number(f"{where}.{size}", rate, of))
            for size, rate in values.items()
        )
        if len({size for size, _ in points}) < len(points):
            raise self.refuse(where, list(values), "a map in which each size stands once")
        return tuple(points)

    def passes(self, device: Mapping[str, Any], key: str, share: float) -> Curve:
        """A bandwidth: one number, or bytes moved -> bytes/s."""
        if isinstance(device.get(key), dict):
            return tuple((size, rate * share) for size, rate in self.curve(device[key], f"device.{key}", BANDWIDTH))
        return ((1.0, self.get(device, "device", key, BANDWIDTH) * share),)

    def rates(self, content: Mapping[str, Any]) -> dict[str, dict[str, Curve]]:
        rates: dict[str, dict[str, Curve]] = {}
        section = self.section(content, "rates")
        self.known("rates", section, (*CLASSES, LAYER))
        for kind, by_type in section.items():
            if not isinstance(by_type, dict) or not by_type:
                raise self.refuse(f"rates.{kind}", by_type, "a map of types such as bf16 to sizes and FLOP/s")
            self.known(f"rates.{kind}", by_type, TYPES)
            rates[kind] = {
                dtype: self.curve(values, f"rates.{kind}.{dtype}", RATE) for dtype, values in by_type.items()
            }
        if missing := [kind for kind in CLASSES if kind not in rates]:
            raise self.error("rates", f"rates of {', '.join(missing)} are missing.")
        return rates

    def link(self, content: Mapping[str, Any], key: str, share: float) -> Link:
        section = self.section(content, key)
        return Link(
            self.get(section, key, "bandwidth", BANDWIDTH) * share, self.get(section, key, "latency", SECONDS, 0.0)
        )

    def overheads(self, content: Mapping[str, Any]) -> Overheads:
        general = self.section(content, "overheads", optional=True)
        by_optimizer = self.section(content, "rule_overheads", optional=True)
        self.known("rule_overheads", by_optimizer, sorted(registry.optimizers()))
        return Overheads(
            **{key: self.get(general, "overheads", key, SECONDS, 0.0) for key in _SECONDS},
            by_optimizer={
                name: self.number(f"rule_overheads.{name}", value, SECONDS) for name, value in by_optimizer.items()
            },
        )

    def cluster(self, content: Any, name: str) -> Cluster:
        """The cluster, called `name` where the file does not say."""
        self.content = content
        if not isinstance(content, dict):
            raise UserError(f"{self.path} is no cluster file; start from a copy of clusters/h100.yaml.")
        self.known("", content, _TOP)
        device, node = self.section(content, "device"), self.section(content, "node")
        efficiency = self.section(content, "efficiency", optional=True)
        crowd = self.section(device, "together", "device", optional=True)
        kinds = self.section(content, "collectives", optional=True)
        self.known("collectives", kinds, COLLECTIVES)
        share = {key: self.get(efficiency, "efficiency", key, SHARE, 1.0) for key in _SHARES}
        peak = self.section(device, "peak", "device")
        self.known("device.peak", peak, TYPES)
        if not peak:
            raise self.refuse("device.peak", peak, "a map of types such as bf16 to FLOP/s")
        memory, reserved = self.get(device, "device", "memory", MEMORY), device.get("reserved", 0)
        if (reserve := self.number("device.reserved", reserved, RESERVED)) >= memory:
            raise self.refuse("device.reserved", reserved, f"below device.memory, {memory:g}")
        capability = None
        if "capability" in device:
            capability = divmod(round(10 * self.number("device.capability", device["capability"], CAPABILITY)), 10)
        sources, measured = content.get("sources", []), content.get("measured", False)
        if not isinstance(sources, list) or not all(isinstance(item, str) for item in sources):
            raise self.refuse("sources", sources, "a list of lines")
        if not isinstance(measured, bool):
            raise self.refuse("measured", measured, "true or false")
        return Cluster(
            name=self.word(content, "name", name),
            title=self.word(content, "title", self.path),
            peak={dtype: self.number(f"device.peak.{dtype}", value, RATE) for dtype, value in peak.items()},
            memory=memory,
            reserved=reserve,
            passes=self.passes(device, "memory_bandwidth", share["elementwise"]),
            reads=self.passes(
                device, "read_bandwidth" if "read_bandwidth" in device else "memory_bandwidth", share["elementwise"]
            ),
            rates=self.rates(content),
            gpus_per_node=int(self.get(node, "node", "gpus", COUNT)),
            node=self.link(content, "node", share["node"]),
            network=self.link(content, "network", share["network"]),
            host=self.link(content, "host", share["host"]) if "host" in content else None,
            devices=int(self.number("devices", content["devices"], COUNT)) if "devices" in content else None,
            step_efficiency=share["step"],
            optimizer_efficiency=share["optimizer"],
            overlap=self.get(efficiency, "efficiency", "overlap", PART, 1.0),
            shared_cores=int(self.get(device, "device", "shared_cores", CORES, 0.0)),
            together=(
                self.get(crowd, "device.together", "compute", SHARE, 1.0),
                self.get(crowd, "device.together", "memory", SHARE, 1.0),
            ),
            collectives={kind: self.number(f"collectives.{kind}", value, RELATIVE) for kind, value in kinds.items()},
            overheads=self.overheads(content),
            sources=tuple(sources),
            capability=capability,
            measured=measured,
        )
