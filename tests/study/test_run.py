"""`study run` end to end with the fake trainer: results, resuming, failures, budget."""

import csv
import json
from itertools import pairwise

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli, samples
from megatron_opt.study.dataset import from_store
from megatron_opt.study.fits.significance import compare_all
from megatron_opt.study.scheduler import open_study
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study
from megatron_opt.study.summary import summary
from tests.study.conftest import STUDY


def run(path, output, *more):
    return cli.main(["run", str(path), "--output", str(output), *more], "study")


def refusal(study, output):
    with pytest.raises(UserError) as caught, open_study(study, output):
        pass
    return str(caught.value)


def records(output):
    with Store(output / "study.sqlite") as store:
        return store.runs()


def test_the_report_has_a_sample_of_each_optimizers_best_run(make_study, tmp_path, monkeypatch, capsys):
    (tmp_path / "say.py").write_text(
        "import sys\nprint(sys.argv[sys.argv.index('--prompt') + 1], 'and <then>') if '--seed' in sys.argv else sys.exit(2)"
    )
    monkeypatch.setattr(samples, "GENERATE", (str(tmp_path / "say.py"),))
    text = STUDY.replace(", 0.008, 0.064]", "]").replace(", 0.016, 0.032]", "]") + 'sample: "Once upon"\n'
    output = tmp_path / "out"
    assert run(make_study(text), output) == 0
    page = (output / "report" / "index.html").read_text()
    assert page.count("Once upon and &lt;then&gt;") == 2
    monkeypatch.setattr(samples, "GENERATE", ("-c", "raise SystemExit('no such thing')"))
    assert run(make_study(text), output) == 0 and "no such thing" not in capsys.readouterr().out  # both are kept
    with Store(output / "study.sqlite") as store:
        store.set_meta(samples.SAMPLES, {})
    assert run(make_study(text), output) == 0
    assert capsys.readouterr().out.count("no such thing") == 2


def test_a_grid_runs_every_point_once_and_reports_the_best(make_study, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(make_study(), output) == 0
    found = {(r.optimizer, r.hyper["lr"]): r for r in records(output)}
    assert len(found) == 6 and all(r.attempts == 1 for r in found.values())
    assert found["adamw", 0.064].status == "diverged" and found["adamw", 0.064].loss is None
    completed = [r for r in found.values() if r.status == "completed"]
    assert len(completed) == 5
    with Store(output / "study.sqlite") as store:
        assert from_store(store).planned == {r.regime: r.parameters for r in found.values()}
    best = {
        name: min((r for r in completed if r.optimizer == name), key=lambda r: r.loss) for name in ("adamw", "muon")
    }
    rows = list(csv.DictReader((output / "report" / "summary.csv").open()))
    assert {row["optimizer"]: float(row["best lr"]) for row in rows} == {n: r.hyper["lr"] for n, r in best.items()}
    for row in rows:
        assert float(row["valid loss"]) == pytest.approx(best[row["optimizer"]].loss, abs=5e-5)
        assert row["run id"] == best[row["optimizer"]].id
        assert (row["tokens/s"], row["optimizer ms"]) == ("25,600", "2.00")
    shown = capsys.readouterr().out
    assert "report: " in shown and (output / "report" / "index.html").is_file()
    for figure in ("lr-sensitivity-tiny@1x", "loss-curves-tiny@1x"):
        assert (output / "report" / "figures" / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_run_gets_the_same_tokens_and_its_own_flags(make_study, tmp_path):
    output = tmp_path / "out"
    run(make_study(), output)
    parameters = 2 * (3 * 32 * 64 + 4 * 32 * 32)
    for record in records(output):
        assert record.parameters == parameters
        assert record.tokens == 20 * parameters // (64 * 4) * (64 * 4)
        flags = dict(pairwise(record.arguments))
        assert flags["--optimizer"] == record.optimizer
        assert float(flags["--lr"]) == record.hyper["lr"]
        assert flags["--lr-decay-style"] == ("WSD" if record.optimizer == "muon" else "cosine")
        assert flags["--train-data-path"] == str(tmp_path / "train")


def test_a_second_call_runs_nothing_and_a_wider_grid_only_the_new_points(make_study, tmp_path):
    output = tmp_path / "out"
    run(make_study(), output)
    before = {r.id: r.finished for r in records(output)}
    assert run(make_study(), output) == 0
    assert {r.id: r.finished for r in records(output)} == before
    wider = STUDY.replace("0.004, 0.008, 0.064", "0.004, 0.008, 0.064, 0.002").replace(
        "0.008, 0.016, 0.032", "0.008, 0.016, 0.032, 0.004"
    )
    assert run(make_study(wider), output) == 0
    after = {r.id: r.finished for r in records(output)}
    assert len(after) == 8 and before.items() <= after.items()


def test_a_failing_run_is_retried_then_reported_and_the_others_go_on(make_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "0.004")
    output = tmp_path / "out"
    text = STUDY.replace("executor:", "executor:\n  retries: 1")
    assert run(make_study(text), output) == 1
    failed = [r for r in records(output) if r.status == "failed"]
    assert [(r.hyper["lr"], r.attempts) for r in failed] == [(0.004, 2)]
    assert failed[0].reason == "exit code 1: RuntimeError: no such luck"
    assert sum(r.status in ("completed", "diverged") for r in records(output)) == 5
    assert "no such luck" in capsys.readouterr().out
    monkeypatch.delenv("FAKE_FAIL")
    assert run(make_study(text), output, "--retry-failed") == 0


def test_a_run_that_fails_after_each_checkpoint_goes_on_from_it(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CRASH_EVERY", "5")
    output = tmp_path / "out"
    assert run(make_study(STUDY.replace("executor:", "executor:\n  retries: 0")), output) == 0
    for record in records(output):
        assert (record.attempts, record.interruptions) == (4, 3)
        assert len((output / "runs" / record.id / "ledger").read_text().split()) == 20


def test_bad_input_of_a_run_is_not_retried(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "0.004")
    monkeypatch.setenv("FAKE_CODE", "2")
    assert run(make_study(), tmp_path / "out") == 1
    assert [r.attempts for r in records(tmp_path / "out") if r.status == "failed"] == [1]


def test_a_run_that_hangs_is_stopped_at_its_limit(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "30")
    text = STUDY.replace("executor:", "executor:\n  timeout_minutes: 0.01\n  retries: 0")
    assert run(make_study(text), tmp_path / "out") == 1
    assert {r.reason for r in records(tmp_path / "out")} == {"stopped after 0.01 minutes"}


def test_the_budget_stops_new_runs_and_the_rest_waits(make_study, tmp_path):
    # Every fake run reports a little over one second of wall time.
    text = STUDY + "budget: {hours: 0.0005}\n"
    output = tmp_path / "out"
    assert run(make_study(text), output) == 1
    states = [r.status for r in records(output)]
    assert "planned" in states and "completed" in states and "running" not in states
    assert run(make_study(), output) == 0


def test_curves_come_back_as_they_were_logged(make_study, tmp_path):
    output = tmp_path / "out"
    run(make_study(), output)
    with Store(output / "study.sqlite") as store:
        record = store.runs(status="completed")[0]
        curve = store.curve(record.id)
    logged = [json.loads(line) for line in (output / "runs" / record.id / "metrics.jsonl").open()]
    assert curve.train == [point for point in logged if point["kind"] == "train"]
    assert [p["loss"] for p in curve.valid] == [p["loss"] for p in logged if p["kind"] == "eval"]


def test_a_preempted_killed_and_resumed_study_gives_the_tables_of_one_left_alone(make_study, tmp_path, monkeypatch):
    text = STUDY.replace("executor:", "phases: [descent, seeds]\nseeds: [1, 2, 3, 4]\nexecutor:\n  retries: 0")
    monkeypatch.setenv("FAKE_STEPS", "8")
    assert run(make_study(text), tmp_path / "alone") == 0
    monkeypatch.setenv("FAKE_CRASH_EVERY", "3")
    # The time is spent at once: each call starts what fits, and the next goes on.
    for _ in range(60):
        if run(make_study(text), tmp_path / "torn", "--max-hours", "0.0001") == 0:
            break
    found = {}
    for name in ("alone", "torn"):
        with Store(tmp_path / name / "study.sqlite") as store:
            dataset = from_store(store)
            runs = {r.id: (r.status, r.loss, r.seed, r.tokens, r.hyper) for r in dataset.records}
            cells = dataset.best()
            regimes = dataset.regimes
            table = compare_all(cells, "adamw", dataset.optimizers, regimes, dataset.looks, dataset.margin, plan=True)
            rows = [row.cells()[:5] + row.cells()[-2:] for row in summary(dataset)]
            trace = store.meta("trace")
            found[name] = runs, cells.keys(), table, rows, trace, [store.curve(run) for run in sorted(runs)]
            attempts = sum(r.attempts for r in dataset.records)
    assert found["alone"] == found["torn"] and attempts > 2 * len(found["torn"][0])
    assert table[0].p is not None


def test_seeds_repeat_the_winners_only(make_study, tmp_path):
    output = tmp_path / "out"
    assert run(make_study(STUDY + "seeds: [1, 2, 3]\n"), output) == 0
    found = records(output)
    assert len(found) == 6 + 2 * 2
    repeated = [r for r in found if r.seed > 1]
    best = {
        name: min((r for r in found if r.optimizer == name and r.seed == 1 and r.loss), key=lambda r: r.loss)
        for name in ("adamw", "muon")
    }
    assert all(r.hyper == best[r.optimizer].hyper for r in repeated)


def test_one_folder_has_one_scheduler_one_study_and_one_tokenizer(make_study, tmp_path):
    study = read_study(make_study())
    output = tmp_path / "out"
    with open_study(study, output):
        assert refusal(study, output).startswith("another process")
    other = read_study(make_study(STUDY.replace("name: small", "name: other")))
    assert "belongs to the study 'small'" in refusal(other, output)
    (tmp_path / "tokenizer.model").write_bytes(b"another tokenizer")
    assert "different tokenizers" in refusal(study, output)


def test_missing_data_and_tokenizer_are_named(make_study, tmp_path):
    study = read_study(make_study())
    (tmp_path / "valid.idx").unlink()
    assert f"no data file {tmp_path / 'valid.idx'}" in refusal(study, tmp_path / "out")


def test_a_narrow_terminal_shows_whole_numbers(make_study, tmp_path, capsys):
    from rich.console import Console

    from megatron_opt.study.dataset import from_store
    from megatron_opt.study.display import print_summary

    output = tmp_path / "out"
    run(make_study(), output)
    capsys.readouterr()
    with Store(output / "study.sqlite") as store:
        print_summary(Console(width=80), from_store(store))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("25,600", "2.00", "0.032", "tiny@1x", "diverged)")) and "…" not in shown
