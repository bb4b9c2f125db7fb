"""The report as one HTML file: data, style and script inside, nothing fetched."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from megatron_opt import __version__
from megatron_opt.files import write_output
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.plots import Section, Table


def write_page(dataset: Dataset, sections: list[Section], path: Path) -> Path:
    """Write the page and return its path."""
    assets = resources.files("megatron_opt") / "study"
    plots: dict[str, dict[str, Any]] = {}
    body, links = [], []
    for number, section in enumerate(sections):
        links.append(f'<a href="#s{number}">{escape(section.title)}</a>')
        body.append(f'<section id="s{number}"><h2>{escape(section.title)}</h2>')
        body += [f"<p>{escape(text)}</p>" for text in section.text]
        body += [f'<p class="warning">{escape(text)}</p>' for text in section.warnings]
        if section.plots:
            body.append('<div class="figures">')
            for plot in section.plots:
                plots[plot.name] = asdict(plot)
                note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
                body.append(
                    f'<figure data-plot="{escape(plot.name)}"><figcaption>{escape(plot.title)}</figcaption>'
                    f'<div class="legend"></div>{note}</figure>'
                )
            body.append("</div>")
        body += [_table(table) for table in section.tables]
        body.append("</section>")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lead = (
        f"<p>{len(dataset.finished)} of {len(dataset.records)} runs finished · baseline "
        f"{escape(dataset.baseline)} · "
        f"megatron_opt {__version__} · {written}</p>"
    )
    lead += (
        '<p>Hover over a point for its run; <a href="runs.csv">runs.csv</a> lists every run, figures/ has '
        "each figure as PNG and CSV.</p>"
    )
    if dataset.attribution:
        lead += f"<p>{escape(dataset.attribution)}</p>"
    parts = {
        "title": escape(f"{dataset.name}: optimizer study"),
        "lead": lead,
        "links": " ".join(links),
        "body": "\n".join(body),
        "script": (assets / "page.js").read_text(encoding="utf-8"),
        # "</" would end the script element early.
        "plots": json.dumps(_finite(plots), allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    write_output(path, Template((assets / "page.html").read_text(encoding="utf-8")).substitute(parts))
    return path


def _table(table: Table) -> str:
    table = _without_empty_columns(table)
    words = [any(row[i][:1].isalpha() for row in table.rows) for i in range(len(table.header))]

    def line(cells: list[str], tag: str) -> str:
        return "".join(
            f"<{tag} class=text>{escape(cell)}</{tag}>" if left else f"<{tag}>{escape(cell)}</{tag}>"
            for cell, left in zip(cells, words)
        )

    head = line(table.header, "th")
    rows = "".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    table_text = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{caption}<div class="scroll">{table_text}</div>'


def _without_empty_columns(table: Table) -> Table:
    """Columns where no row has a value are left out."""
    keep = [i for i in range(len(table.header)) if not table.rows or any(row[i] != "–" for row in table.rows)]
    rows = [[row[i] for i in keep] for row in table.rows]
    return Table([table.header[i] for i in keep], rows, table.caption)


def _finite(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes null; seven digits are enough to draw."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
