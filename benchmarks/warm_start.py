"""What a switch at 60% of a budget does: Muon and SOAP from a warm start and from a cold one, against staying with AdamW.

`python benchmarks/warm_start.py --data DIR --output DIR` (data: a folder with tokenizer.model, train and valid, as
`megatron-opt data` makes them) trains a small Llama with AdamW, goes on from 60% with every branch, and prints for each:

- spike: the largest excess of training loss over the staying run's after the switch, means of ten steps on the same
  batches; `noise` is what such means of the staying run scatter around their own trend (two standard deviations);
- early: the same within a tenth of what was left, before the new rate itself lifts the loss;
- valid: the largest excess of validation loss within a quarter of what was left, on the same batches;
- end: the validation loss at the end.

Runs that are in --output already are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODEL = (
    "--preset llama --num-layers 3 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 8 --global-batch-size 8 --eval-iters 16 --log-interval 1"
).split()
ADAMW = "--optimizer adamw --lr 8e-3 --adamw-beta2 0.98"
RULES = {
    "muon": ("--optimizer muon --muon-momentum 0.95", 1.6e-2),
    "soap": ("--optimizer soap --soap-beta2 0.98 --soap-block-size 256 --soap-max-precond-dim 256", 1.6e-2),
}
SHARE, WINDOW = 0.6, 10


@dataclass(frozen=True)
class Branch:
    """Where to go from the switch: the target, its start, steps of warmup, and the share of its tuned rate."""

    target: str
    start: str
    warmup: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.target}-{self.start}-{self.warmup}-{self.share:g}"


def run(module: str, flags: Sequence[str], done: Path) -> None:
    """One process, unless its result is there; its output is shown only where it fails."""
    if done.exists():
        return
    command = [*os.environ.get("BENCHMARK_LAUNCHER", "").split(), sys.executable, "-m", module, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")


def losses(folder: Path, kind: str) -> dict[int, float]:
    """Iteration → loss from a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["loss"] for line in lines if line["kind"] == kind}


def smooth(found: dict[int, float], after: int) -> np.ndarray:
    """Means of `WINDOW` steps, all of them after the switch."""
    values = np.array([found[step] for step in sorted(found) if step > after])
    return np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")


def noise(staying: np.ndarray) -> float:
    """Two standard deviations of smoothed loss around its cubic trend, relative."""
    place = np.linspace(-1, 1, len(staying))
    trend = np.polyval(np.polyfit(place, staying, 3), place)
    return float(2 * np.std(staying / trend - 1))


class Experiment:
    """One seed's source run and its branches."""

    def __init__(self, seed: int, iterations: int, data: Path, folder: Path) -> None:
        self.iterations, self.switch, self.folder = iterations, int(SHARE * iterations), folder / str(seed)
        self.common = [*MODEL, "--train-iters", str(iterations), "--seed", str(seed), "--data-cache-path"]
        self.common += [str(folder / "cache"), "--eval-interval", str(iterations // 40)]
        self.common += ["--tokenizer-type", "SentencePieceTokenizer"]
        self.common += ["--tokenizer-model", str(data / "tokenizer.model")]
        for split in ("train", "valid"):
            self.common += [f"--{split}-data-path", str(data / split)]
        self.source = self.folder / "adamw"
        flags = [*self.common, *ADAMW.split(), "--lr-warmup-iters", str(iterations // 20)]
        flags += ["--save", str(self.source / "checkpoints"), "--save-interval", str(self.switch)]
        run("megatron_opt.pretrain", [*flags, "--output-dir", str(self.source)], self.source / "results.json")
        self.staying, self.valid = losses(self.source, "train"), losses(self.source, "eval")

    def branch(self, branch: Branch) -> tuple[float, float, float, float]:
        """(spike, early, excess of validation loss, end) of a branch."""
        folder, left = self.folder / branch.name, self.iterations - self.switch
        optimizer, rate = RULES[branch.target]
        flags = [*self.common, *optimizer.split(), "--lr", f"{rate * branch.share:g}", "--override-opt_param-scheduler"]
        flags += [
            "--lr-decay-iters",
            str(left),
            "--lr-warmup-iters",
            str(branch.warmup),
            "--ckpt-step",
            str(self.switch),
        ]
        load = self.source / "checkpoints"
        if branch.start == "warm":
            load = self.folder / f"start-{branch.target}"
            words = ["--load", str(self.source / "checkpoints"), "--save", str(load)]
            run("megatron_opt.migrate.checkpoint", [*flags, *words], load / "latest_checkpointed_iteration.txt")
        extra = [] if branch.start == "warm" else ["--no-load-optim"]
        words = ["--load", str(load), *extra, "--output-dir", str(folder)]
        run("megatron_opt.pretrain", [*flags, *words], folder / "results.json")
        return self.measure(folder)

    def measure(self, folder: Path) -> tuple[float, float, float, float]:
        """(spike, early, excess of validation loss, end) of a folder's run."""
        over = smooth(losses(folder, "train"), self.switch) / smooth(self.staying, self.switch) - 1
        early = float(np.max(over[: (self.iterations - self.switch) // 10]))
        valid = losses(folder, "eval")
        soon = self.switch + (self.iterations - self.switch) // 4
        excess = max(loss / self.valid[step] - 1 for step, loss in valid.items() if self.switch < step <= soon)
        return float(np.max(over)), early, excess, valid[self.iterations]


def main() -> None:
    """Run every seed's branches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with tokenizer.model, train and valid")
    parser.add_argument("--output", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--targets", default="muon,soap")
    parser.add_argument("--starts", default="warm,cold")
    parser.add_argument("--warmups", default="20", help="steps of warmup after the switch")
    parser.add_argument("--shares", default="0.25", help="shares of the tuned learning rate, peak after the switch")
    args = parser.parse_args()
    print(f"{'seed':>4} {'branch':<20} {'spike':>7} {'early':>7} {'valid':>7} {'end':>7}", flush=True)
    for seed in map(int, args.seeds.split(",")):
        found = Experiment(seed, args.iterations, args.data, args.output)
        scatter = noise(smooth(found.staying, found.switch))
        print(f"{seed:>4} {'adamw, staying':<20} noise {scatter:.2%} {found.valid[args.iterations]:>20.4f}", flush=True)
        for target in args.targets.split(","):
            for start in args.starts.split(","):
                for warmup in map(int, args.warmups.split(",")):
                    for share in map(float, args.shares.split(",")):
                        branch = Branch(target, start, warmup, share)
                        spike, early, excess, end = found.branch(branch)
                        figures = f"{spike:>7.2%} {early:>7.2%} {excess:>7.2%} {end:>7.4f}"
                        print(f"{seed:>4} {branch.name:<20} {figures}", flush=True)


if __name__ == "__main__":
    main()
