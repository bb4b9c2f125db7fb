#!/usr/bin/env python3
"""Kill runs at random moments and hold what they come to against undisturbed ones, bit for bit: a table in Markdown.

    python tools/kill_test.py --kills 50 --output table.md

Every layout and optimizer gets its share of the kills: of a random rank at a random moment of training or of start-up,
of one during a save, and of the torchrun agent (after which the same command is started again). Exit code 0 when every
run ended with the losses and gradient norms of its undisturbed twin at every iteration, and no rank outlived its agent.
"""

import argparse
import itertools
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cluster.harness import LAYOUTS, compare, disturbed, job_flags, undisturbed

TARGETS = ("rank", "save", "agent", "save", "rank", "start-up")


def main() -> int:
    """Run the table."""
    parser = argparse.ArgumentParser(description="Kill saving runs at random moments; compare with undisturbed ones.")
    parser.add_argument("--kills", type=int, default=50, help="at least so many in all (default 50)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--optimizers", default="adamw,muon,soap")
    parser.add_argument("--iterations", type=int, default=300, help="length of a run (default 300)")
    parser.add_argument("--save-interval", type=int, default=10)
    parser.add_argument("--async-save", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds without an end before a run has failed")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    pairs = list(itertools.product(args.layouts.split(","), args.optimizers.split(",")))
    share = -(-args.kills // len(pairs))
    draw = random.Random(args.seed)
    lines = [
        "| layout | optimizer | kills (rank / save / agent / start-up) | starts | restarts | damaged | orphans | "
        "differing values | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed, total = False, 0
    for number, (layout, optimizer) in enumerate(pairs):
        with tempfile.TemporaryDirectory(prefix="kills-") as name:
            folder = Path(name)
            more = [*LAYOUTS[layout], "--optimizer", optimizer, "--keep-last", "2"]
            more += ["--async-save"] if args.async_save else []
            flags = job_flags(folder / "plain", args.iterations, interval=args.save_interval) + more
            reference = undisturbed(folder / "plain", flags, args.limit)
            killed = folder / "killed"
            flags = job_flags(killed, args.iterations, interval=args.save_interval) + more
            targets = [TARGETS[(number + i) % len(TARGETS)] for i in range(share)]
            outcome, got = disturbed(killed, flags, targets, draw, killed / "checkpoints", args.limit)
        different = compare(reference, got)
        failed |= bool(different or outcome.orphans) or len(reference) < args.iterations
        total += sum(outcome.kills.values())
        kills = " / ".join(str(outcome.kills.get(target, 0)) for target in ("rank", "save", "agent", "start-up"))
        cells = [
            layout,
            optimizer,
            kills,
            outcome.starts,
            outcome.restarts,
            outcome.damaged,
            outcome.orphans,
            f"{len(different)} of {len(reference)}",
            f"{outcome.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    print(f"{total} kills: {'FAILED' if failed else 'all runs ended as the undisturbed ones'}", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
