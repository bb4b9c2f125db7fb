"""`megatron-opt migrate plan | checkpoint`: is it worth changing the optimizer, and a warm start for it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_opt.errors import Parser, UserError, number


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line; what it does not know are Megatron's flags of the run."""
    parser = Parser(
        prog=prog, description="Plan a change of optimizer; convert a checkpoint into a warm start.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan|checkpoint")
    plan = commands.add_parser(
        "plan",
        help="cost, gain, risks and a recommendation",
        allow_abbrev=False,
        epilog="The run is given by --from, by Megatron's flags (--preset llama-7b …), or both; flags win.",
    )
    plan.add_argument(
        "--from", dest="source", metavar="RUN|FILE", help="a run's folder, its config.json, or a YAML file of flags"
    )
    plan.add_argument("--to", required=True, metavar="OPTIMIZER", help="the optimizer to change to")
    plan.add_argument(
        "--cluster", required=True, metavar="NAME|FILE", help="a100, h100, h200, b200, gb300, or a cluster file"
    )
    plan.add_argument("--gpus", type=number(1, 1e7, whole=True), help="number of devices (default: the run's)")
    plan.add_argument(
        "--study", metavar="DIR|FILE", help="your study: its folder or its fits as JSON (default: the published one)"
    )
    plan.add_argument("--tokens", type=number(0, above=True), help="budget in tokens (default: from the run's flags)")
    plan.add_argument(
        "--chinchilla",
        type=number(0, above=True),
        metavar="RATIO",
        help="budget as a multiple of 20 tokens per parameter",
    )
    plan.add_argument(
        "--done", type=number(0, 1), default=0.0, metavar="SHARE", help="share of the budget that is spent already"
    )
    plan.add_argument(
        "--output", default="migration", metavar="DIR", help="folder for plan.md, plan.html and plan.json"
    )
    commands.add_parser(
        "checkpoint",
        help="turn a checkpoint into a warm start for another optimizer",
        allow_abbrev=False,
        add_help=False,
    )
    return parser


CHECKPOINT_HELP = """usage: {prog} checkpoint --load DIR --save DIR --optimizer NAME FLAGS

Writes into --save a checkpoint with the same weights, iteration and place in the data as the one in --load, and a state
for --optimizer made from the moments of the one that trained it: Megatron's Adam, or any optimizer of this project
but kron, which can only be gone to. FLAGS are those of the run to come: model, layout, data.
For several ranks: torchrun … -m megatron_opt.migrate.checkpoint --load …"""


def main(argv: list[str], prog: str) -> int:
    """Run one of the commands; bad input raises UserError."""
    if argv and argv[0] == "checkpoint":
        if len(argv) == 1 or {"-h", "--help"} & set(argv):
            print(CHECKPOINT_HELP.format(prog=prog))
            return 0 if len(argv) > 1 else 2
        from megatron_opt.migrate.checkpoint import convert

        convert(argv[1:])
        return 0
    args, rest = build_parser(prog).parse_known_args(argv)
    _plan(args, rest)
    return 0


def _plan(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from megatron_opt.cost_model.cluster import load
    from megatron_opt.cost_model.flags import check_effects, parse, read_run
    from megatron_opt.files import check_writable, write_atomic
    from megatron_opt.migrate.plan import make_plan
    from megatron_opt.migrate.write import as_dict, document

    given, ignored = parse(rest)
    base, written = read_run(args.source) if args.source else ({}, {})
    flags = {**base, **given}
    check_effects(flags, rest)
    raw = {**written, **given, **dict.fromkeys(ignored, True)}
    gpus = args.gpus or base.get("world-size")
    if not gpus:
        raise UserError("--gpus is missing; give the number of devices of the run.")
    folder = Path(args.output)
    check_writable(folder / "plan.md")
    plan = make_plan(
        flags,
        raw,
        args.to,
        load(args.cluster),
        int(gpus),
        study=args.study,
        tokens=args.tokens,
        ratio=args.chinchilla,
        done=args.done,
    )
    report = document(plan)
    write_atomic(folder / "plan.md", report.markdown())
    write_atomic(folder / "plan.html", report.page())
    write_atomic(folder / "plan.json", json.dumps(as_dict(plan), indent=1, default=float) + "\n")
    print(report.verdict)
    for name, value in report.facts:
        print(f"  {name:<22} {value}")
    print(f"report: {folder / 'plan.html'}, {folder / 'plan.md'}")
