"""Compiles the CUDA kernels to object files, without a GPU: `python tools/compile_cuda.py [80 90 100]`."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(architectures: list[str]) -> int:
    """Exit code 0 if every file compiles for every architecture, 3 without nvcc or its headers."""
    home, headers = runpy.run_path(str(ROOT / "setup.py"))["cuda_toolkit"]()
    if headers is None:
        print(f"compile_cuda: {'nvcc' if home is None else 'cuda_runtime.h'} was not found")
        return 3
    codes = [flag for a in architectures for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-Wall", "-Werror=all-warnings"]
    with tempfile.TemporaryDirectory() as out:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            target = Path(out) / f"{source.stem}.o"
            command = [home / "bin" / "nvcc", *flags, *codes, f"-I{headers}", "-c", source, "-o", target]
            if subprocess.run(command).returncode:
                return 1
            print(f"{source.relative_to(ROOT)}: sm_{', sm_'.join(architectures)}, {target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["90"]))
