"""A report as blocks, written as Markdown and as one HTML page without outside resources."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources


@dataclass
class Table:
    """Rows of text under a head; columns from the second on are right-aligned where they are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Chart:
    """An SVG drawing and the sentence that says the same in words."""

    svg: str
    caption: str


@dataclass
class Items:
    """A list of sentences; with `marks`, a word before each (a severity, say)."""

    sentences: Sequence[str]
    marks: Sequence[str] = ()


@dataclass
class Code:
    """A command line."""

    text: str


Block = str | Table | Chart | Items | Code


@dataclass
class Section:
    """A heading and what is under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """A title, the verdict that stands first, and sections."""

    title: str
    verdict: str
    verdict_kind: str  # good, wait, bad
    facts: list[tuple[str, str]]
    sections: list[Section]

    def markdown(self) -> str:
        """The whole report as Markdown."""
        lines = [f"# {self.title}", "", f"**{self.verdict}**", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts]
        for section in self.sections:
            lines += ["", f"## {section.title}", ""]
            for block in section.blocks:
                lines += [*_markdown(block), ""]
            lines.pop()
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """The whole report as one HTML page."""
        facts = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in self.facts)
        body = "".join(
            f"<section><h2>{_e(section.title)}</h2>{''.join(map(_html, section.blocks))}</section>"
            for section in self.sections
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_e(self.title)}</title><style>{_style()}</style></head><body><main>"
            f"<h1>{_e(self.title)}</h1><p class='verdict {self.verdict_kind}'>{_e(self.verdict)}</p>"
            f"<dl>{facts}</dl>{body}</main></body></html>\n"
        )


def _style() -> str:
    return (resources.files("megatron_opt") / "migrate" / "page.css").read_text(encoding="utf-8")


def _e(text: str) -> str:
    return html.escape(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(block: Block) -> list[str]:
    if isinstance(block, str):
        return [block]
    if isinstance(block, Table):
        rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in (block.head, *block.rows)]
        return [rows[0], "|" + "|".join(["---"] + ["---:"] * (len(block.head) - 1)) + "|", *rows[1:]]
    if isinstance(block, Items):
        marks = block.marks or [""] * len(block.sentences)
        return [f"- {f'**{mark}**: ' if mark else ''}{text}" for mark, text in zip(marks, block.sentences, strict=True)]
    if isinstance(block, Code):
        return ["```sh", block.text, "```"]
    return [f"*{block.caption}*"]


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_e(block)}</p>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_e(cell)}</th>" for cell in block.head)
        rows = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    if isinstance(block, Items):
        marks = block.marks or [""] * len(block.sentences)
        items = "".join(
            f"<li>{f'<b class={mark}>{_e(mark)}</b> ' if mark else ''}{_e(text)}</li>"
            for mark, text in zip(marks, block.sentences, strict=True)
        )
        return f"<ul>{items}</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{_e(block.text)}</code></pre>"
    return f"<figure>{block.svg}<figcaption>{_e(block.caption)}</figcaption></figure>"
