"""`eval:` of a study: asked for at a run's end, filed with it, shown beside the loss and where the orders disagree."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli, downstream, scheduler
from megatron_opt.study.dataset import from_store
from megatron_opt.study.executors import base
from megatron_opt.study.executors.local import _command
from megatron_opt.study.report.accuracy import _disagreements, accuracy
from megatron_opt.study.spec import Evaluation, ExecutorSettings
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
JOB = base.Job("r", Path("run"), [], ("x",))
EVAL = STUDY + "eval: {tasks: [mine, yours], tasks_path: tasks, limit: 7}\n"


@pytest.fixture
def study(make_study, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "evaluate.py").write_text(FAKE)
    monkeypatch.setattr(base, "EVALUATE", (str(tmp_path / "evaluate.py"),))
    monkeypatch.setattr(scheduler, "missing", lambda name: None)
    monkeypatch.setattr(downstream, "rehearse", lambda study: None)
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
    assert _command(read_study(study).executor, job) == [sys.executable, *base.EVALUATE, "x"]
    assert json.loads((run / "results.json").read_text())["status"] == "completed"
    assert len(set(trained.split())) == len(trained.split())  # no step was trained twice


def test_models_that_are_not_named_are_not_evaluated(study, make_study, tmp_path):
    two = EVAL.replace(
        "  tiny: {", "  small: {num_layers: 2, hidden_size: 16, ffn_hidden_size: 64, num_attention_heads: 2}\n  tiny: {"
    )
    two = two.replace("limit: 7}", "models: [small]}").replace(", 0.008, 0.064]", "]").replace(", 0.016, 0.032]", "]")
    assert _run(make_study(two), tmp_path / "out") == 0
    with Store(tmp_path / "out/study.sqlite") as store:
        actual = {(one.regime.model, bool(downstream.last(one.results))) for one in store.runs()}
    assert actual == {("small", True), ("tiny", False)}
    with pytest.raises(UserError, match="no model `tony`; did you mean `tiny`"):
        read_study(make_study(two.replace("[small]", "[tony]")))


def test_a_stop_while_training_leaves_the_evaluation_for_later(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "EVALUATE", ("-c", "open('evaluated', 'w')"))
    trained = "touch started; trap 'exit 0' TERM; sleep 30 & wait"  # it saves and says nothing of a failure
    settings = ExecutorSettings(command=("/bin/sh", "-c", trained))
    for signalled in (False, True):
        words = _command(replace(settings, command=settings.command if signalled else ("true",)), JOB)
        child = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
        while signalled and not (tmp_path / "started").exists():
            time.sleep(0.02)
        if signalled:
            os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(20) == (143 if signalled else 0)
        assert (tmp_path / "evaluated").exists() != signalled
        (tmp_path / "evaluated").unlink(missing_ok=True)


def test_the_layout_of_the_training_cuts_the_model_of_the_evaluation():
    words = ["--lr", "1", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4"]
    asked = " ".join(downstream.arguments(Evaluation(("t",)), Path("run"), words))
    assert asked.endswith(" --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4")
    two = base.evaluation_of(ExecutorSettings(ranks=2), JOB)
    assert two == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "-m", "megatron_opt.cli", "eval", "x"]  # fmt: skip


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
    with pytest.raises(UserError, match=r"`ema:` wants runs that keep a moving average; add `ema_decay` to `flags:`"):
        read_study(make_study(STUDY + "eval: {tasks: [mine], ema: true}\n"))
    assert read_study(make_study(STUDY + "eval: {tasks: [mine], ema: true}\nflags: {ema_decay: 0.9}\n")).evaluation.ema
