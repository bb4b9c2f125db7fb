"""A report as one HTML file: data, style and script inside, nothing fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from importlib import resources
from itertools import groupby
from string import Template
from typing import Any

from megatron_opt.report.blocks import Block, Code, Items, Plot, Section, Table

LONG = 60  # characters from which a cell's column may wrap


def render(title: str, lead: str, sections: Iterable[Section]) -> str:
    """The page; `lead` is HTML and stands under the title."""
    assets = resources.files("megatron_opt") / "report"
    plots: dict[str, dict[str, Any]] = {}
    body, links = [], []
    for number, section in enumerate(sections):
        links.append(f'<a href="#s{number}">{escape(section.title)}</a>')
        body.append(f'<section id="s{number}"><h2>{escape(section.title)}</h2>')
        body += [f"<p>{escape(text)}</p>" for text in section.text]
        body += [f'<p class="warning">{escape(text)}</p>' for text in section.warnings]
        for drawn, blocks in groupby([*section.plots, *section.tables, *section.blocks], lambda b: isinstance(b, Plot)):
            found = list(blocks)
            plots |= {block.name: asdict(block) for block in found if isinstance(block, Plot)}
            made = "\n".join(map(_block, found))
            body.append(f'<div class="figures">{made}</div>' if drawn else made)
        body.append("</section>")
    parts = {
        "title": escape(title),
        "lead": lead,
        "links": " ".join(links),
        "body": "\n".join(body),
        "script": (assets / "page.js").read_text(encoding="utf-8"),
        # "</" would end the script element early.
        "plots": json.dumps(_finite(plots), allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    return Template((assets / "page.html").read_text(encoding="utf-8")).substitute(parts)


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Plot):
        note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
        return (
            f'<figure data-plot="{escape(block.name)}"><figcaption>{escape(block.title)}</figcaption>'
            f'<div class="legend"></div>{note}</figure>'
        )
    if isinstance(block, Items):
        items = (
            f"<li>{f'<b class={mark}>{mark}</b> ' if mark else ''}{escape(text)}</li>" for mark, text in block.marked()
        )
        return f"<ul>{''.join(items)}</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{escape(block.text)}</code></pre>"
    return _table(block)


def _table(table: Table) -> str:
    """Columns where no row has a value are left out."""
    table = table.without(lambda i: bool(table.rows) and all(row[i] == "–" for row in table.rows))
    kinds = [
        ' class="text long"'
        if left and any(len(row[i]) > LONG for row in table.rows)
        else " class=text"
        if left
        else ""
        for i, left in enumerate(table.words())
    ]

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds))

    rows = "".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    table_text = f"<table><thead><tr>{line(table.header, 'th')}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{caption}<div class="scroll">{table_text}</div>'


def _finite(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes null; seven digits are enough to draw."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
