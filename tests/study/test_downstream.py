"""`eval:` of a study: asked for at a run's end, filed with it, shown beside the loss and where the orders disagree."""

import json
import sys
from types import SimpleNamespace

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli, downstream, scheduler
from megatron_opt.study.dataset import from_store
from megatron_opt.study.executors import base
from megatron_opt.study.report.accuracy import _disagreements, accuracy
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY

FAKE = """
import json, os, sys
words = sys.argv[1:]
path = words[words.index("--output") + 1]
results = json.load(open(path))
open(os.path.join(os.path.dirname(path), "asked"), "a").write(" ".join(words) + chr(10))
if os.environ.get("FAKE_EVAL") == "break":
    sys.exit(1)
muon = results["optimizer"] == "muon"
acc = {"value": 0.4 if muon else 0.5, "stderr": 0.03 if muon else 0.04}
results["evaluation"] = {"iter_%07d" % results["iterations"]: {"mine": {"metrics": {"acc": acc}}}}
json.dump(results, open(path, "w"))
"""
EVAL = STUDY + "eval: {tasks: [mine, yours], tasks_path: tasks, limit: 7}\n"


@pytest.fixture
def study(make_study, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "evaluate.py").write_text(FAKE)
    monkeypatch.setattr(base, "EVALUATE", (sys.executable, str(tmp_path / "evaluate.py")))
    monkeypatch.setattr(scheduler, "missing", lambda name: None)
    return make_study(EVAL)


def _run(path, output):
    return cli.main(["run", str(path), "--output", str(output)], "study")


def test_runs_are_evaluated_and_the_report_shows_where_the_orders_disagree(study, tmp_path):
    output = tmp_path / "out"
    assert _run(study, output) == 0
    with Store(output / "study.sqlite") as store:
        records = store.runs()
        section = accuracy(from_store(store))
    good = [record for record in records if record.status == "completed"]
    assert len(good) == 5 and all(record.attempts == 1 for record in good)
    assert sorted(record.status for record in records).count("diverged") == 1
    for record in good:
        folder = output.resolve() / "runs" / record.id
        asked = (folder / "asked").read_text()
        assert asked.count("\n") == 1 and asked.startswith(f"{folder / 'checkpoints'} --tasks mine,yours ")
        assert f"--tasks-path {tmp_path / 'tasks'}" in asked and "--limit 7" in asked
        assert downstream.last(record.results)["mine"]["metrics"]["acc"]["value"] in (0.4, 0.5)
    table = section.tables[0]
    assert table.header == ["regime", "optimizer", "valid loss", "mine"]
    assert [row[1:2] + row[3:] for row in table.rows] == [["muon", "0.4000 ± 0.0300"], ["adamw", "0.5000 ± 0.0400"]]
    said = [text for text in section.text if "by loss muon comes before adamw" in text]
    assert said and "adamw before muon (0.5000 and 0.4000, by 2.0 standard errors of the difference)" in said[0]
    page = (output / "report" / "index.html").read_text()
    assert "Accuracy on tasks" in page and "0.5000 ± 0.0400" in page


def test_an_evaluation_that_failed_is_done_again_without_training(study, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setenv("FAKE_EVAL", "break")
    assert _run(study, output) != 0
    monkeypatch.delenv("FAKE_EVAL")
    with Store(output / "study.sqlite") as store:
        failed = [record for record in store.runs() if record.status == "failed"]
    assert len(failed) == 5
    run = output / "runs" / failed[0].id
    trained = (run / "ledger").read_text()
    assert (run / "asked").read_text().count("\n") >= 2
    job = base.Job("r", run, failed[0].arguments, ("x",), trained=True)
    assert base.command_of(read_study(study).executor, job) == [*base.EVALUATE, "x"]
    assert json.loads((run / "results.json").read_text())["status"] == "completed"
    assert len(set(trained.split())) == len(trained.split())  # no step was trained twice


def test_orders_that_agree_say_nothing_and_perplexities_are_not_compared():
    score = lambda value, metric="acc": {"t": downstream.Score(metric, value, 0.01)}  # noqa: E731
    assert _disagreements("r", {"a": (3.0, score(0.5)), "b": (3.1, score(0.4))}) == []
    assert len(_disagreements("r", {"a": (3.0, score(0.4)), "b": (3.1, score(0.5))})) == 1
    perplexity = {"a": (3.0, score(9.0, "word_perplexity")), "b": (3.1, score(10.0, "word_perplexity"))}
    assert _disagreements("r", perplexity) == []


@pytest.mark.parametrize(("more", "said"), [
    ("eval: {tasks: []}\n", "empty list"),
    ("eval: {task: [a]}\n", "unknown key `task`|needs|lacks|missing"),
    ("eval: {tasks: [a]}\ncheckpoints: 0\n", "writes none"),
])  # fmt: skip
def test_mistakes_in_the_file(make_study, more, said):
    with pytest.raises(UserError, match=said):
        read_study(make_study(STUDY + more))


def test_what_is_absent_is_said_before_anything_starts(make_study, tmp_path, monkeypatch):
    study = read_study(make_study(EVAL))
    monkeypatch.setattr(scheduler, "missing", lambda name: UserError("the package lm_eval is not installed"))
    with (
        pytest.raises(UserError, match="`eval:` of the study: the package lm_eval"),
        scheduler.open_study(study, tmp_path / "out"),
    ):
        pass
    monkeypatch.setattr(scheduler, "missing", lambda name: None)
    with pytest.raises(UserError, match="fix `eval: tasks_path:`"), scheduler.open_study(study, tmp_path / "out"):
        pass
    assert downstream.arguments(None, SimpleNamespace()) == ()


def test_averaging_wants_checkpoints(make_study):
    average = "eval: {tasks: [mine], average: 3}\n"
    with pytest.raises(UserError, match=r"study.yaml:18: `average: 3` wants as many checkpoints.*`checkpoints: 2`"):
        read_study(make_study(STUDY + average + "checkpoints: 2\n"))
    assert read_study(make_study(STUDY + average)).evaluation.average == 3
