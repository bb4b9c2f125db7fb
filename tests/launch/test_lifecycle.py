"""What became of a run, after every order of events that its log can have."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt import lifecycle, run_files, status

QUIET = ("skip", "straggler", "damaged", "prune", "resume")  # tell nothing about where the run stands


def event(name, **fields):
    return {"time": 1000.0, "event": name, "rank": 0, **fields}


@st.composite
def lives(draw, generation):
    """(events of one process of a run, what is true of it afterwards)."""
    log = [event("restart" if generation else "start", restart=generation)]
    noise = st.lists(st.sampled_from(QUIET).map(lambda name: event(name, restart=generation)), max_size=3)
    log += draw(noise)
    saves = draw(st.integers(0, 2))
    log += [event("save", iteration=10 * n, restart=generation) for n in range(saves)] + draw(noise)
    late = [event("save", iteration=99, restart=generation)] * draw(st.integers(0, 1))
    fallen = [event("error", reason="peer", rank=r, restart=generation) for r in range(draw(st.integers(0, 3)))]
    end = draw(st.sampled_from("alive refused given-up signal interrupted completed died hang rollback failed".split()))
    if end == "alive":
        return log, ("running" if saves else "starting")
    if end in ("refused", "given-up"):
        log += [event("refused", reason="no", rank=r) for r in range(draw(st.integers(1, 3)))]
        return log + [event("failed", code=2)] * (end == "given-up"), "refused: no"
    if end == "signal":  # a save under way may end before or after; the end may be cut off, ranks may fall over
        log += [event("signal", signal="SIGTERM"), *late, *fallen]
        log += [event("end", status="interrupted", signal="SIGTERM")] * draw(st.integers(0, 1))
        return log + draw(noise), "left on SIGTERM"
    if end == "interrupted":
        return [*log, event("end", status="interrupted", reason="--exit-interval 20"), *late, *fallen], (
            "interrupted: --exit-interval 20"
        )
    if end == "completed":
        verdict = draw(st.sampled_from(["completed", "diverged"]))
        return [*log, event("end", status=verdict), *late, *fallen], verdict
    if end == "died":
        dead = event("rank_died", ranks={"1": "was killed by signal 9"}, restart=generation)
        return [*log, *draw(st.permutations([*fallen, dead]))], "stopped: rank 1 was killed by signal 9"
    if end == "hang":
        return [*log, event("hang", guilty=[1], restart=generation)], "stopped: held up by rank 1"
    if end == "rollback":
        return [*log, event("rollback", to=10, restart=generation)], "stopped: going back to iteration 10"
    return [*log, *fallen, event("failed", code=1)], "failed with exit code 1"


@st.composite
def logs(draw):
    """(a log of one to four processes, what is true at its end)."""
    log, truth = [], ""
    for generation in range(draw(st.integers(1, 4))):
        generation = draw(st.sampled_from([0, generation]))  # restarted by the launcher, or by hand
        more, truth = draw(lives(generation))
        log += more
    return log, truth


@given(logs())
def test_every_log_tells_its_end(drawn):
    log, truth = drawn
    assert lifecycle.after(log).text == truth


@given(logs(), st.randoms(use_true_random=False))
def test_no_order_is_beyond_it_and_a_start_forgets(drawn, random):
    log, _ = drawn
    shuffled = random.sample(log, len(log))
    assert lifecycle.after(shuffled).text
    assert lifecycle.after([*shuffled, event("start")]).text == "starting"
    assert lifecycle.after([*shuffled, event("start"), event("save")]).text == "running"


@given(logs(), logs())
def test_the_past_changes_nothing(one, other):
    assert lifecycle.after([*other[0], *one[0]]).text == one[1]


def test_the_last_words_of_replaced_ranks_come_late():
    log = [event("start"), event("restart", restart=1), event("rank_died", ranks={"0": "left with 1"}, restart=0)]
    assert lifecycle.after(log).text == "starting"


SIGTERM = """\
{"time": 1795874339.916, "event": "start", "rank": 0, "restart": 0, "train_iters": 300, "world_size": 1}
{"time": 1795874351.045, "event": "save", "rank": 0, "restart": 0, "iteration": 20, "seconds": 0.811}
{"time": 1795874352.079, "event": "signal", "rank": 0, "restart": 0, "signal": "SIGTERM", "ranks": 1}
{"time": 1795874352.865, "event": "save", "rank": 0, "restart": 0, "iteration": 21, "seconds": 0.785}
"""


def test_a_run_that_saved_on_sigterm_is_not_running(tmp_path):
    (tmp_path / run_files.EVENTS).write_text(SIGTERM)
    found = status.look(tmp_path)
    assert (found.state, found.checkpoint) == ("left on SIGTERM", 21)


def test_a_refused_restart_is_not_completed(tmp_path):
    rows = [event("start", train_iters=20), event("end", status="completed"), event("start", train_iters=30)]
    rows.append(event("refused", reason="another model"))
    (tmp_path / run_files.EVENTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / run_files.RESULTS).write_text('{"status": "completed"}')
    assert status.look(tmp_path).state == "refused: another model"


def row(iteration, loss, **more):
    return json.dumps({"kind": "train", "iteration": iteration, "loss": loss, **more}) + "\n"


@pytest.fixture
def metrics(tmp_path):
    """A run killed at step 3 that went on from step 1: steps 2 and 3 twice, evaluations apart by split."""
    path = tmp_path / run_files.METRICS
    evaluation = {"kind": "eval", "iteration": 2, "loss": 5.0}
    text = row(1, 9) + row(2, 8) + json.dumps({**evaluation, "split": "valid"}) + "\n" + row(3, 7) + '{"kind": "tr\n'
    text += row(2, 6) + json.dumps({**evaluation, "split": "test", "loss": 4.0}) + "\n" + row(3, 5)
    path.write_text(text)
    return path


def test_readers_keep_the_last_of_a_step(metrics):
    from megatron_opt.study.curves import read_metrics

    rows = run_files.metrics(metrics)
    assert [(r["iteration"], r["loss"]) for r in run_files.training(rows)] == [(1, 9), (2, 6), (3, 5)]
    assert [r["loss"] for r in run_files.evaluations(rows)] == [5.0]
    assert [r["loss"] for r in run_files.evaluations(rows, "test")] == [4.0]
    assert [point["loss"] for point in read_metrics(metrics).train] == [9, 6, 5]
    run = metrics.parent
    assert status.look(run).loss == 5


def test_the_file_agrees_after_a_resume(metrics):
    kept = run_files.forget_after(metrics, 2)
    assert [r["iteration"] for r in run_files.training(kept)] == [1, 2]
    assert run_files.lines(metrics) == kept
    superseded = Path(metrics.parent, "metrics.superseded.jsonl").read_text()
    assert row(2, 8) in superseded and row(3, 5) in superseded
    again = metrics.read_bytes()
    assert run_files.forget_after(metrics, 2) == kept and metrics.read_bytes() == again
    shutil.rmtree(metrics.parent)
    assert run_files.forget_after(metrics, 2) == []
