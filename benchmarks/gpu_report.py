"""One command that measures a GPU and writes docs/gpu.md: correctness, optimizer steps, Newton–Schulz, training, low precision.

    python benchmarks/gpu_report.py [--parts correctness steps products training precision] [--limit 600] [--json FILE] [--docs FILE]

Each part has `--limit` seconds: it starts nothing after that, and says what it did not reach. It needs no network and installs
nothing; build the kernels first (`python setup.py build_ext --inplace` on a machine with nvcc). Results go to `build/gpu_report.json`,
part by part, and the tables between the markers of docs/gpu.md are made from that file. `--device cpu --smoke` runs every part on
tiny cases, to try the script itself: its numbers mean nothing and go to `--docs` only where that is given.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PEAKS = {
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "B200": 2250e12,
}  # dense bf16 FLOP/s, the vendor's
OPTIMIZERS = ("adam", "adamw", "muon", "soap", "kron")  # `adam` is Megatron's own
STEPS_AT = 3  # steps of a run that are not counted
PRECISIONS = {
    "bf16": [],
    "fp8 tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"],
    "fp8 delayed": ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"],
    "fp8 blockwise": ["--fp8-format", "hybrid", "--fp8-recipe", "blockwise"],
}


class Report:
    """What is known so far, on disk after every measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found = args, {"machine": machine(args.device), "smoke": args.smoke}
        self.ends = 0.0
        self.python = [sys.executable]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if args.device == "cpu":
            self.environment["MEGATRON_OPT_GPU_TESTS"] = "cpu"

    def start(self, part: str) -> None:
        """A part's clock."""
        self.ends = time.monotonic() + self.args.limit
        print(f"== {part}", flush=True)

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.ends - time.monotonic()

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str] | None:
        """A command of Python's, or None where the part's time is over."""
        if self.left() < 5:
            return None
        try:
            return subprocess.run(
                [*self.python, *map(str, words)], cwd=ROOT, env=self.environment, capture_output=True, text=True,
                timeout=self.left(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None

    def write(self, part: str, value: Any) -> None:
        """Keep a part's result."""
        self.found[part] = value
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(self.found, indent=1))


def machine(device: str) -> dict[str, Any]:
    """Card, clocks and versions."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = (
        "megatron-core",
        "transformer-engine",
        "triton",
        "emerging-optimizers",
        "heavyball",
        "pytorch-optimizer",
    )
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: of(package) for package in packages},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        if shutil.which("nvidia-smi"):
            query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            said = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            found |= dict(zip(query.split(","), (said.splitlines() or [""])[0].split(", "), strict=False))
    else:
        found["card"] = f"none: {platform.processor() or 'CPU'}, {os.cpu_count()} cores"
    from megatron_opt.kernels.dispatch import native_available

    found["native kernels"] = native_available(device)
    return found


def correctness(report: Report) -> Any:
    """tests/gpu."""
    wanted = ["-k", "random_bits or symmetric or (twenty and adamw)"] if report.args.smoke else []
    done = report.run("-m", "pytest", "-o", "addopts=", "-q", "-rfE", "tests/gpu", "-p", "no:cacheprovider", *wanted)
    if done is None:
        return {"unreached": "tests/gpu took longer than the limit"}
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    if not counts:
        return {"code": done.returncode, "unreached": _last(done)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", done.stdout, re.MULTILINE)
    return {"code": done.returncode, **counts, "failures": [" ".join(pair) for pair in failed]}


def steps(report: Report) -> Any:
    """Optimizer steps beside peers."""
    cases = ["tiny"] if report.args.smoke else ["130m", "300m", "1b"]
    optimizers = (
        ["adamw", "muon"] if report.args.smoke else ["adamw", "lion", "mars", "cautious", "muon", "soap", "kron"]
    )
    found: dict[str, Any] = {"rows": [], "unreached": []}
    for case in cases:
        for optimizer in optimizers:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "steps.json"
                rounds = ["--rounds", "1"] if report.args.smoke else []
                words = [
                    "--device",
                    report.args.device,
                    "--cases",
                    case,
                    "--rules",
                    optimizer,
                    "--json",
                    target,
                    *rounds,
                ]
                done = report.run("benchmarks/optimizer_step.py", *words)
                if done is None or done.returncode:
                    found["unreached"].append(f"{optimizer} on {case}: {_last(done)}")
                    continue
                measured = json.loads(target.read_text())
                found["rows"] += measured.pop("rows")
                found["ceilings"] = measured
        report.write("steps", found)
    return found


def products(report: Report) -> Any:
    """Newton–Schulz against the rate of a large product, both measured here."""
    from megatron_opt.kernels import orthogonalize as ns

    device = torch.device(report.args.device)
    table = ns.coefficients("quintic", 5)
    side = 512 if report.args.smoke else 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    ceiling = 2 * side**3 / _seconds(lambda: a @ a, device)
    rows = []
    for k in (64,) if report.args.smoke else (512, 1024, 2048, 4096):
        for aspect in (1, 2.7, 4):
            for count in (1, 8):
                K = int(k * aspect) // 8 * 8
                if report.left() < 5 or count * k * K > 2**29:
                    continue
                matrices = [torch.randn(k, K, device=device) for _ in range(count)]
                seconds = _seconds(
                    lambda matrices=matrices: ns.orthogonalize(matrices, table, precision="medium"), device
                )
                rate = count * ns.flops(k, K, table, "medium") / seconds
                rows.append(
                    {"k": k, "K": K, "count": count, "ms": 1e3 * seconds, "flops_per_s": rate, "share": rate / ceiling}
                )
    return {"ceiling": ceiling, "rows": rows}


def _seconds(function: Any, device: torch.device) -> float:
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def _model(report: Report, name: str) -> list[str]:
    if report.args.smoke:
        small = "--preset llama --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32"
        return [*small.split(), "--micro-batch-size", "2", "--global-batch-size", "4", "--vocab-size", "127"]
    batch = ["--seq-length", "4096", "--micro-batch-size", "8", "--global-batch-size", "128"]  # half a million tokens
    return ["--preset", f"llama-{name}", *batch, "--vocab-size", "31999"]


def train(report: Report, name: str, flags: list[str], steps: int) -> dict[str, Any]:
    """One run of the job: tokens/s, MFU, the optimizer's share of a step, losses."""
    with tempfile.TemporaryDirectory() as folder:
        words = (
            f"--mock-data --tokenizer-type NullTokenizer --bf16 --lr 1e-3 --lr-warmup-iters 2 --train-iters {steps} "
        )
        words += f"--eval-iters 0 --eval-interval 1000000 --log-interval 1 --output-dir {folder}"
        done = report.run("-m", "megatron_opt.pretrain", *_model(report, name), *words.split(), *flags)
        if done is None or done.returncode:
            return {"unreached": _last(done)}
        entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((Path(folder) / "results.json").read_text())
    entries = [entry for entry in entries if entry["kind"] == "train"]
    seconds = statistics.median(entry["step_time"] for entry in entries[STEPS_AT:])
    optimizer = statistics.median(entry["split"]["optimizer"] for entry in entries[STEPS_AT:])
    tokens = results["tokens"] / len(entries)
    flops = results["flops_per_s"] * results["train_time_s"] / len(entries)
    peak = next((value for key, value in PEAKS.items() if key in str(report.found["machine"]["card"])), None)
    return {
        "tokens_per_s": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "optimizer_ms": 1e3 * optimizer,
        "optimizer_share": optimizer / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "peak_memory_gb": results["peak_memory_bytes"] / 1e9,
        "losses": [round(entry["loss"], 6) for entry in entries],
    }


def training(report: Report) -> Any:
    """Whole training steps beside Megatron's own adam."""
    found: dict[str, Any] = {}
    count = 5 if report.args.smoke else 12
    implementation = ["--transformer-impl", "local"] if report.args.device == "cpu" or not _has_te() else []
    for name in ("smoke",) if report.args.smoke else ("130m", "300m"):
        for optimizer in OPTIMIZERS:
            found[f"{name} {optimizer}"] = train(report, name, ["--optimizer", optimizer, *implementation], count)
            report.write("training", found)
    return found


def precision(report: Report) -> Any:
    """Transformer Engine's layers in bf16 and FP8, Muon, losses beside each other."""
    if not _has_te():
        return {"unreached": "transformer-engine is not installed"}
    found = {}
    more = ["--optimizer", "muon", "--transformer-impl", "transformer_engine"]
    for name, flags in PRECISIONS.items():
        if report.args.device == "cpu" and "blockwise" in name:
            continue  # not emulated
        found[name] = train(report, "300m", [*more, *flags], 5 if report.args.smoke else 20)
        report.write("precision", found)
    return found


def _has_te() -> bool:
    from importlib.util import find_spec

    return find_spec("transformer_engine") is not None


def _last(done: subprocess.CompletedProcess[str] | None) -> str:
    """Why there is no result, in a line."""
    if done is None:
        return "out of time"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return f"exit code {done.returncode}: {lines[-1][:200] if lines else ''}"


PARTS = {"correctness": correctness, "steps": steps, "products": products, "training": training, "precision": precision}


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Markdown by marker."""
    made = {
        "machine": "\n".join(
            ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in found["machine"].items() if v is not None)]
        )
    }
    if "correctness" in found:
        made["correctness"] = "\n".join(
            ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in found["correctness"].items() if k != "failures")]
            + [f"| failed | {line} |" for line in found["correctness"].get("failures", [])]
        )
    if "steps" in found:
        lines = [
            "| rule | case | ours, ms | peers, ms | fastest peer / ours | bound, ms |",
            "|---|---|---|---|---|---|",
        ]
        for row in found["steps"]["rows"]:
            peers = {name: ms for name, ms in row["peers"].items()}
            listed = (
                ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(peers.items(), key=lambda item: item[1])) or "–"
            )
            ratio = f"{min(peers.values()) / row['ours']:.2f}" if peers else "–"
            lines.append(
                f"| {row['rule']} | {row['case']} | {row['ours']:.2f} | {listed} | {ratio} | {row['bound']:.2f} |"
            )
        made["steps"] = "\n".join([*lines, *(f"| {line} | | | | | |" for line in found["steps"]["unreached"])])
    if "products" in found:
        ceiling = found["products"]["ceiling"]
        lines = [f"| k × K, matrices | ms | TFLOP/s | of {ceiling / 1e12:.3g} measured |", "|---|---|---|---|"]
        for row in found["products"]["rows"]:
            shape = f"{row['k']} × {row['K']}, {row['count']}"
            lines.append(f"| {shape} | {row['ms']:.2f} | {row['flops_per_s'] / 1e12:.3g} | {row['share']:.0%} |")
        made["products"] = "\n".join(lines)
    for part in ("training", "precision"):
        if part in found and "unreached" not in found[part]:
            lines = [
                "| run | tokens/s | MFU | step, ms | optimizer | peak GB | last loss |",
                "|---|---|---|---|---|---|---|",
            ]
            for name, row in found[part].items():
                if "unreached" in row:
                    lines.append(f"| {name} | {row['unreached']} | | | | | |")
                    continue
                mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
                share = f"{row['optimizer_ms']:.1f} ms, {row['optimizer_share']:.1%}"
                cells = [name, f"{row['tokens_per_s']:,.0f}", mfu, f"{row['step_ms']:.1f}", share]
                lines.append(f"| {' | '.join([*cells, f'{row["peak_memory_gb"]:.1f}', str(row['losses'][-1])])} |")
            made[part] = "\n".join(lines)
        elif part in found:
            made[part] = found[part]["unreached"]
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """A page with the tables between its markers `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"the page has no marker <!-- {name} -->")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, to try the script itself")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--limit", type=float, default=570.0, help="seconds of each part")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu_report.json")
    parser.add_argument("--docs", type=Path, help="page to fill; docs/gpu.md on a GPU")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_report: there is no CUDA device; --device cpu --smoke tries the script.", file=sys.stderr)
        return 2
    if args.device == "cpu" and not args.smoke:
        print("gpu_report: on the CPU give --smoke too: only the script itself can be tried there.", file=sys.stderr)
        return 2
    docs = args.docs or (ROOT / "docs" / "gpu.md" if args.device == "cuda" else None)
    report = Report(args)
    for part in args.parts:
        report.start(part)
        report.write(part, PARTS[part](report))
    made = tables(report.found)
    if docs is not None:
        docs.write_text(fill(docs.read_text(encoding="utf-8"), made), encoding="utf-8")
    for name, table in made.items():
        print(f"\n{name}\n{table}")
    failed = report.found.get("correctness", {}).get("code", 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
