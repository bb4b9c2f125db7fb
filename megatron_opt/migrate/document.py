"""A report as blocks, written as Markdown and as one HTML page without outside resources."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field


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
            f"<title>{_e(self.title)}</title><style>{_STYLE}</style></head><body><main>"
            f"<h1>{_e(self.title)}</h1><p class='verdict {self.verdict_kind}'>{_e(self.verdict)}</p>"
            f"<dl>{facts}</dl>{body}</main></body></html>\n"
        )


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


_STYLE = """
:root{--ink:#1a1f26;--soft:#5a6572;--line:#dfe4ea;--paper:#fff;--good:#12703c;--wait:#8a5a00;--bad:#a3261f;--a:#2563ab;--b:#d9822b}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa5b1;--line:#333c46;--paper:#14181d;--good:#58c28a;--wait:#e0b050;--bad:#f08a82;--a:#6aa9ee;--b:#f0a860}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
.verdict{font-size:1.15rem;font-weight:600;padding:.9rem 1rem;border-left:5px solid;border-radius:4px;background:color-mix(in srgb,currentColor 7%,transparent)}
.good{color:var(--good)}.wait{color:var(--wait)}.bad{color:var(--bad)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.2rem 0}
dl div{border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;min-width:0}dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;min-width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}th{color:var(--soft);font-weight:600}
pre{overflow-x:auto;padding:.8rem;border:1px solid var(--line);border-radius:6px;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
figure{margin:1rem 0}figcaption{color:var(--soft);font-size:.9rem}svg{width:100%;height:auto;max-width:46rem;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}li{margin:.35rem 0}li b{text-transform:uppercase;font-size:.75rem;letter-spacing:.04em;padding:.05rem .35rem;border:1px solid;border-radius:3px}
.high{color:var(--bad)}.medium{color:var(--wait)}.low{color:var(--soft)}.refused{color:var(--bad)}
@media print{main{max-width:none}h2{break-after:avoid}figure,table{break-inside:avoid}}
"""
