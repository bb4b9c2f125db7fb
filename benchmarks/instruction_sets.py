#!/usr/bin/env python3
"""Steps of our rules by instruction set, native kernels beside plain torch, on one machine with AVX-512.

AVX2 is emulated: MKL, ATen, oneDNN, OpenBLAS and the extension are told to use nothing above it. Every column is a process of its
own (`optimizer_step.py --share`); they take turns, and a figure is the least over the turns, since other jobs only make it larger.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

AVX2 = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "MEGATRON_OPT_ISA": "avx2",
}
COLUMNS = {
    "AVX-512 native": {"MEGATRON_OPT_KERNELS": "native"},
    "AVX-512 torch": {"MEGATRON_OPT_KERNELS": "reference"},
    "AVX2 native": {"MEGATRON_OPT_KERNELS": "native", **AVX2},
    "AVX2 torch": {"MEGATRON_OPT_KERNELS": "reference", **AVX2},
}


def run(environment: dict[str, str], words: list[str]) -> dict[tuple[str, str], float]:
    """Milliseconds a step by (rule, case), in a process with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "times.json"
        script = str(Path(__file__).with_name("optimizer_step.py"))
        command = [sys.executable, script, "--share", "--tokens", "1024", "--json", str(target), *words]
        subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
        return {(row["rule"], row["case"]): row["ours"] for row in json.loads(target.read_text())["rows"]}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["adamw", "adam_mini", "muon", "muon_fp32", "soap", "kron"])
    parser.add_argument("--cases", nargs="+", default=["layer", "small"])
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    words = ["--rules", *args.rules, "--cases", *args.cases, "--rounds", str(args.rounds)]
    best: dict[str, dict[tuple[str, str], float]] = {name: {} for name in args.columns}
    for _ in range(args.turns):
        for name in args.columns:
            for key, value in run(COLUMNS[name], words).items():
                best[name][key] = min(value, best[name].get(key, value))
    print(f"| rule | case | {' | '.join(best)} |\n|---|---|{'---|' * len(best)}")
    for key in best[args.columns[0]]:
        print(f"| {' | '.join(key)} | {' | '.join(f'{times[key]:.1f}' for times in best.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
