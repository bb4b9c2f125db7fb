"""What can be known of the CUDA kernels without a GPU: they compile, each element belongs to one block."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("grid") / "driver"
    source = ROOT / "tests" / "kernels" / "grid_driver.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-Wall", "-Werror", source, "-o", program], check=True)

    def run(multiprocessors, resident, sizes):
        arguments = [program, *map(str, (multiprocessors, resident, *sizes))]
        lines = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
        return [int(word) for word in lines[0].split()], lines[1:]

    return run


@pytest.mark.parametrize("case", range(8))
def test_every_block_of_every_piece_is_done_once(driver, case):
    draw = random.Random(case)
    sizes = [draw.choice([0, 1, 2047, 2048, 2049, 4096, 10_000]) for _ in range(draw.choice([0, 1, 5, 300, 1200]))]
    (per_launch, block, size_of_batch, total), lines = driver(132, 6, sizes)
    assert block == 2048 and size_of_batch <= 32764
    seen, base_block, first = [], 0, 0
    for header, body in zip(lines[::2], lines[1::2]):
        base, count, begin, blocks, grid = map(int, header.split()[1:])
        assert (base, begin) == (first, base_block) and 0 < count <= per_launch
        assert grid == max(1, min(blocks, 132 * 6))
        assert len(body.split()) == blocks
        seen += [tuple(map(int, word.split(":"))) for word in body.split()]
        first, base_block = first + count, base_block + blocks
    assert first == len(sizes) and base_block == total
    assert seen == [(i, start) for i, size in enumerate(sizes) for start in range(0, size, 2048)]


def compile_for(*architectures):
    program = ROOT / "tools" / "compile_cuda.py"
    result = subprocess.run([sys.executable, program, *architectures], capture_output=True, text=True)
    if result.returncode == 3:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_compile_for_sm_90():
    compile_for("90")


@pytest.mark.slow
def test_kernels_compile_for_sm_80_and_sm_100():
    compile_for("80", "100")
