"""Blocks as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_opt.report.blocks import Block, Code, Items, Plot, Section, Table


def sections(made: Iterable[Section]) -> list[str]:
    """Lines; each section begins with an empty one. A figure without an image has its note there, which says the same in words."""
    lines = []
    for section in made:
        blocks: list[Block] = [*section.text, *section.plots, *section.tables, *section.blocks]
        if section.warnings:
            blocks.append(Items(section.warnings))
        lines += ["", f"## {section.title}"]
        for block in blocks:
            lines += ["", *_block(block)]
    return lines


def table(made: Table) -> list[str]:
    """The caption, if there is one, and the rows."""
    caption = [made.caption, ""] if made.caption else []
    rule = "|".join("---" if left else "---:" for left in made.words())
    return [*caption, _row(made.header), f"|{rule}|", *map(_row, made.rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _block(block: Block) -> list[str]:
    if isinstance(block, str):
        return [block]
    if isinstance(block, Table):
        return table(block)
    if isinstance(block, Items):
        return [f"- {f'**{mark}**: ' if mark else ''}{text}" for mark, text in block.marked()]
    if isinstance(block, Code):
        return ["```sh", block.text, "```"]
    assert isinstance(block, Plot)
    return [f"![{block.title}]({block.image})"] if block.image else [f"*{block.note or block.title}*"]
