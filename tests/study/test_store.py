"""The store: concurrent writers, full disks, foreign files, round trips."""

import csv
import json
import multiprocessing
import sqlite3

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.curves import Curve, from_parquet, read_metrics, to_parquet
from megatron_opt.study.dataset import from_store
from megatron_opt.study.exchange import export_curves, export_runs, read_curves, read_runs
from megatron_opt.study.fits.observations import observations
from megatron_opt.study.report.csv_files import write_runs_csv
from megatron_opt.study.runs import make_run
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import VERSION, Store
from megatron_opt.study.study_file import read_study

RESULTS = {"diverged": False, "final_valid_loss": 3.25, "tokenizer": {"sha256": "a" * 64}}
CURVE = Curve(
    [
        {
            "kind": "train",
            "iteration": i,
            "tokens": 10 * i,
            "loss": 5 - 0.1 * i,
            "lr": 1e-3,
            "extra_key": {"qkv": 0.5},
        }
        for i in range(1, 6)
    ],
    [{"kind": "eval", "iteration": 5, "tokens": 50, "loss": 4.4}],
)


@pytest.fixture
def runs(make_study):
    study = read_study(make_study())
    space = study.optimizers["adamw"]
    return [make_run(study, "adamw", Regime("tiny", 1.0), space.start | {"lr": 0.001 * (i + 1)}, 1) for i in range(40)]


@pytest.fixture
def filled(runs, tmp_path):
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.plan("grid", runs[:4], {"tiny": 20480})
        for i, run in enumerate(runs[:3]):
            assert store.claim(run.id, "pid 1")
            bad = i == 2
            store.finish(
                run.id,
                RESULTS | {"diverged": bad, "final_valid_loss": None if bad else 3.25 + i},
                to_parquet(CURVE),
            )
    return tmp_path / "s.sqlite"


def worker(path, ids, results):
    with Store(path) as store:
        claimed = [run for run in ids if store.claim(run, "w")]
        for run in claimed:
            store.finish(run, RESULTS, None)
        results.put(claimed)


def test_concurrent_writers_never_share_a_run(runs, tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path, create=True) as store:
        store.plan("grid", runs, {"tiny": 20480})
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(path, [r.id for r in runs], results)) for _ in range(4)]
    for one in workers:
        one.start()
    claimed = [results.get(timeout=60) for _ in workers]
    for one in workers:
        one.join(60)
    assert sorted(run for part in claimed for run in part) == sorted(run.id for run in runs)
    with Store(path) as store:
        assert all(r.status == "completed" and r.attempts == 1 for r in store.runs())


def test_a_result_is_filed_once_and_planning_again_changes_nothing(filled, runs):
    with Store(filled) as store:
        assert not store.finish(runs[0].id, RESULTS | {"final_valid_loss": 9.0}, None)
        assert not store.claim(runs[0].id, "again")
        before = store.rows()
        store.plan("grid", runs[:4], {"tiny": 20480})
        assert store.rows() == before
        store.plan("seeds", runs[:1], {"tiny": 20480})
        assert store.phases() == {"grid": sorted(r.id for r in runs[:4]), "seeds": [runs[0].id]}


def test_a_full_disk_is_said_and_loses_nothing(filled, runs):
    with Store(filled) as store:
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match="free some space"):
            store.plan("grid", runs, {"tiny": 20480})
        assert len(store.runs()) == 4
    with Store(filled) as store:
        assert [r.loss for r in store.runs()].count(3.25) == 1
        assert store._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_foreign_newer_and_missing_stores_are_refused_and_untouched(filled, tmp_path):
    with sqlite3.connect(filled) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    before = filled.read_bytes()
    with pytest.raises(UserError, match="newer version"):
        Store(filled)
    assert filled.read_bytes() == before
    (tmp_path / "text.sqlite").write_text("not a database at all, " * 100)
    with pytest.raises(UserError, match="not a readable study store"):
        Store(tmp_path / "text.sqlite")
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE recipes (name)")
    db.close()
    with pytest.raises(UserError, match="something else"):
        Store(tmp_path / "other.sqlite")
    with pytest.raises(UserError, match="no study store"):
        Store(tmp_path / "none.sqlite")
    for command in (["status"], ["report"], ["fit"], ["verify"]):
        with pytest.raises(UserError, match="no study store"):
            cli.main([*command, str(tmp_path)], "study")


def test_runs_are_found_by_the_start_of_their_id_or_named_as_missing(filled, runs):
    with Store(filled) as store:
        assert store.run(runs[0].id[:10]).id == runs[0].id
        with pytest.raises(UserError, match="no runs 'zzz'"):
            store.run("zzz")


def test_mixed_tokenizers_are_refused(filled, runs):
    with Store(filled) as store:
        store.claim(runs[3].id, "pid 2")
        store.finish(runs[3].id, RESULTS | {"tokenizer": {"sha256": "b" * 64}}, None)
        with pytest.raises(UserError, match="different tokenizers"):
            from_store(store)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_export_and_import_keep_every_value(filled, tmp_path, suffix):
    file, curves = tmp_path / f"runs.{suffix}", tmp_path / "curves.parquet"
    with Store(filled) as store:
        assert export_runs(store, file) == 4 and export_curves(store, curves) == 3
        rows, phases = store.rows(), store.phases()
    with Store(tmp_path / "copy.sqlite", create=True) as copy:
        assert copy.import_runs(read_runs(file), read_curves(curves)) == 4
        for before, after in zip(rows, copy.rows()):
            assert {k: v for k, v in before.items() if k != "job"} == {k: v for k, v in after.items() if k != "job"}
        assert copy.phases() == phases
        assert copy.curve(rows[0]["id"]) == CURVE
        assert copy.import_runs(read_runs(file), read_curves(curves)) == 0


def test_a_contradiction_or_a_bad_row_imports_nothing(filled, tmp_path):
    file = tmp_path / "runs.csv"
    with Store(filled) as store:
        export_runs(store, file)
        rows = list(csv.DictReader(file.open()))
        rows[0]["loss"] = "1.0"
        rows.append(rows[1] | {"id": "f" * 16})

        def write(rows):
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, rows[0])
                writer.writeheader()
                writer.writerows(rows)

        write(rows)
        with pytest.raises(UserError, match="nothing was imported"):
            store.import_runs(read_runs(file), {})
        write([rows[1] | {"loss": "low"}])
        with pytest.raises(UserError, match="row 2"):
            store.import_runs(read_runs(file), {})
        other = json.dumps(RESULTS | {"tokenizer": {"sha256": "c" * 64}})
        write([rows[1] | {"id": "e" * 16, "results": other}])
        with pytest.raises(UserError, match="another tokenizer"):
            store.import_runs(read_runs(file), {})
        file.write_text("optimizer,loss\nadamw,3\n")
        with pytest.raises(UserError, match="lacks the columns model, ratio, parameters, tokens"):
            store.import_runs(read_runs(file), {})
        assert len(store.runs()) == 4


def test_results_of_another_program_can_be_imported_and_reported(tmp_path, capsys):
    file = tmp_path / "mine.csv"
    file.write_text(
        "optimizer,model,ratio,parameters,tokens,loss,hyper\n"
        'adamw,s,1,1000000,20000000,3.5,"{""lr"": 0.01}"\nadamw,s,1,1000000,20000000,,"{""lr"": 0.1}"\n'
        'mine,s,1,1000000,20000000,3.4,"{""lr"": 0.02}"\n'
    )
    assert cli.main(["import", str(tmp_path / "out"), str(file)], "study") == 0
    assert cli.main(["report", str(tmp_path / "out")], "study") == 0
    shown = capsys.readouterr().out
    assert "3 runs added" in shown and "3.4000" in shown
    assert (tmp_path / "out" / "report" / "index.html").is_file()


def test_the_reports_own_runs_can_be_imported_and_give_the_same_report(filled, tmp_path):
    with Store(filled) as store:
        dataset = from_store(store)
        write_runs_csv(dataset, tmp_path / "runs.csv")
        export_runs(store, tmp_path / "exported.csv")
        rows = store.rows()
    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in ("runs.csv", "exported.csv")]
    assert lines[0] == lines[1]
    assert cli.main(["import", str(tmp_path / "out"), str(tmp_path / "runs.csv")], "study") == 0
    with Store(tmp_path / "out" / "study.sqlite") as copy:
        again = {row["id"]: row for row in copy.rows()}
        assert copy.phases() == dataset.phases
        write_runs_csv(from_store(copy), tmp_path / "again.csv")
    for row in rows:
        assert {k: v for k, v in row.items() if k != "job"} == {k: v for k, v in again[row["id"]].items() if k != "job"}
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "runs.csv").read_text()


@pytest.mark.parametrize(
    "row,words",
    [
        ("adamw,s,1,10,200,-3,", "a final loss of -3 is impossible, a cross-entropy is above 0"),
        ("adamw,s,1,10,200,inf,completed", "a completed run with the loss inf"),
        ("adamw,s,1,10,200,nan,completed", "a completed run with the loss nan"),
        ("adamw,s,1,10,200,,completed", "a completed run without a loss"),
        ("adamw,s,1,10,200,3,diverged", "only completed runs have one"),
        ("adamw,s,1,10,200,3,done", "no status 'done'"),
        ("adamw,s,nan,10,200,3,", "ratio and tokens must be greater than 0"),
        ("adamw,s,1,inf,200,3,", "row 3"),
    ],
)
def test_losses_are_checked_and_a_refused_import_leaves_no_folder(tmp_path, row, words):
    file = tmp_path / "mine.csv"
    file.write_text(f"optimizer,model,ratio,parameters,tokens,loss,status\nadamw,s,1,10,200,3.5,\n{row}\n")
    with pytest.raises(UserError, match="row 3") as caught:
        cli.main(["import", str(tmp_path / "new" / "out"), str(file)], "study")
    assert words in str(caught.value) and not (tmp_path / "new").exists()


def test_runs_that_blew_up_are_imported_as_diverged_and_a_contradiction_leaves_no_folder(tmp_path):
    file = tmp_path / "mine.csv"
    head = "optimizer,model,ratio,parameters,tokens,loss,hyper\n"
    file.write_text(head + "adamw,s,1,10,200,3.5,\n" + 'adamw,s,1,10,200,inf,"{""lr"": 1}"\n')
    assert cli.main(["import", str(tmp_path / "out"), str(file)], "study") == 0
    with Store(tmp_path / "out" / "study.sqlite") as store:
        assert sorted((r.status, r.loss) for r in store.runs()) == [("completed", 3.5), ("diverged", None)]
    file.write_text(head + "adamw,s,1,10,200,3.5,\nadamw,s,1,10,200,3.6,\n")
    with pytest.raises(UserError, match="nothing was imported"):
        cli.main(["import", str(tmp_path / "other"), str(file)], "study")
    assert not (tmp_path / "other").exists()


def test_metrics_survive_torn_lines_and_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(point) for point in [*CURVE.train, CURVE.valid[0] | {"split": "valid"}]]
    path.write_text("\n".join([lines[0].replace("4.9", "9.9"), *lines, '{"kind": "train", "iter']))
    curve = read_metrics(path)
    assert [p["loss"] for p in curve.train] == [p["loss"] for p in CURVE.train]
    assert from_parquet(to_parquet(curve)).train == CURVE.train
    assert read_metrics(tmp_path / "none") == Curve()


def test_a_regime_without_a_baseline_cannot_be_fitted(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("optimizer,model,ratio,parameters,tokens,loss\nadamw,s,1,10,200,3.5\nmine,s,2,10,400,3.4\n")
    cli.main(["import", str(tmp_path / "out"), str(file)], "study")
    with pytest.raises(UserError, match="regime s@2x has results of mine but none of the baseline adamw"):
        cli.main(["fit", str(tmp_path / "out")], "study")
    with pytest.raises(UserError, match="--without s@3x: no runs of it; did you mean s@2x"):
        cli.main(["fit", str(tmp_path / "out"), "--without", "s@3x"], "study")
    with pytest.raises(UserError, match="the baseline 'adamw' has no runs"):
        cli.main(["fit", str(tmp_path / "out"), "--without", "s@1x", "s@2x"], "study")
    with Store(tmp_path / "out" / "study.sqlite") as store:
        kept = observations(from_store(store).without(["s@2x"]))
    assert kept.loss.tolist() == [3.5]
