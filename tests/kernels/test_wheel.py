"""A wheel built from the sources without CUDA: what is in it, no path of the machine, and it works where it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "megatron_opt")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
PROGRAM = """
import torch
from megatron_opt import _C
from megatron_opt.kernels import dispatch, multi_tensor as mt
assert dispatch.native_available() and not _C.cuda
p = [torch.ones(3)]
mt.update(mt.UpdateKind.APPLY, p, [torch.ones(3)], (), mt.Coefficients(lr=0.25))
print(p[0].tolist(), _C.__file__)
"""


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    environment = os.environ | {"MEGATRON_OPT_CUDA": "0", "MAX_JOBS": "1"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--wheel-dir", tmp_path, source, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    found = {name: zipfile.ZipFile(wheel).read(name) for name in zipfile.ZipFile(wheel).namelist()}
    ours = {str(path.relative_to(source)) for path in (source / "megatron_opt").rglob("*.*") if path.is_file()}
    assert ours <= set(found) and sum(name.startswith("megatron_opt/_C.") for name in found) == 1
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in found)
    site = str(Path(torch.__file__).parents[1])
    for name, content in found.items():
        for path in (str(ROOT), str(tmp_path), site, sys.prefix, str(Path.home()) + "/"):
            assert path.encode() not in content, f"{name} names {path}"
    target = tmp_path / "installed"
    run(*pip, "install", *offline, "--target", target, wheel, env=environment)
    environment |= {"PYTHONPATH": str(target), "MEGATRON_OPT_KERNELS": "native"}
    output = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, env=environment)
    assert output.startswith("[0.75, 0.75, 0.75]") and str(target) in output
