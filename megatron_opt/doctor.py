"""`torchrun … -m megatron_opt.doctor`, or `megatron-opt doctor`: is every rank fit for a run, and which one is not.

Every check gives one value a rank. Where all must agree, ranks that differ from the most common value are named; where
a number must be good enough, those beyond the limit are. Exit code: 0 fit (warnings allowed), 1 not, 2 bad input.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError, number
from megatron_opt.training import entry

OK, WARN, FAIL = "ok", "warn", "FAIL"
_SLOW = 2.0  # times the median: a rank this much slower is named


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    verdict: str
    summary: str
    odd: tuple[int, ...] = ()


def compare(check: str, values: Sequence[Any], verdict: str = FAIL) -> Finding:
    """All ranks' values must be equal; the ranks off the most common one are odd (in a tie, off the lowest rank's)."""
    counts = Counter(map(str, values))
    top = max(counts.values())
    common = next(str(value) for value in values if counts[str(value)] == top)
    odd = tuple(rank for rank, value in enumerate(values) if str(value) != common)
    if not odd:
        return Finding(check, OK, common)
    others = sorted({str(values[rank]) for rank in odd})
    return Finding(check, verdict, f"{common}, but {'; '.join(others[:3])}; wanted: the same on all ranks", odd)


def worst(check: str, values: Sequence[Any], verdict: str = FAIL) -> Finding:
    """Values are None for a rank without complaint, or its complaint."""
    odd = tuple(rank for rank, value in enumerate(values) if value is not None)
    if not odd:
        return Finding(check, OK, "on all ranks")
    return Finding(check, verdict, "; ".join(sorted({str(values[rank]) for rank in odd})[:3]), odd)


def limited(check: str, values: Sequence[float | None], least: float, form: str) -> Finding:
    """A number a rank, of which a rank should have `least` or more."""
    known = [value for value in values if value is not None]
    if not known:
        return Finding(check, OK, "unlimited")
    odd = tuple(rank for rank, value in enumerate(values) if value is not None and value < least)
    wanted = f"; wanted: {form.format(least)}" if odd else ""
    return Finding(check, WARN if odd else OK, f"at least {form.format(min(known))}{wanted}", odd)


def speeds(check: str, seconds: Sequence[float], gigabytes: float | None = None) -> Finding:
    """Ranks much slower than the median are odd; the speed told is the median's."""
    median = statistics.median(seconds)
    odd = tuple(rank for rank, value in enumerate(seconds) if value > _SLOW * median)
    shown = f"{gigabytes / median:.2f} GB/s" if gigabytes else f"{1e3 * median:.1f} ms"
    wanted = f"; wanted: below {_SLOW:g}" if odd else ""
    slowest = f"slowest {max(seconds) / median:.2f} times the median{wanted}"
    return Finding(check, WARN if odd else OK, f"{shown}, {slowest}", odd)


def layout_groups(args: argparse.Namespace, world: int) -> dict[str, list[list[int]]]:
    """Ranks of every process group of a layout, in Megatron's order, by kind; groups of one left out."""
    from megatron.core.parallel_state import RankGenerator

    tp, pp, cp, ep = (
        getattr(args, name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
    )
    if world % (tp * pp * cp):
        raise UserError(f"{world} ranks are not divisible by TP {tp} × PP {pp} × CP {cp}; give the layout of your run.")
    dp = world // (tp * pp * cp)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    groups = {"world": [list(range(world))]}
    for name, size in (("tp", tp), ("cp", cp), ("dp", dp), ("pp", pp)):
        if 1 < size < world:
            groups[name] = dense.get_ranks(name)
    if ep > 1:
        if dp * cp % ep:
            raise UserError(f"{dp * cp} data-parallel ranks are not divisible by EP {ep}; give the layout of your run.")
        expert = RankGenerator(tp=tp, ep=ep, dp=dp * cp // ep, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        groups["ep"] = expert.get_ranks("ep")
    return groups


class Examiner:
    """Runs probes on all ranks and gathers their answers on all."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.findings: list[Finding] = []

    def gather(self, value: Any) -> list[Any]:
        """One value a rank, on every rank."""
        import torch

        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def ask(self, judge: Callable[..., Finding], check: str, probe: Callable[[], Any], *more: Any) -> None:
        """Probe here, gather, judge; a probe that raises is this rank's complaint."""
        try:
            answer, complaint = probe(), None
        except Exception as error:
            answer, complaint = None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        complaints = self.gather(complaint)
        answers = self.gather(answer)
        self.findings.append(worst(check, complaints) if any(complaints) else judge(check, answers, *more))


def examine(args: argparse.Namespace, rank: int, world: int) -> list[Finding]:
    """All checks, in the order in which their failure would explain the next."""
    from megatron_opt import doctor_probes as probes

    doctor = Examiner(rank, world)
    for name, probe in probes.VERSIONS.items():
        doctor.ask(compare, name, probe)
    doctor.ask(worst, "transformer-engine loads", probes.transformer_engine_complaint)
    doctor.ask(compare, "environment", probes.environment, WARN)
    doctor.ask(limited, "open files", probes.open_files, 65536, "{:,.0f}")
    doctor.ask(limited, "locked memory", probes.locked_memory_gb, 1.0, "{:.1f} GB")
    doctor.ask(limited, "shared memory", probes.shared_memory_gb, 1.0, "{:.1f} GB free")
    doctor.ask(limited, "memory", probes.free_memory_gb, 2.0, "{:.1f} GB free")
    doctor.ask(worst, "clock", lambda: probes.clock_complaint(rank, world), WARN)
    doctor.ask(speeds, "matrix product", probes.matmul_seconds)
    doctor.ask(speeds, "memory copy", probes.copy_seconds, probes.COPY_GB)
    size = args.megabytes * 2**20
    for kind, groups in layout_groups(args, world).items():
        if world == 1:
            break
        mine = probes.make_group(groups, rank)
        for name, collective in probes.COLLECTIVES.items():
            doctor.ask(worst, f"{kind} {name}", functools.partial(probes.wrong_sum, collective, mine))
            if doctor.findings[-1].verdict == OK:
                doctor.findings.pop()
                timed = functools.partial(probes.seconds_of, collective, mine, size)
                doctor.ask(speeds, f"{kind} {name}", timed, size / 1e9)
    if args.shared_dir is not None:
        doctor.ask(worst, "shared folder", lambda: probes.shared_folder_complaint(args.shared_dir, rank, world))
        doctor.ask(limited, "free space", lambda: probes.free_space_gb(args.shared_dir), args.free_gb, "{:.1f} GB")
        written = functools.partial(probes.durable_write_seconds, args.shared_dir, rank)
        doctor.ask(speeds, "durable write", written, probes.WRITE_GB)
    for prefix in args.data_path:
        doctor.ask(compare, f"dataset {Path(prefix).name}", functools.partial(probes.dataset_digest, prefix))
    return doctor.findings


def table(findings: Sequence[Finding], hosts: Sequence[str]) -> str:
    """Check, verdict, what was found, and which ranks are odd, on which hosts."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        odd = ""
        if finding.odd:
            names = ", ".join(f"{rank} ({hosts[rank]})" for rank in finding.odd[:8])
            odd = f"  <- rank {names}{' …' if len(finding.odd) > 8 else ''}"
        lines.append(f"{finding.check:<{width}}  {finding.verdict:<4}  {finding.summary}{odd}")
    return "\n".join(lines)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Check every rank of a job before it is started.")
    for name in ("tensor-model", "pipeline-model", "context", "expert-model"):
        parser.add_argument(
            f"--{name}-parallel-size", type=number(1, whole=True), default=1, help="as in the run to come"
        )
    parser.add_argument("--shared-dir", type=Path, help="folder for checkpoints, that every rank must see")
    parser.add_argument("--free-gb", type=number(0), default=10.0, help="space wanted there (default 10)")
    parser.add_argument(
        "--data-path", nargs="*", default=[], metavar="PREFIX", help="datasets that every rank must read"
    )
    parser.add_argument(
        "--megabytes", type=number(1, 2**20, whole=True), default=16, help="size of a timed collective (default 16)"
    )
    parser.add_argument(
        "--timeout", type=number(1, 1e6, whole=True), default=120, help="seconds for any one collective (default 120)"
    )
    return parser


def main(argv: list[str], prog: str = "megatron-opt doctor") -> int:
    """Examine this job's ranks; without torchrun, this machine as one rank."""
    args = _parser(prog).parse_args(argv)
    alone = "RANK" not in os.environ
    if alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    rank, world = entry.check_launcher()
    began = time.monotonic()
    from megatron_opt import doctor_probes as probes
    from megatron_opt import platform

    platform.activate()
    probes.connect(args.timeout)
    try:
        findings = examine(args, rank, world)
        hosts = Examiner(rank, world).gather(probes.host())
    finally:
        probes.disconnect()
    failed = any(finding.verdict == FAIL for finding in findings)
    if rank == 0:
        print(table(findings, hosts))
        warned = sum(finding.verdict == WARN for finding in findings)
        what = "NOT fit" if failed else "fit"
        print(
            f"{world} ranks on {len(set(hosts))} hosts: {what}, {warned} warnings, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], prog="megatron_opt.doctor"))
    except UserError as error:
        print(f"megatron_opt.doctor: {error}", file=sys.stderr)
        sys.exit(2)
