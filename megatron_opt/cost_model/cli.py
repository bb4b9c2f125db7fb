"""`megatron-opt cost step | search | tables | calibrate`: what a training step costs on a cluster."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_opt.errors import Parser, UserError, did_you_mean, number
from megatron_opt.files import check_writable, write_atomic


def _shared(parser: argparse.ArgumentParser, gpus: bool = True) -> None:
    parser.add_argument(
        "--cluster", required=True, metavar="NAME|FILE", help="a100, h100, h200, b200, gb300, or a cluster file"
    )
    if gpus:
        parser.add_argument("--gpus", type=number(1, 1e7, whole=True), required=True, help="number of devices")
    parser.add_argument("--from", dest="source", metavar="RUN|FILE", help="flags of a run's folder or of a YAML file")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON too")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line; what it does not know are Megatron's flags."""
    parser = Parser(
        prog=prog,
        description="Predict seconds, FLOPs, bytes and memory of a training step on a cluster.",
        epilog="Model, layout and optimizer are Megatron's flags (--preset llama-7b --optimizer muon …).",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step|search|tables|calibrate")
    step = commands.add_parser("step", help="one layout's step, broken down", allow_abbrev=False)
    _shared(step)
    step.add_argument("--plan", action="store_true", help="print the optimizer's ownership plan")
    step.add_argument(
        "--against", metavar="OPTIMIZER", help="the speedup over another optimizer, by a study's prediction"
    )
    step.add_argument("--study", metavar="DIR|JSON", help="the study of --against (default: the published one)")
    step.add_argument("--chinchilla", type=number(0, 1e6, above=True), help="token budget of --against (default: 1x)")
    search = commands.add_parser("search", help="layouts that fit, ranked, and why others do not", allow_abbrev=False)
    _shared(search)
    search.add_argument("--top", type=number(1, whole=True), default=10, help="layouts to show")
    tables = commands.add_parser(
        "tables", help="overhead of each optimizer across scales, with plots", allow_abbrev=False
    )
    tables.add_argument("--cluster", required=True, metavar="NAME|FILE")
    tables.add_argument("--output", required=True, metavar="DIR", help="folder for CSV and PNG files")
    tables.add_argument("--optimizers", default="adamw,muon,soap,lion", help="names, with commas")
    calibrate = commands.add_parser(
        "calibrate", help="measure this machine and write its cluster file", allow_abbrev=False
    )
    calibrate.add_argument("--output", required=True, metavar="FILE", help="cluster file to write")
    calibrate.add_argument(
        "--ranks",
        type=number(0, 1e4, whole=True),
        default=0,
        help="ranks to measure traffic between (default: cores, 0 for none)",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Run one of the commands; bad input raises UserError."""
    parser = build_parser(prog)
    args, rest = parser.parse_known_args(argv)
    runs: dict[str, Callable[[argparse.Namespace, Sequence[str]], None]] = {
        "step": _step,
        "search": _search,
        "tables": _tables,
        "calibrate": _calibrate,
    }
    if rest and args.command in ("tables", "calibrate"):
        raise UserError(f"{rest[0]} is unknown here; see --help.")
    runs[args.command](args, rest)
    return 0


def _flags(args: argparse.Namespace, rest: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    from megatron_opt.cost_model.flags import check_effects, from_run, parse

    given, ignored = parse(rest)
    base = from_run(args.source) if args.source else {}
    flags = {**base, **given}
    check_effects(flags, rest)
    _check_given_options(flags, given, getattr(args, "against", None))
    if args.json:
        check_writable(Path(args.json))
    return flags, ignored


def _check_given_options(flags: dict[str, Any], given: dict[str, Any], against: str | None) -> None:
    """Refuse options of an optimizer that no parameter is trained by."""
    from megatron_opt.cost_model.flags import grouping, options

    used = {group_config.optimizer for group_config in grouping(flags)} | {against}
    for name in options(given):
        if name not in used:
            raise UserError(
                f"--{name.replace('_', '-')}-… is given, but no parameter is trained by {name} "
                f"(--optimizer {flags.get('optimizer', 'adamw')}); leave it out."
            )


def _step(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from megatron_opt.cost_model import report
    from megatron_opt.cost_model.cluster import load
    from megatron_opt.cost_model.step import predict

    flags, ignored = _flags(args, rest)
    for name in ("study", "chinchilla"):
        if getattr(args, name) is not None and not args.against:
            raise UserError(f"--{name} is given without --against; name the optimizer to compare with.")
    step = predict(flags, load(args.cluster), args.gpus)
    if args.plan:
        from megatron_opt.distributed.ownership import plan_table

        for shard_group in {id(d): d for stage in step.plans for d in stage}.values():
            print(plan_table(shard_group.plan, title=f"optimizer plan, {shard_group.name}"))
    print(report.text(step, ignored))
    content = report.as_dict(step)
    if args.against:
        from megatron_opt.cost_model import speedup

        try:
            gained = speedup.speedup(flags, step, load(args.cluster), args.against, args.study, args.chinchilla or 1.0)
        except UserError as error:
            study = f" --study {args.study}" if args.study else ""
            raise UserError(f"--against {args.against}{study}: {error}") from error
        print(f"\n{gained.text()}")
        content["speedup"] = speedup.as_dict(gained)
    if args.json:
        write_atomic(Path(args.json), json.dumps(content, indent=1) + "\n")


def _search(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from megatron_opt.cost_model import report
    from megatron_opt.cost_model.cluster import load
    from megatron_opt.cost_model.search import SEARCHED, progress_stream, search, table

    flags, _ = _flags(args, rest)
    for word in rest:
        if (name := word.split("=")[0].removeprefix("--")) in SEARCHED:
            raise UserError(
                f"--{name} is what `cost search` looks for; leave it out, or give the layout to `cost step`."
            )
    ranked = search(flags, load(args.cluster), args.gpus, top=args.top, progress=progress_stream())
    print(table(ranked, args.top))
    if args.json:
        content = {
            "layouts": [report.as_dict(s) for s in ranked.steps],
            "refused": dict(ranked.refused),
            "tried": ranked.tried,
        }
        write_atomic(Path(args.json), json.dumps(content, indent=1) + "\n")


def _tables(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from megatron_opt.cost_model.cluster import load
    from megatron_opt.cost_model.tables import write_tables
    from megatron_opt.optimizers import registry

    names = [name.strip() for name in args.optimizers.split(",")]
    for name in names:
        if name not in registry.optimizers():
            known = sorted(registry.optimizers())
            raise UserError(
                f"--optimizers has {name!r}, which is none of {', '.join(known)}.{did_you_mean(name, known)}"
            )
    check_writable(Path(args.output) / "sweeps.csv")
    print(write_tables(load(args.cluster), names, Path(args.output)))


def _calibrate(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from megatron_opt.cost_model.calibrate import calibrate

    check_writable(Path(args.output))
    text = calibrate(args.ranks)
    write_atomic(Path(args.output), text)
    print(text, end="")
    print(f"written to {args.output}", file=sys.stderr)
