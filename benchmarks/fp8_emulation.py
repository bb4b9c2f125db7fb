"""What FP8 costs where Transformer Engine is emulated: step time of each recipe against a bf16 step on the CPU.

One process and one thread each, the same model and tokens, configurations in turn in every repeat; medians over steps.
usage: python benchmarks/fp8_emulation.py [--size 10M] [--steps 5] [--repeats 3] [--only mxfp8 …]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {  # layers, hidden, ffn, heads, sequence, batch
    "94k": (2, 64, 160, 2, 128, 8),
    "10M": (8, 320, 896, 5, 256, 4),
}
VOCABULARY = 2048
PACKAGES = Path(sys.prefix) / "transformer-engine"  # by `make setup`
EMULATED = ["--transformer-impl", "transformer_engine"]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
CONFIGURATIONS = {"bf16, local layers": [], "bf16": EMULATED} | {
    recipe: [*EMULATED, "--fp8-format", "hybrid", "--fp8-recipe", recipe] for recipe in RECIPES
}
WARM = 2


def seconds(size: str, more: list[str], steps: int) -> list[float]:
    """Seconds of each step of a job after the first ones, from its metrics.jsonl."""
    layers, hidden, ffn, heads, sequence, batch = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"""--preset llama --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
            --num-attention-heads {heads} --seq-length {sequence} --micro-batch-size {batch} --bf16
            --global-batch-size {batch} --train-iters {steps + WARM} --lr 1e-3 --optimizer adamw --mock-data
            --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --log-interval 1 --output-dir {folder}"""
        command = [sys.executable, "-m", "megatron_opt.pretrain", *flags.split(), *more]
        paths = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        if done.returncode:
            sys.exit(f"{' '.join(more) or 'bf16'} ended with {done.returncode}: {done.stderr[-2000:]}")
        entries = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [entry["step_time"] for entry in entries if entry["kind"] == "train"][WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES)
    options = parser.parse_args()
    wanted = {name: more for name, more in CONFIGURATIONS.items() if name not in RECIPES or name in options.only}
    found: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(options.repeats):
        for name, more in wanted.items():
            found[name] += seconds(options.size, more, options.steps)
    base = statistics.median(found["bf16"])
    print(f"{options.size}, one thread, AdamW, {options.steps} × {options.repeats} steps")
    print("| layers | step, ms | fastest to slowest | over the bf16 step |\n|---|---:|---:|---:|")
    for name, times in found.items():
        middle = statistics.median(times)
        print(
            f"| {name} | {middle * 1e3:.0f} | {min(times) * 1e3:.0f} to {max(times) * 1e3:.0f} | {middle / base:.2f} |"
        )


if __name__ == "__main__":
    main()
