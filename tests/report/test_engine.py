"""One report engine: the same blocks as page, Markdown, PNG, CSV and terminal."""

import csv
import json
import re

import pytest
from matplotlib.image import imread

from megatron_opt.report import markdown
from megatron_opt.report.blocks import PALETTE, Code, Items, Plot, Section, Series, Table
from megatron_opt.report.csv_files import write_plot_csv
from megatron_opt.report.page import render
from megatron_opt.report.png import write_grid, write_png
from megatron_opt.report.terminal import aligned

TABLE = Table(["what", "how many", "why"], [["a|b", "1", "–"], ["<c>", "20", "–"]], "Two rows.")


@pytest.fixture
def stack():
    """Two bars of two parts each."""
    parts = [("lower", [0.0, 0.0], [3.0, 4.0]), ("upper", [3.0, 4.0], [5.0, 5.0])]
    series = [
        Series(name, [0.0, 1.0], high, color, line=False, points=False, low=low, high=high, bars=True)
        for (name, low, high), color in zip(parts, PALETTE)
    ]
    names = ["first of the bars", "second"]
    return Plot("stack", "A stack", "", "s", series, y_range=(0.0, 6.0), x_names=names, note="5 s each.")


def _share(path, color):
    wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (abs(imread(path)[:, :, :3] - wanted).max(axis=2) < 0.02).mean()


def test_stacked_bars_fill_their_part_of_the_png(stack, tmp_path):
    """Of the axes' 0.71 × 0.81 of the picture, two bars are 0.6 wide and 7/12 and 3/12 of the height in all."""
    write_png(stack, tmp_path / "a.png")
    for color, height in zip(PALETTE, (7 / 12, 3 / 12)):
        assert _share(tmp_path / "a.png", color) == pytest.approx(0.71 * 0.81 * 0.6 * height, rel=0.05)
    write_grid([stack] * 3, 2, "three", tmp_path / "grid.png")
    assert imread(tmp_path / "grid.png").shape[:2] == (836, 990) and _share(tmp_path / "grid.png", PALETTE[0]) > 0.06


def test_a_figure_of_categories_as_csv(stack, tmp_path):
    write_plot_csv(stack, tmp_path / "a.csv")
    rows = list(csv.reader((tmp_path / "a.csv").open()))
    assert rows[1][:5] == ["lower", "first of the bars", "3.0", "0.0", "3.0"] and len(rows) == 5


def test_blocks_keep_their_order_on_the_page_and_in_markdown(stack):
    section = Section(
        "S", ["text"], warnings=["warning"], blocks=["first", stack, TABLE, Items(["why"], ["high"]), Code("a < b")]
    )
    page, lines = render("T", "<p>lead</p>", [section]), markdown.sections([section])
    body = page.split("<main>")[1].split("</main>")[0]
    for form, words in (
        (
            body,
            (
                "<h2>S",
                ">text<",
                ">warning<",
                ">first<",
                'data-plot="stack"',
                "5 s each.",
                "Two rows.",
                ">high<",
                "a &lt; b",
            ),
        ),
        (
            "\n".join(lines),
            ("## S", "text", "first", "*5 s each.*", "Two rows.", "- **high**: why", "a < b", "- warning"),
        ),
    ):
        places = [form.index(word) for word in words]
        assert places == sorted(places)
    assert "<th class=text>what</th><th>how many</th></tr>" in page, "a column without values is left out"
    assert "| what | how many | why |" in lines and "|---|---:|---:|" in lines and "| a\\|b | 1 | – |" in lines
    plots = json.loads(re.search(r'<script id="plots"[^>]*>(.*?)</script>', page, re.S)[1])
    assert plots["stack"]["series"][1]["high"] == [5.0, 5.0]


def test_aligned_rows():
    assert aligned([("a", "b"), ("long", "1"), ("x", "200")]) == "a       b\nlong    1\nx     200"
