"""What FP8 costs where Transformer Engine is emulated: processor time of a step in each recipe against a bf16 step on the CPU.

One process and one thread each, the same model and tokens, configurations in turn in every repeat; medians over steps. Seconds are
those that the process has computed, so that other work on the machine counts little.
usage: python benchmarks/fp8_emulation.py [--size 10M] [--steps 5] [--repeats 3] [--only mxfp8 …]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
JOB = "--job"


def seconds(size: str, more: list[str], steps: int) -> list[float]:
    """Processor seconds of each step of a job after the first ones."""
    layers, hidden, ffn, heads, sequence, batch = SIZES[size]
    flags = f"""--preset llama --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
        --num-attention-heads {heads} --seq-length {sequence} --micro-batch-size {batch} --bf16
        --global-batch-size {batch} --train-iters {steps + WARM} --lr 1e-3 --optimizer adamw --mock-data
        --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --log-interval 1"""
    paths = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, __file__, JOB, file.name, *flags.split(), *more]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        if done.returncode:
            sys.exit(f"{' '.join(more) or 'bf16'} ended with {done.returncode}: {done.stderr[-2000:]}")
        times = list(map(float, Path(file.name).read_text().split()))
    return [after - before for before, after in zip(times, times[1:])][WARM - 1 :]


def job(file: str, argv: list[str]) -> int:
    """Train with these flags; writes the processor time of this process after every step, a line each."""
    from megatron_opt import pretrain
    from megatron_opt.training import monitoring

    step = monitoring.Monitor.on_step

    def on_step(*given: Any, **named: Any) -> None:
        step(*given, **named)
        with open(file, "a") as stream:
            stream.write(f"{time.process_time()}\n")

    monitoring.Monitor.on_step = on_step
    return pretrain.main(argv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES)
    options = parser.parse_args()
    wanted = {name: more for name, more in CONFIGURATIONS.items() if name not in RECIPES or name in options.only}
    results: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(options.repeats):
        for name, more in wanted.items():
            results[name] += seconds(options.size, more, options.steps)
    base = statistics.median(results["bf16"])
    print(f"{options.size}, one thread, AdamW, {options.steps} × {options.repeats} steps")
    print("| layers | processor ms a step | fastest to slowest | over the bf16 step |\n|---|---:|---:|---:|")
    for name, times in results.items():
        middle = statistics.median(times)
        print(
            f"| {name} | {middle * 1e3:.0f} | {min(times) * 1e3:.0f} to {max(times) * 1e3:.0f} | {middle / base:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(job(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == [JOB] else main())
