"""The report's page in headless Chromium, wide and narrow, without network access."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opt.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXAMPLES = Path(__file__).parents[2] / "examples" / "migrations"
PAGES = sorted(EXAMPLES.glob("*/plan.html"))
# this copy's script says how wide it is and how many of its drawings have a size
PROBE = """<script>addEventListener("load", () => { document.title = [document.documentElement.scrollWidth, innerWidth,
[...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 50).length,
document.querySelector("main").innerText.length].join(" ") })</script>"""


def test_there_are_three_worked_migrations() -> None:
    assert len(PAGES) == 3
    for page in PAGES:
        assert (page.parent / "plan.md").is_file() and (EXAMPLES / f"{page.parent.name}.sh").is_file()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.stem)
def test_worked_migrations_are_what_their_commands_give(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES)
    words = shlex.split(script.read_text().replace("\\\n", " ").split("megatron-opt ", 1)[1])
    place = words.index("--output") + 1
    kept, words[place] = EXAMPLES / words[place], str(tmp_path)
    assert main(words) == 0
    again = f"run examples/migrations/{script.name} again"
    assert (tmp_path / "plan.md").read_text() == (kept / "plan.md").read_text(), again
    made, wanted = (dict(_leaves(json.loads((folder / "plan.json").read_text()))) for folder in (tmp_path, kept))
    assert made.keys() == wanted.keys(), again
    for place, value in wanted.items():  # processors differ in the tenth digit
        same = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert made[place] == same, (place, again)


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Every number and word of a document by its place."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{place}/{key}")
    else:
        yield place, value


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.parametrize("page", PAGES, ids=[page.parent.name for page in PAGES])
def test_page_fits_its_window_and_draws_its_charts(page: Path, width: int, tmp_path: Path) -> None:
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</main>", f"</main>{PROBE}"))
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'user'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*words, copy.as_uri()], capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert title, done.stderr[-1000:]
    scroll, window, drawings, letters = map(int, title.groups())
    assert scroll <= window and drawings == 4 and letters > 3000
