"""What a switch at 60% of a budget does: the loss after a warm start for Muon or SOAP against staying and a cold start.

`python benchmarks/warm_start.py --data DIR` (a folder of `megatron-opt data`) trains the demo model with AdamW to 60%,
then goes on with AdamW, and with Muon and SOAP from a warm start and from a cold one (weights alone), and prints the
largest excess of the training loss over the staying run's on the same batches, and the validation loss at the end, for
each seed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {"muon": "--lr 1e-2", "soap": "--lr 8e-3"}
SHARE = 0.6


def run(module: str, flags: list[str]) -> None:
    """One process; its output is shown only where it fails."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def losses(folder: Path, kind: str) -> dict[int, float]:
    """Iteration → loss from a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["kind"] == kind and (kind == "train" or line.get("split") == "valid")]
    return {line["iteration"]: line["loss"] for line in chosen}


def experiment(seed: int, iterations: int, data: Path, preset: str, folder: Path) -> list[tuple[str, float, float]]:
    """(branch, largest excess over staying after the switch, final validation loss) of one seed."""
    switch = int(SHARE * iterations)
    common = ["--preset", preset, "--train-iters", str(iterations), "--seed", str(seed), "--log-interval", "10"]
    common += ["--eval-interval", str(iterations), "--tokenizer-type", "SentencePieceTokenizer"]
    common += ["--tokenizer-model", str(data / "tokenizer.model"), "--data-cache-path", str(folder / "cache")]
    for split in ("train", "valid", "test"):
        common += [f"--{split}-data-path", str(data / split)]
    source = folder / "adamw"
    stay = ["--optimizer", "adamw", "--save", str(source / "checkpoints"), "--save-interval", str(switch)]
    run("megatron_opt.pretrain", [*common, *stay, "--output-dir", str(source)])
    staying = losses(source, "train")

    def row(name: str, where: Path) -> tuple[str, float, float]:
        after = {number: loss for number, loss in losses(where, "train").items() if number > switch}
        spike = max(loss / staying[number] - 1 for number, loss in after.items())
        return name, spike, losses(where, "eval")[iterations]

    rows = [row("adamw, staying", source)]
    left = iterations - switch
    for target, rate in TARGETS.items():
        flags = [
            *common,
            "--optimizer",
            target,
            *rate.split(),
            "--override-opt_param-scheduler",
            "--lr-decay-style",
            "cosine",
        ]
        flags += [
            "--lr-decay-iters",
            str(left),
            "--lr-warmup-iters",
            str(max(1, left // 20)),
            "--ckpt-step",
            str(switch),
        ]
        for start in ("warm", "cold"):
            branch = folder / f"{target}-{start}"
            load = source / "checkpoints"
            if start == "warm":
                load = branch / "start"
                words = ["--load", str(source / "checkpoints"), "--save", str(load)]
                run("megatron_opt.migrate.checkpoint", [*flags, *words])
            extra = [] if start == "warm" else ["--no-load-optim"]
            run("megatron_opt.pretrain", [*flags, "--load", str(load), *extra, "--output-dir", str(branch)])
            rows.append(row(f"{target}, {start}", branch))
    return rows


def main() -> None:
    """Run both seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder with tokenizer.model, train, valid and test")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seeds", default="1,2")
    args = parser.parse_args()
    print(f"{'seed':>4} {'branch':<16} {'spike':>7} {'final valid':>11}", flush=True)
    for seed in map(int, args.seeds.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="warm-start-"))
        for name, spike, final in experiment(seed, args.iterations, args.data, args.preset, folder):
            print(f"{seed:>4} {name:<16} {spike:>7.2%} {final:>11.4f}", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
