"""The report: complete, self-contained, and looked at in a real browser, wide and narrow and on paper."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest

from megatron_opt.report.blocks import PALETTE
from megatron_opt.study import cli
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.paper_data import paper_dataset
from megatron_opt.study.report.pitfalls import pitfalls
from tests.study.conftest import STUDY

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian package chromium)")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a study with two models, three ratios, two seeds and a diverged run."""
    import sys

    from tests.study.conftest import FAKE

    folder = tmp_path_factory.mktemp("report")
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model"):
        (folder / name).write_bytes(b"x")
    text = (
        STUDY.replace("PYTHON", sys.executable)
        .replace("FAKE", str(FAKE))
        .replace(
            "data:\n",
            "  small: {num_layers: 3, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}\ndata:\n",
        )
    )
    (folder / "s.yaml").write_text(text + "ratios: [1, 2, 4]\nseeds: [1, 2, 3]\n")
    assert cli.main(["run", str(folder / "s.yaml"), "--output", str(folder / "out")], "study") == 0
    return folder / "out" / "report"


def browse(*words):
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=3000",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def plots_of(page):
    text = re.search(r'<script id="plots" type="application/json">(.*?)</script>', page, re.S)[1]
    return json.loads(text.replace("<\\/", "</"))


def test_the_page_needs_nothing_from_elsewhere(report):
    page = (report / "index.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*['\"]?http|fetch\(|XMLHttpRequest", page)
    assert page.count("<html") == page.count("</html>") == 1


def test_every_section_is_there_and_every_figure_has_its_png_and_csv(report):
    page = (report / "index.html").read_text()
    for title in (
        "Results",
        "What can be said",
        "Is the difference real?",
        "Loss minus the baseline's",
        "Token speedup",
        "Final loss against size and tokens",
        "How good are the laws?",
        "Extrapolation to 7e+09 parameters",
        "Learning-rate sensitivity",
        "Hyperparameter laws",
        "Transfer of the best learning rate",
        "Loss curves",
        "Wall-clock and memory",
        "Effective learning rate and weight norm",
        "Tuning effort",
    ):
        assert f">{escape(title)}</h2>" in page, title
    assert page.index("What can be said</h2>") < page.index("Results</h2>")
    assert "max-height" not in page  # no table hides its last rows
    plots = plots_of(page)
    assert len(plots) > 15
    for name, plot in plots.items():
        assert (report / "figures" / f"{name}.png").stat().st_size > 5000
        rows = (report / "figures" / f"{name}.csv").read_text().splitlines()
        assert len(rows) == 1 + sum(len(series["x"]) for series in plot["series"])


def test_every_number_leads_to_its_runs(report):
    plots, runs = plots_of((report / "index.html").read_text()), (report / "runs.csv").read_text()
    for name, plot in plots.items():
        if name.startswith(
            ("lr-sensitivity", "loss-curves", "loss-against", "held-out", "transfer", "speedup", "gain-against")
        ):
            ids = [run for series in plot["series"] for text in series["runs"] or [] for run in text.split()]
            assert ids and all(run in runs for run in ids), name


@needs_browser
@pytest.mark.parametrize("width", [1400, 420])
def test_a_browser_draws_every_figure_without_an_error(report, tmp_path, width):
    plots = plots_of((report / "index.html").read_text())
    page = f"file://{report / 'index.html'}"
    done = browse(f"--window-size={width},1000", "--enable-logging=stderr", "--dump-dom", page)
    assert f'data-drawn="{len(plots)}"' in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr[-500:]
    assert not re.search(r"<svg[^>]*>.{0,200000}?NaN", done.stdout, re.S)
    assert done.stdout.count("<circle") > 50
    picture = tmp_path / "page.png"
    browse(f"--window-size={width},15000", f"--screenshot={picture}", page)
    from matplotlib.image import imread

    image = imread(picture)[:, :, :3]
    for color in (PALETTE[0], PALETTE[1]):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image - wanted).max(axis=2) < 0.02).sum() > 100, f"{color} is not on the page"
    # Nothing may be wider than the window: the page itself must not scroll sideways.
    # Chromium's own window is never narrower than 500 pixels: a frame is.
    measure = "parent.document.title = document.documentElement.scrollWidth"
    script = f"<script>addEventListener('load', () => {measure})</script>"
    inner = (report / "index.html").read_text().replace("</body>", script + "</body>")
    (tmp_path / "w.html").write_text(
        f'<title></title><iframe width={width} height=900 frameborder=0 srcdoc="{escape(inner)}"></iframe>'
    )
    done = browse("--window-size=1500,1000", "--dump-dom", f"file://{tmp_path / 'w.html'}")
    assert int(re.search(r"<title>(\d+)</title>", done.stdout)[1]) <= width


@needs_browser
def test_it_prints(report, tmp_path):
    pdf = tmp_path / "report.pdf"
    browse(f"--print-to-pdf={pdf}", f"file://{report / 'index.html'}")
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 50_000
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 60


def changed(dataset, **changes):
    return Dataset(**{**dataset.__dict__, **changes})


def test_pitfalls_are_found_where_they_are_and_only_there():
    dataset = paper_dataset()
    found = pitfalls(dataset)
    assert any("best lr of soap in 130m@1x, 0.016, is the largest" in text for text in found)
    assert not any("Unequal" in text for text in found)
    counted = pitfalls(changed(dataset, effort_known=True))
    assert any("Unequal tuning effort in 130m@1x" in text for text in counted)
    assert any("The baseline adamw tried 1 learning rates" in text for text in counted)
    alone = pitfalls(changed(dataset, records=[r for r in dataset.records if r.optimizer != "adamw"]))
    assert any("no result of the baseline adamw" in text for text in alone)
    short = [r.__class__(**{**r.__dict__, "results": {"tokens": r.tokens // 2}}) for r in dataset.records[:1]]
    assert any("stopped at 50% of its budget" in text for text in pitfalls(changed(dataset, records=short)))
