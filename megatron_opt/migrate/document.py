"""The report of a migration as Markdown and as one HTML page: the verdict and the facts first, then sections."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_opt.report import markdown, page
from megatron_opt.report.blocks import Section


@dataclass
class Document:
    """A title, the verdict that stands first, and sections."""

    title: str
    verdict: str
    verdict_kind: str  # good, wait, bad
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    def markdown(self) -> str:
        """The whole report as Markdown."""
        lines = [
            f"# {self.title}",
            "",
            f"**{self.verdict}**",
            "",
            *(f"- {name}: {value}" for name, value in self.facts),
        ]
        return "\n".join([*lines, *markdown.sections(self.sections)]) + "\n"

    def page(self) -> str:
        """The whole report as one HTML page."""
        facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.facts)
        lead = f'<p class="verdict {self.verdict_kind}">{escape(self.verdict)}</p><dl>{facts}</dl>'
        return page.render(self.title, lead, self.sections)
