"""The text of an HTML manual: blocks on lines of their own, preformatted text as it is, no navigation."""

import re
from html.parser import HTMLParser

SKIPPED = {"head", "script", "style", "nav"}
SKIPPED_CLASSES = {"navheader", "navfooter"}
BLOCKS = {
    "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "pre", "table", "ul", "ol", "dl",
    "br", "hr", "section", "blockquote",
}  # fmt: skip
VOID = {"br", "hr", "img", "meta", "link", "input", "col"}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0  # depth inside a skipped element
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self._block(tag)
            return
        classes = set((dict(attrs).get("class") or "").split())
        if self._skipped or tag in SKIPPED or classes & SKIPPED_CLASSES:
            self._skipped += 1
            return
        self._pre += tag == "pre"
        self._block(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if self._skipped:
            self._skipped -= 1
            return
        self._pre = max(0, self._pre - (tag == "pre"))
        self._block(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _block(self, tag: str) -> None:
        if tag in BLOCKS and not self._skipped:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3", "table") else "\n")


def html_to_text(html: str) -> str:
    """Readable text of a page whose elements are all closed (XHTML, DocBook, Sphinx)."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
