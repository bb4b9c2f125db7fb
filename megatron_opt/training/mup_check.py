"""`megatron-opt mup check`: whether activations stay as large over width, with and without µP. arXiv 2203.03466, app. D.

The same few steps on one repeated batch at several widths; the slope of log(mean |x|) over log(width) is near 0 for every
kind of activation where learning rates, initialization and logits follow the width as they should.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError, number
from megatron_opt.files import write_atomic
from megatron_opt.report.blocks import Plot, Series, colors
from megatron_opt.report.terminal import aligned

PARAMETRIZATIONS = ("standard", "mup")
MEASURES = {"sizes": "mean |x|", "changes": "mean |x − x at step 0|"}
_SMALL = (
    "--preset llama --num-layers 2 --seq-length 64 --micro-batch-size 8 --global-batch-size 8 --eval-iters 0 "
    "--lr 0.01 --lr-decay-style constant --weight-decay 0 --log-interval 1000"
).split()
_NO_DATA = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511"]
_OURS = ("hidden-size", "ffn-hidden-size", "num-attention-heads", "train-iters", "use-mup", "mup-base-hidden-size")

Records = dict[tuple[str, int], dict[str, Any]]


def model_flags(width: int, head_dim: int, ffn_ratio: float) -> list[str]:
    """A width's shape: heads of one size, an MLP of one ratio."""
    ffn = int(width * ffn_ratio)
    return ["--hidden-size", str(width), "--ffn-hidden-size", str(ffn), "--num-attention-heads", str(width // head_dim)]


def command_lines(options: argparse.Namespace, flags: Sequence[str]) -> dict[tuple[str, int], list[str]]:
    """Flags of every run by (parametrization, width); the user's come last and win."""
    names = {word.split("=")[0].removeprefix("--") for word in flags if word.startswith("--")}
    if taken := sorted(names & set(_OURS)):
        raise UserError(f"--{taken[0]} is set by the check itself; use --widths, --head-dim, --ffn-ratio and --steps.")
    wrong = [width for width in options.widths if width % options.head_dim or width < options.head_dim]
    if wrong:
        raise UserError(f"width {wrong[0]} is not a multiple of --head-dim {options.head_dim}; change one of them.")
    if len(set(options.widths)) < 2:
        raise UserError("--widths needs at least two different widths to compare.")
    data = [] if any("data-path" in name or name == "mock-data" for name in names) else _NO_DATA
    steps = ["--train-iters", str(options.steps + 1)]
    base = options.base_width or min(options.widths)
    lines = {}
    for kind in PARAMETRIZATIONS:
        for width in options.widths:
            shape = model_flags(width, options.head_dim, options.ffn_ratio)
            mup = ["--use-mup", "--mup-base-hidden-size", str(base), "--mup-base-head-dim", str(options.head_dim)]
            lines[kind, width] = [*_SMALL, *data, *shape, *steps, *(mup if kind == "mup" else []), *flags]
    return lines


def run(lines: dict[tuple[str, int], list[str]]) -> Records:
    """All runs, and what each recorded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = {f"{kind} {width}": flags for (kind, width), flags in lines.items()}
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "megatron_opt.training.activations", str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it left no message"]
            raise UserError(f"a run failed: {said[-1]}")
        return {key: json.loads((folder / f"{key[0]} {key[1]}.json").read_text()) for key in lines}


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log(value) over log(width); infinite where a value is not finite and positive."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        return math.inf
    x, y = [math.log(width) for width in widths], [math.log(value) for value in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def summarize(records: Records, widths: Sequence[int]) -> dict[str, Any]:
    """By parametrization, measure (sizes, changes) and kind: the last step's values over width, and their slope."""
    summary: dict[str, Any] = {}
    for kind in PARAMETRIZATIONS:
        for measure in MEASURES:
            for name in records[kind, widths[0]][measure][-1]:
                values = [records[kind, width][measure][-1][name] for width in widths]
                entry = {"values": values, "slope": slope(widths, values)}
                summary.setdefault(kind, {}).setdefault(measure, {})[name] = entry
    return summary


def table(summary: dict[str, Any], widths: Sequence[int]) -> str:
    """One line a kind of activation."""
    parts = []
    for kind in PARAMETRIZATIONS:
        for measure, what in MEASURES.items():
            rows = [("", *map(str, widths), "slope")]
            for name, entry in summary[kind][measure].items():
                rows.append((name, *(f"{value:.4g}" for value in entry["values"]), f"{entry['slope']:.2f}"))
            parts.append(f"{kind}, {what} after the last step\n{aligned(rows)}")
    return "\n".join(parts)


def plots(summary: dict[str, Any], widths: Sequence[int]) -> list[Plot]:
    """Sizes, then changes over width, each without and with µP."""
    found = []
    for measure, what in MEASURES.items():
        for kind in PARAMETRIZATIONS:
            entries = summary[kind][measure]
            series = [
                Series(
                    f"{name} ({entries[name]['slope']:+.2f})",
                    [float(w) for w in widths],
                    entries[name]["values"],
                    color,
                )
                for name, color in colors(list(entries)).items()
            ]
            title = "µP" if kind == "mup" else "standard"
            found.append(Plot(f"{kind}-{measure}", title, "width", what, series, x_log=True, y_log=True))
    return found


def main(argv: list[str], prog: str) -> int:
    """`mup check [options] [-- flags of megatron_opt.pretrain]`."""
    from megatron_opt.report.png import write_grid

    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "check", help="mean activation sizes over width, with and without µP: a table, JSON and PNG",
        epilog="after `--`: flags of megatron_opt.pretrain, such as --optimizer soap --lr 0.01 and data",
    )  # fmt: skip
    command.add_argument("--widths", type=number(1, whole=True), nargs="+", default=[64, 128, 256, 512])
    command.add_argument(
        "--base-width", type=number(1, whole=True), help="width of the base model (default: the smallest)"
    )
    command.add_argument("--head-dim", type=number(1, whole=True), default=16, help="one head size for all widths")
    command.add_argument(
        "--ffn-ratio", type=number(0, 1e3, above=True), default=3.0, help="width of the MLP over the model's"
    )
    command.add_argument("--steps", type=number(1, whole=True), default=5, help="steps before the last measurement")
    command.add_argument("--output-dir", type=Path, default=Path("mup-check"))
    cut = argv.index("--") if "--" in argv else len(argv)
    options, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    lines = command_lines(options, flags)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    records = run(lines)
    summary = summarize(records, options.widths)
    text = table(summary, options.widths)
    print(text)
    content = {"widths": options.widths, "flags": flags, "summary": summary,
               "steps": {f"{kind} {width}": record for (kind, width), record in records.items()}}  # fmt: skip
    write_atomic(options.output_dir / "mup_check.json", json.dumps(content, indent=1) + "\n")
    write_atomic(options.output_dir / "mup_check.txt", text + "\n")
    write_grid(plots(summary, options.widths), 2, " ".join(flags) or "adamw", options.output_dir / "mup_check.png")
    return 0
