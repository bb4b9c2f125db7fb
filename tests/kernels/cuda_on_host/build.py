"""Compiles csrc/cuda with a host compiler into a module that stands in for megatron_opt._C: `python build.py FOLDER`."""

import re
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
_LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\(", re.S)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];")
_SHARED = re.compile(r"__shared__ (\w+) (\w+)((?:\[[^\]]*\])+);")
_BY_VALUE = re.compile(r"const __grid_constant__ (\w+) (\w+)")


def rewritten(source: str) -> str:
    """What a host compiler cannot read in CUDA source, as calls of cuda_on_host.h."""
    source = _LAUNCH.sub(r"::on_host::run(::on_host::Config{\2}, \1, ", source)
    source = _DYNAMIC.sub(r"unsigned char* \1 = ::on_host::dynamic_shared();", source)
    source = _SHARED.sub(r"struct Shared_\2;\n  auto& \2 = ::on_host::shared<\1\3, Shared_\2>();", source)
    for kind in {kind for kind, _ in _BY_VALUE.findall(source)}:  # one copy a launch instead of one a thread
        source = re.sub(rf"(\(\*\)\()({kind})\b", r"\1const \2&", source)
    source = _BY_VALUE.sub(r"const \1& \2", source)
    if left := re.findall(r"<<<|__shared__|__grid_constant__|__constant__|asm\b", source):
        raise SystemExit(f"build.py does not rewrite {left[0]}")
    return source


def build(folder: Path) -> Path:
    """The module's path; nothing is done where it is there already."""
    import torch
    from torch.utils import cpp_extension

    target = folder / "_C.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    digest = runpy.run_path(str(ROOT / "megatron_opt/kernels/source_hash.py"))["source_hash"](ROOT / "csrc")
    sources = [
        folder / f"{path.stem}_cu.cpp" for path in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "race.cu"]
    ]
    for path in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "race.cu"]:
        text = f'#line 1 "{path.relative_to(ROOT)}"\n{rewritten(path.read_text())}'
        (folder / f"{path.stem}_cu.cpp").write_text(text)
    operators = (ROOT / "csrc/operators.cpp").read_text().replace(".is_cuda()", ".is_cpu()")
    (folder / "operators.cpp").write_text(operators)
    sources += [folder / "operators.cpp", HERE / "module.cpp"]
    includes = [HERE / "include", HERE, ROOT / "csrc", ROOT / "csrc/cuda", sysconfig.get_paths()["include"]]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-attributes",
        "-DMEGATRON_OPT_WITH_CUDA",
        "-U_FORTIFY_SOURCE",
    ]
    flags += [f'-DMEGATRON_OPT_SOURCE_HASH="{digest}"', f'-DMEGATRON_OPT_TORCH_VERSION="{torch.__version__}"']
    flags += [f"-I{path}" for path in includes] + [f"-isystem{path}" for path in cpp_extension.include_paths()]
    checks = [
        "-fsanitize=alignment,bounds,shift,signed-integer-overflow",
        "-fno-sanitize-recover=all",
        "-static-libubsan",
    ]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        more = checks[:2] if source.stem.endswith("_cu") else []
        subprocess.run(["c++", *flags, *more, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = cpp_extension.library_paths()
    link = [f"-L{path}" for path in libraries] + ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    unfinished = folder / "unfinished.so"
    subprocess.run(["c++", "-shared", *checks, *objects, *link, "-o", unfinished], check=True)
    unfinished.rename(target)
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
