"""What can be known of the CUDA kernels without a GPU: they compile, each element belongs to one block."""

import functools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_opt.kernels import symmetric

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("grid") / "driver"
    source = ROOT / "tests" / "kernels" / "grid_driver.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-Wall", "-Werror", source, "-o", program], check=True)

    def run(*arguments):
        words = [program, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def pairs(line):
    return [tuple(map(int, word.split(":"))) for word in line.split()]


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256, 1000, 4096])
def test_every_tile_of_the_triangle_is_done_once(driver, size):
    (header, line), across = driver("triangle", size), -(-size // 128)
    assert header == f"128 {across * (across + 1) // 2}"
    assert pairs(line) == [(row, column) for row in range(across) for column in range(row + 1)]


def test_tiles_are_found_at_the_ends_of_long_rows(driver):
    for row in (1, 2, 3, 1000, 30_000, 60_000):
        first = row * (row + 1) // 2
        for number, expected in ((first, (row, 0)), (first - 1, (row - 1, row - 1)), (first + row, (row, row))):
            assert tuple(map(int, driver("place", number)[0].split())) == expected


def test_every_block_of_adam_mini_is_done_once(driver):
    draw = random.Random(0)
    pieces = [(count * 7, count) for count in (draw.choice([0, 1, 3, 40]) for _ in range(200))]
    lines = driver("blocks", *(number for piece in pieces for number in piece))
    assert pairs(lines[0]) == [(i, block) for i, (_, count) in enumerate(pieces) for block in range(count)]


def test_symmetric_products_go_where_they_are_faster():
    form = functools.partial(symmetric.form, torch.bfloat16, "cuda")
    assert form(8, (3, 64, 100), True, True) == "native" and form(8, (64, 100), False, True) == "full"
    assert form(9, (64, 128), True, True) == "library" and form(10, (64, 128), True, False) == "full"
    assert form(9, (2, 64, 128), True, True) == "full" and form(9, (64, 100), True, True) == "full"
    assert form(9, (2, 1024, 4096), True, True) == "library" and form(9, (2, 1024, 4100), True, True) == "full"
    assert symmetric.form(torch.float32, "cuda", 8, (64, 64), True, True) == "full"
    assert symmetric.form(torch.bfloat16, "cpu", 0, (64, 64), True, True) == "full"


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("added", [False, True])
def test_a_librarys_product_takes_a_batch_one_by_one(lead, added, monkeypatch):
    def library(a, d, alpha, beta):
        assert a.ndim == 2 and a.is_contiguous()
        return alpha * (a @ a.T) + (0 if d is None else beta * d)

    monkeypatch.setattr(symmetric, "form", lambda *asked: "library")
    monkeypatch.setattr(symmetric, "_library", lambda: library)
    a = torch.randn(*lead, 6, 10, dtype=torch.float64)
    d = torch.randn(*lead, 6, 6, dtype=torch.float64) if added else None
    exact = 0.5 * (a @ a.mT) + (2.0 * d if added else 0)
    torch.testing.assert_close(symmetric.symmetric_product(a, d, 0.5, 2.0 if added else 0.0), exact)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_symmetric_products_are_the_explicit_ones(lead):
    torch.manual_seed(0)
    a = torch.randn(*lead, 5, 7, dtype=torch.float64)
    d = a @ a.mT
    torch.testing.assert_close(symmetric.symmetric_product(a, alpha=0.5), 0.5 * (a @ a.mT))
    torch.testing.assert_close(symmetric.symmetric_product(a, d, 0.5, -2.0), 0.5 * (a @ a.mT) - 2 * d)


@pytest.mark.parametrize("case", range(8))
def test_every_block_of_every_piece_is_done_once(driver, case):
    draw = random.Random(case)
    sizes = [draw.choice([0, 1, 2047, 2048, 2049, 4096, 10_000]) for _ in range(draw.choice([0, 1, 5, 300, 1200]))]
    header, *lines = driver(132, 6, *sizes)
    per_launch, block, size_of_batch, total = map(int, header.split())
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
