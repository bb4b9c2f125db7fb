"""Evidence against the published numbers, verdicts on made-up plans, the report in both forms, bad input."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_opt.cli import main
from megatron_opt.cost_model.cluster import load
from megatron_opt.cost_model.flags import parse
from megatron_opt.errors import UserError
from megatron_opt.migrate import advice
from megatron_opt.migrate.decision import decide, preposterior
from megatron_opt.migrate.document import Document
from megatron_opt.migrate.evidence import Estimate, Method, gather, hyperparameter_flags
from megatron_opt.migrate.plan import Plan, budget, make_plan, refusals
from megatron_opt.migrate.write import as_dict, document
from megatron_opt.report.blocks import Items, Section, Table
from megatron_opt.study.analysis import analyse
from megatron_opt.study.paper_data import paper_dataset

SMALL = "--preset llama-300m --bf16 --use-distributed-optimizer --lr 0.008"


def planned(words: str = SMALL, target: str = "muon", **more) -> Plan:
    flags, ignored = parse(words.split())
    arguments = {"ratio": 2.0, **more}
    return make_plan(flags, {**flags, **dict.fromkeys(ignored, True)}, target, load("h100"), 8, **arguments)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


def test_evidence_has_the_published_speedups(plan: Plan) -> None:
    """Recomputed cells of arXiv 2509.02046 for Muon: 1.42 … 1.41 at 130m, 1.30 … 1.25 at 520m."""
    cells = {(round(c.n / 1e6), round(c.d / c.n / 20)): c.value for c in plan.evidence.cells}
    for key, value in {(134, 1): 1.42, (134, 8): 1.41, (302, 2): 1.22, (537, 1): 1.30, (537, 8): 1.25}.items():
        assert cells[key] == pytest.approx(value, abs=0.02)


def test_the_speedup_is_the_one_that_the_study_states(plan: Plan) -> None:
    """To the last digit what `study fit` says of the published losses; the cell that the run repeats is shown beside it."""
    assert not plan.extrapolates
    n = float(plan.before.model.hidden_parameters)
    analysis = analyse(paper_dataset(), target=n, ratios=(2.0,), resamples=2)
    stated = analysis.statement.at("muon", 2.0).speedup
    found = plan.token_speedup
    assert (found.value, found.low, found.high) == (stated.value, stated.low, stated.high)
    measured = next(method for method in plan.evidence.methods if method.name.startswith("measured"))
    assert not measured.counted and measured.estimate.value == pytest.approx(1.22, abs=0.02)
    assert measured.estimate.low < found.value < measured.estimate.high
    assert plan.speedup.value == pytest.approx(plan.token_speedup.value / plan.ratio)


def test_hyperparameters_are_the_tuned_ones_as_flags_that_the_job_knows(plan: Plan) -> None:
    values = {h.name: h for h in plan.evidence.hyperparameters}
    assert values["momentum"].value == 0.98 and values["lr"].low < values["lr"].value < values["lr"].high
    assert 0.004 <= values["lr"].value <= 0.032  # the study's grid around its optimum
    assert plan.flags["muon-momentum"] == 0.98 and plan.flags["lr-decay-style"] == "WSD"
    assert 0.1 <= plan.flags["scalar-lr-ratio"] <= 0.3
    known, ignored = parse([word for key, value in plan.flags.items() for word in (f"--{key}", str(value))])
    assert (
        set(ignored) <= {"lr-decay-iters", "lr-wsd-decay-iters", "lr-wsd-decay-style"} and known["optimizer"] == "muon"
    )


def test_soaps_law_and_block() -> None:
    evidence = gather(None, "adamw", "soap", 536_870_912, 8 * 20 * 536_870_912)
    flags = hyperparameter_flags("soap", evidence.hyperparameters, 1000)
    assert flags["soap-block-size"] == 512 and flags["soap-precondition-frequency"] == 10
    assert 0.002 <= flags["lr"] <= 0.008 and flags["lr-decay-style"] == "cosine"


def test_break_even_is_the_ratio_of_step_times(plan: Plan) -> None:
    even = plan.ratio * plan.before.seconds / plan.after.seconds
    assert even == pytest.approx(1.0)
    assert plan.saved(1.0) == 0 and plan.saved(2.0) == pytest.approx(plan.hours / 2) and plan.saved(0.5) == -plan.hours


def with_draws(plan: Plan, values: np.ndarray, **more) -> Plan:
    low, mid, high = np.quantile(values, [0.05, 0.5, 0.95])
    method = Method("made up", Estimate(mid, low, high), values, True, "")
    return replace(plan, evidence=replace(plan.evidence, methods=[method]), **more)


def test_verdicts_follow_the_expected_saving(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    clear, even, worse = (with_draws(plan, rng.normal(m, 0.05, 500)) for m in (1.3, 1.0, 0.8))
    assert advice.verdict(clear).action == "switch" and advice.verdict(clear).confidence == "high"
    assert advice.verdict(even).action == "stay", "a pilot costs 8% of the run and can save less"
    assert advice.verdict(worse).action == "stay"
    assert advice.verdict(replace(clear, done=0.5)).confidence == "medium"  # nobody has measured a switch half-way
    assert advice.verdict(replace(clear, refused=["--fp16: …"])).action == "stay"


def test_value_of_information_is_that_of_a_simulation() -> None:
    """Preposterior analysis against sampling: truth, a noisy sign of it, the better choice by the posterior."""
    rng = np.random.default_rng(1)
    mean, sigma, known = 0.03, 0.2, 0.6
    noise = sigma * np.sqrt((1 - known) / known)
    truth = rng.normal(mean, sigma, 400_000)
    seen = truth + rng.normal(0, noise, truth.size)
    posterior = mean + known * (seen - mean)
    cost = np.exp(-posterior + sigma**2 * (1 - known) / 2)
    saving, changes = preposterior(float(np.exp(-mean + sigma**2 / 2)), sigma, known)
    assert saving == pytest.approx(np.mean(np.where(cost < 1, 1 - np.exp(-truth), 0.0)), abs=1e-3)
    prior_switches = np.exp(-mean + sigma**2 / 2) < 1
    assert changes == pytest.approx(np.mean((cost < 1) != prior_switches), abs=3e-3)


def test_an_experiment_is_offered_only_where_it_can_pay(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    sure = decide(with_draws(plan, rng.normal(1.6, 0.01, 500)))
    assert sure.experiments == [] and sure.best is None and sure.switch  # nothing could change that
    far = planned("--preset llama-7b --use-distributed-optimizer --tensor-model-parallel-size 4", ratio=32.0)
    decision = decide(with_draws(far, np.exp(rng.normal(0.0, 0.5, 500))))
    best = decision.best
    assert best is not None and advice.verdict(with_draws(far, np.exp(rng.normal(0.0, 0.5, 500)))).action == "try"
    for item in decision.experiments:
        assert item.saving <= max(0.0, decision.expected) + decision.perfect + 1e-6
        assert item.value == pytest.approx(item.saving - max(0.0, decision.expected) - item.hours)
        assert far.source in item.words and far.target in item.words, "one optimizer alone settles nothing"


def test_the_separate_law_and_infinite_speedups_stand_in_no_table() -> None:
    text = document(planned("--preset llama-7b --use-distributed-optimizer --tensor-model-parallel-size 4")).markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not any("∞" in row or "separate" in row for row in rows)
    assert "∞" not in text


def test_beyond_the_measured_range_is_marked_everywhere() -> None:
    far = planned("--preset llama-7b --use-distributed-optimizer --tensor-model-parallel-size 4", ratio=32.0)
    assert len(far.extrapolates) == 2
    assert advice.verdict(far).confidence in ("low", "medium")
    for form in (document(far).markdown(), document(far).page()):
        assert form.count("xtrapolation") >= 4
    assert any(risk.severity == "high" for risk in advice.risks(far))


def test_a_far_off_learning_rate_is_a_risk_of_the_baseline(plan: Plan) -> None:
    weak = replace(plan, given={**plan.given, "lr": 6e-4})
    found = [risk for risk in advice.risks(weak) if "tuning adamw alone" in risk.sentence]
    assert found and found[0].severity == "high"
    assert not [risk for risk in advice.risks(plan) if "tuning adamw alone" in risk.sentence]


def test_refused_flags_are_named() -> None:
    found = refusals({"fp16": True, "use_torch_fsdp2": True, "num_distributed_optimizer_instances": 1, "lr": 1}, "muon")
    assert len(found) == 2 and any("fsdp2" in item for item in found)
    assert advice.verdict(replace(planned(), refused=found)).sentence.startswith("Do not switch as things are: 2")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(plan: Plan) -> None:
    page = document(plan).page()
    parser = _Page()
    parser.feed(page)
    assert parser.open == [] and all(link.startswith("#s") for link in parser.links)
    assert "@import" not in page and "fetch(" not in page and "nan" not in page.lower().split()
    plots = json.loads(re.search(r'<script id="plots"[^>]*>(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert page.count('<figure data-plot="') == len(plots) == 4
    assert all(None not in series["y"] + series["low"] for plot in plots.values() for series in plot["series"])


def test_both_forms_say_the_same(plan: Plan) -> None:
    report = document(plan)
    page = report.page()
    for section in report.sections:
        assert f"## {section.title}" in report.markdown() and section.title in page
    assert report.verdict in report.markdown() and f"{plan.speedup.value:.2f}×" in page


def test_text_is_escaped() -> None:
    made = Document(
        "<b>",
        "a & b",
        "good",
        [("x", "<i>")],
        [Section("s", blocks=[Table(("a", "b"), [("1|2", "<u>")]), Items(["<s>"])])],
    )
    assert "<b>" not in made.page() and "&lt;u&gt;" in made.page() and "<s>" not in made.page().split("</style>")[1]
    assert "1\\|2" in made.markdown()


def test_own_study_as_json(tmp_path: Path) -> None:
    """A made-up law in which the target needs 0.8 of the tokens: the estimate finds 1.25."""
    rows = []
    for n in (1e7, 3e7, 1e8):
        for ratio in (1, 2, 4, 8):
            for name, factor in (("adamw", 1.0), ("muon", 1.25)):
                d = 20 * ratio * n
                loss = 1.7 + 400 * n**-0.34 + 410 * (factor * d) ** -0.28
                rows.append({"optimizer": name, "parameters": n, "tokens": d, "loss": loss})
    file = tmp_path / "fits.json"
    file.write_text(json.dumps({"name": "mine", "baseline": "adamw", "noise": {"sigma": 1e-4}, "observations": rows}))
    found = gather(str(file), "adamw", "muon", 1e8, 8e9)
    assert found.source == "mine" and not found.paper
    assert found.combined().value == pytest.approx(1.25, abs=0.03)
    file.write_text('{"observations": 3}')
    with pytest.raises(UserError, match="not a file of fits"):
        gather(str(file), "adamw", "muon", 1e8, 8e9)


def test_budget_from_the_run() -> None:
    flags = {"train-iters": 100, "global-batch-size": 8, "seq-length": 32}
    assert budget(flags, None, None, 1e6) == 25600
    assert budget(flags, 5e9, None, 1e6) == 5e9 and budget(flags, None, 2.0, 1e6) == 4e7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to sap", "no results of sap"),
        ("--to adamw", "trained by adamw already"),
        ("--to muon --tokens -1", "--tokens: '-1' is no finite number above 0"),
        ("--to muon --tokens 1e9 --chinchilla 1", "not both"),
        ("--to muon --chinchilla 1e9", "no training run"),
        ("--to muon --done 1.5", "--done"),
        ("--to muon --study /nonexistent --chinchilla 1", "does not exist"),
        ("--to muon --from /nonexistent --chinchilla 1", "cannot be read"),
        ("--to muon", "length is unknown"),
        ("--to muon --chinchilla one", "--chinchilla: 'one' is no finite number"),
        ("--to muon --chinchilla nan", "--chinchilla: 'nan' is no finite number"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if "--chinchilla" not in words and "--tokens" not in words and words != "--to muon":
        words += " --chinchilla 1"
    assert main(f"migrate plan {words} --cluster h100 --gpus 8 --preset llama-130m --output {tmp_path}".split()) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = f"migrate plan --to muon --cluster h100 --gpus 8 --chinchilla 2 --output {tmp_path} {SMALL}"
    assert main(words.split()) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"plan.md", "plan.html", "plan.json"}
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["verdict"]["action"] in ("switch", "try", "stay")
    assert content["verdict"]["sentence"] in capsys.readouterr().out
    assert content["step_time_ratio"] == pytest.approx(as_dict(planned())["step_time_ratio"])
