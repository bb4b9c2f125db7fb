"""The docs corpus: the manuals and one long book of Debian, one file a document."""

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_opt.data.html_text import html_to_text
from megatron_opt.data.packages import archive_files
from megatron_opt.data.read import Document
from megatron_opt.errors import UserError


@dataclass(frozen=True)
class Manual:
    """A package in any of its versions, that of Debian 12 first; `files` matches the paths of its texts."""

    package: re.Pattern[str]
    preferred: str
    licence: str
    files: re.Pattern[str]


# Translations of the kernel's manual are left out: they are of other scripts and repeat the English text.
MANUALS = (
    Manual(
        re.compile(r"linux-doc-\d+\.\d+"), "linux-doc-6.1", "GPL-2.0 (the Linux kernel documentation)",
        re.compile(r"/Documentation/(?!translations/).*\.(rst|txt)(\.gz)?$"),
    ),
    Manual(
        re.compile(r"python3\.\d+-doc"), "python3.11-doc", "PSF-2.0 (the Python manual)",
        re.compile(r"/html/_sources/.*\.rst\.txt$"),
    ),
    Manual(
        re.compile(r"anarchism"), "anarchism", "GPL-2.0 or GFDL-1.1 (An Anarchist FAQ)",
        re.compile(r"/markdown/.*\.md(\.gz)?$"),
    ),
    Manual(
        re.compile(r"postgresql-doc-\d+"), "postgresql-doc-15", "PostgreSQL licence (the PostgreSQL manual)",
        re.compile(r"/html/.*\.html$"),
    ),
)  # fmt: skip


def find_package(manual: Manual) -> str:
    """The name of the manual's package in this release: the preferred one, else the newest.

    Raises UserError without apt or when no version is known to it.
    """
    if shutil.which("apt-cache") is None:
        raise UserError("apt-cache is not here: this corpus needs Debian or Ubuntu; take --name small, or --input")
    stem = re.split(r"\\?\.?\\d", manual.package.pattern)[0].replace("\\", "")
    listed = subprocess.run(["apt-cache", "pkgnames", stem], capture_output=True, text=True, check=False).stdout
    names = {name for name in listed.split() if manual.package.fullmatch(name)}
    if not names:
        raise UserError(f"apt knows no package like {manual.preferred}; run `apt-get update`, or take --name small")
    if manual.preferred in names:
        return manual.preferred
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def read_manual(manual: Manual, archive: Path) -> Iterator[Document]:
    """Documents of a manual's package, HTML reduced to its text."""
    for name, data in archive_files(archive):
        if not manual.files.search(name):
            continue
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8", errors="replace")
        yield Document(html_to_text(text) if name.endswith(".html") else text, f"{manual.preferred}:{name}")
