"""Builds `megatron_opt._C` from csrc: C++ always, CUDA where it is asked for or a GPU is there to run it.

MEGATRON_OPT_CUDA=1 builds the CUDA kernels without a GPU, MEGATRON_OPT_CUDA=0 leaves them out;
TORCH_CUDA_ARCH_LIST chooses the architectures (default 8.0, 9.0, 10.0 and the PTX of the last).
"""

import os
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).resolve().parent
HEADER = "cuda_runtime.h"


def cuda_toolkit() -> tuple[Path | None, Path | None]:
    """(CUDA_HOME, folder with the headers): nvcc's own, or those of the nvidia pip packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not nvcc.exists():
        return None, None
    site = Path(sysconfig.get_paths()["purelib"])
    homes = [nvcc.parent.parent, nvcc.resolve().parent.parent, Path("/usr/local/cuda")]
    packages = sorted(site.glob("nvidia/*"))
    for folder in [*homes, *packages]:
        if (folder / "include" / HEADER).exists():
            return nvcc.parent.parent, folder / "include"
    return nvcc.parent.parent, None


def cuda_wanted(home: Path | None, headers: Path | None) -> bool:
    """Whether to build the CUDA kernels; says why in one line where the answer may surprise."""
    switch = os.environ.get("MEGATRON_OPT_CUDA")
    if switch == "0":
        return False
    missing = "nvcc" if home is None else HEADER if headers is None else None
    if torch.version.cuda is None:
        missing = "a CUDA build of torch"
    if switch == "1" and missing:
        raise SystemExit(f"setup.py: MEGATRON_OPT_CUDA=1, but {missing} was not found.")
    if switch == "1" or (not missing and torch.cuda.is_available()):
        return True
    why = f"{missing} was not found" if missing else "no GPU here; MEGATRON_OPT_CUDA=1 builds them all the same"
    print(f"setup.py: leaving the CUDA kernels out ({why}).", file=sys.stderr)
    return False


def extension():
    home, headers = cuda_toolkit()
    with_cuda = cuda_wanted(home, headers)
    if with_cuda:
        os.environ["CUDA_HOME"] = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    digest = runpy.run_path(str(ROOT / "megatron_opt" / "kernels" / "source_hash.py"))["source_hash"](ROOT / "csrc")
    macros = [
        ("MEGATRON_OPT_SOURCE_HASH", f'"{digest}"'),
        ("MEGATRON_OPT_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    sources = [
        *sorted(map(str, Path("csrc").glob("*.cpp"))),
        *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
    ]
    # Without errno and floating-point traps square roots and selects are vectorised; results stay IEEE.
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-g0"]
    for folder, name in (
        (ROOT, "."),
        (Path(torch.__file__).parent, "torch"),
    ):  # messages name no path of this machine
        cxx.append(f"-ffile-prefix-map={folder}={name}")
    options = {"include_dirs": [], "extra_link_args": ["-fopenmp", "-s"], "define_macros": macros}
    compile_args = {"cxx": cxx}
    if not with_cuda:
        return CppExtension("megatron_opt._C", sources, extra_compile_args=compile_args, **options)
    compile_args["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-Wall"]
    sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    options["define_macros"] = [*macros, ("MEGATRON_OPT_WITH_CUDA", None)]
    options["include_dirs"] = [str(headers)]
    module = CUDAExtension("megatron_opt._C", sources, extra_compile_args=compile_args, **options)
    module.libraries.remove("cudart")  # torch's own is loaded already, and pip's has no name to link by
    return module


if __name__ == "__main__":
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
