"""The CUDA kernels on this processor: every test of the CPU kernels, then what only threads and blocks can get wrong.

What such a run cannot show: speed, the rounding of real tensor cores, the memory model of a GPU within a barrier interval.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cuda_on_host import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = ["test_multi_tensor.py", "test_block_adam.py", "test_quantize.py"]
LEFT_OUT = [
    "test_multi_tensor.py::test_other_instruction_sets_agree",  # of the CPU
    "test_block_adam.py::test_any_number_of_threads_gives_the_same_bits",  # 90 s of barriers; orders are tried below
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    module = build.build(tmp_path_factory.mktemp("cuda_on_host"))
    return os.environ | {"CUDA_ON_HOST": str(module), "PYTHONPATH": str(ROOT)}


def run(environment, *command):
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=540
    )


def test_tests_of_the_cpu_kernels_hold_for_the_cuda_kernels(environment):
    paths = [str(HERE / name) for name in TESTS]
    plugin = ["-p", "tests.kernels.cuda_on_host.plugin", "-p", "no:cacheprovider"]
    left_out = [word for name in LEFT_OUT for word in ("--deselect", f"tests/kernels/{name}")]
    done = run(environment, "-m", "pytest", *plugin, *paths, *left_out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 60 and "skipped" not in done.stdout, done.stdout[-300:]


PRELUDE = """
import sys
sys.path.insert(0, "tests/kernels")
from tests.kernels.cuda_on_host import plugin
import torch, test_multi_tensor as t, test_block_adam as b
from megatron_opt.kernels.dispatch import native_available
native = plugin.module
assert native_available()
"""


def check(environment, program):
    done = run(environment, "-c", PRELUDE + program)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_races_and_lost_threads_are_seen(environment):
    check(
        environment,
        """
x = torch.arange(64.0)
for seed in range(20):
    native.shuffle(seed)
    y = x.clone()
    native.reverse(y.data_ptr(), 2)
    assert torch.equal(y, x.flip(0))
wrong = 0
for seed in range(20):
    native.shuffle(seed)
    y = x.clone()
    native.reverse(y.data_ptr(), 1)
    wrong += not torch.equal(y, x.flip(0))
assert wrong == 20, wrong
try:
    native.reverse(x.data_ptr(), 3)
except RuntimeError as error:
    assert "barrier" in str(error)
else:
    raise AssertionError("a barrier that half of the threads miss was passed over")
""",
    )


def test_no_order_of_threads_and_blocks_changes_a_bit(environment):
    check(
        environment,
        """
types = [torch.float32, torch.bfloat16, torch.float32]
for rule in t.UpdateKind:
    results = []
    for seed in range(4):
        native.shuffle(seed)
        results.append(t.run(t.problem(rule, [5000, 3, 0, 2048], types), stochastic=True, seed=3, step=2))
    for tensors, sums in results[1:]:
        assert torch.equal(sums, results[0][1])
        assert all(torch.equal(x, y) for x, y in zip(tensors, results[0][0], strict=True))
shapes = [(5, 700), (1, 3000), (40, 7)]
results = []
for seed in range(4):
    native.shuffle(seed)
    results.append(b.run(b.problem(shapes, offset=1)))
assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r, results[0], strict=True))
""",
    )


def test_more_tensors_than_a_launch_takes_and_none_written_beside(environment):
    check(
        environment,
        """
from megatron_opt.kernels import multi_tensor as mt
for rule in (t.UpdateKind.ADAM, t.UpdateKind.APPLY, t.UpdateKind.MOMENTUM):
    sizes = [1 + i % 5 for i in range(700)]
    before = native.launches()
    arguments = t.problem(rule, sizes, [torch.float32, torch.bfloat16, torch.float32])
    ours, sums = t.run(arguments)
    assert native.launches() - before > 4  # two or more of updates and of sums
    wide = t.mapped(torch.Tensor.double, arguments)
    wide["copies"] = arguments["copies"] if rule != t.UpdateKind.MOMENTUM else wide["copies"]
    theirs, wide_sums = t.run(wide)
    for x, y in zip(ours, theirs, strict=True):
        tolerance = 2e-6 if x.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance / 4)
    torch.testing.assert_close(sums, wide_sums, rtol=1e-6, atol=0)

guards = []  # each tensor within a larger one whose ends must stay as they are
def guarded(x, offset):
    room = torch.full((x.numel() + 64 + offset,), -7.0, dtype=x.dtype)
    inside = room[32 + offset : 32 + offset + x.numel()]
    inside.copy_(x)
    guards.append((room, 32 + offset, x.numel()))
    return inside
for rule in t.UpdateKind:
    for offset in range(4):
        p = t.problem(rule, [2049, 1, 7], [torch.float32, torch.bfloat16, torch.bfloat16])
        p = {k: [guarded(x, offset) for x in v] if k in ("params", "grads", "copies") else v for k, v in p.items()}
        p["states"] = [[guarded(x, offset) for x in s] for s in p["states"]]
        mt.update(p["kind"], p["params"], p["grads"], p["states"], t.COEFFICIENTS, copies=p["copies"], with_sums=True)
for room, begin, size in guards:
    assert (room[:begin] == -7).all() and (room[begin + size :] == -7).all()
    assert not room[begin : begin + size].isnan().any()
""",
    )


def test_symmetric_products_are_float64s(environment):
    """Tails in n and k, rows that allow 16-byte copies or not, addresses off by one element, with and without D."""
    check(
        environment,
        """
torch.manual_seed(0)
for batch, n, k, shift in ((1, 5, 7, 0), (2, 128, 32, 0), (1, 130, 40, 0), (1, 129, 72, 1), (2, 16, 100, 0), (1, 260, 96, 0)):
    for with_d in (False, True):
        native.shuffle(n + k + with_d)
        room = torch.randn(batch * n * k + shift + 8, dtype=torch.bfloat16)
        start = shift + (-room.data_ptr() // 2) % 8
        a = room[start : start + batch * n * k].view(batch, n, k)
        d = torch.randn(batch, n, n)
        d = (d + d.mT).bfloat16()
        out = torch.full((batch, n, n), float("nan"), dtype=torch.bfloat16)
        native.symmetric(a.data_ptr(), d.data_ptr() if with_d else 0, out.data_ptr(), batch, n, k, 0.5, -2.0)
        exact = 0.5 * (a.double() @ a.double().mT) - (2.0 * d.double() if with_d else 0.0)
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)
        assert torch.equal(out, out.mT)
""",
    )


def test_what_is_not_emulated_is_not_compiled():
    with pytest.raises(SystemExit, match="asm"):
        build.rewritten('__global__ void f() { asm volatile("nanosleep.u32 20;"); }')
    with pytest.raises(SystemExit, match="__shared__"):
        build.rewritten("__shared__ Some<int> x[3];")
    assert "run(::on_host::Config{1, 2}, f, x" in build.rewritten("f<<<1, 2>>>(x);")
