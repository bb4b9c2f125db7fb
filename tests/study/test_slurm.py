"""The Slurm executor on a real Slurm: a study, a cancelled job, a dead scheduler, two nodes, bad options."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli, downstream, scheduler
from megatron_opt.study.executors import Job, base, slurm
from megatron_opt.study.executors.slurm import SlurmExecutor
from megatron_opt.study.spec import ExecutorSettings
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study
from tests import apart
from tests.study.conftest import STUDY
from tests.study.slurm_cluster import Cluster, missing
from tests.study.test_downstream import FAKE

ON_SLURM = STUDY.replace("executor:\n  jobs: 2", "executor:\n  kind: slurm\n  slurm: {partition: debug}")


@pytest.fixture(scope="module")
def cluster():
    if missing():
        pytest.skip(missing())
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def on_slurm(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.3)
    return cluster


def records(output):
    with Store(output / "study.sqlite") as store:
        return store.runs()


@pytest.mark.slow
def test_a_study_runs_through_slurm(on_slurm, make_study, tmp_path):
    output = tmp_path / "out"
    assert cli.main(["run", str(make_study(ON_SLURM)), "--output", str(output)], "study") == 0
    found = records(output)
    assert len(found) == 6 and all(r.attempts == 1 and r.job.startswith("slurm ") for r in found)
    assert sum(r.status == "diverged" for r in found) == 1


@pytest.mark.slow
def test_a_cancelled_job_goes_on_from_its_checkpoint(on_slurm, make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.15")
    output = tmp_path / "out"
    text = ON_SLURM.replace("[0.004, 0.008, 0.064]", "[0.004]").replace("[0.008, 0.016, 0.032]", "[0.008]")
    study = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from megatron_opt.study.executors import slurm; slurm.POLL_SECONDS = 0.3\n"
            "from megatron_opt.study import cli; sys.exit(cli.main(sys.argv[1:], 's'))",
            "run",
            str(make_study(text)),
            "--output",
            str(output),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
    )
    end = time.monotonic() + 60
    while not list(output.glob("runs/*/ledger")) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)
    cancelled = next(output.glob("runs/*/ledger")).parent.name
    subprocess.run(["scancel", "--name", cancelled], check=True)
    _, errors = study.communicate(timeout=120)
    assert study.returncode == 0, errors
    run = next(r for r in records(output) if r.id == cancelled)
    assert run.status == "completed" and run.attempts == 2 and run.interruptions == 1
    steps = (output / "runs" / cancelled / "ledger").read_text().split()
    assert len(set(steps)) == 20 and len(steps) <= 21


@pytest.mark.slow
def test_jobs_outlive_the_scheduler_and_are_adopted(on_slurm, make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.1")
    output = tmp_path / "out"
    path = make_study(ON_SLURM)
    study = subprocess.Popen(
        [sys.executable, "-m", "megatron_opt.cli", "study", "run", str(path), "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
    )
    end = time.monotonic() + 60
    while not list(output.glob("runs/*/ledger")) and time.monotonic() < end:
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 130
    assert cli.main(["run", str(path), "--output", str(output)], "study") == 0
    assert all(r.attempts == 1 for r in records(output))


@pytest.mark.slow
def test_runs_are_evaluated_in_their_jobs(on_slurm, make_study, tmp_path, monkeypatch):
    (tmp_path / "evaluate.py").write_text(FAKE)
    monkeypatch.setattr(base, "EVALUATE", (str(tmp_path / "evaluate.py"),))  # by torchrun, as the real one
    monkeypatch.setattr(scheduler, "missing", lambda name: None)
    text = ON_SLURM.replace("[0.004, 0.008, 0.064]", "[0.004]").replace("[0.008, 0.016, 0.032]", "[0.008]")
    path = make_study(text + "eval: {tasks: [mine]}\n")
    assert cli.main(["run", str(path), "--output", str(tmp_path / "out")], "study") == 0
    found = records(tmp_path / "out")
    assert len(found) == 2 and all(r.attempts == 1 and r.job.startswith("slurm ") for r in found)
    assert all(downstream.last(r.results)["mine"] for r in found)


REAL = """\
name: real
sequence_length: 64
tokens_per_parameter: 1
models:
  p: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
data: {tokenizer: tokenizer.model, train: train, valid: valid}
defaults: {batch_size: 8}
optimizers:
  adamw: {grid: {lr: [0.01]}}
eval: {tasks: [heldout], tasks_path: tasks, num_fewshot: 0, limit: 10}
executor: {kind: slurm, ranks: 1, retries: 0, slurm: {partition: debug}}
flags: {eval_iters: 1}
checkpoints: 1
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_training_and_evaluation_through_slurm(on_slurm, real_data, monkeypatch):
    from megatron_opt.evaluation import make_tasks

    apart.lm_eval()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), apart.FOLDER]))
    make_tasks.make([str(real_data / "valid.jsonl")], real_data / "tasks", 20)
    (real_data / "s.yaml").write_text(REAL)
    assert cli.main(["run", str(real_data / "s.yaml"), "--output", str(real_data / "out")], "study") == 0
    (run,) = records(real_data / "out")
    assert run.status == "completed" and run.attempts == 1 and run.job.startswith("slurm ")
    scores, items = downstream.last(run.results), downstream.items(run.results)
    assert set(items) == {"heldout_cloze", "heldout_word", "heldout_order"}
    for task, one in items.items():
        assert len(one.right) == 10 and scores[task]["metrics"]["acc"]["value"] == sum(one.right) / 10


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_counts_as_interrupted_whatever_its_launcher_says(on_slurm, tmp_path):
    launcher = "trap 'exit 1' TERM; touch started; sleep 60 & wait"
    executor = SlurmExecutor(ExecutorSettings(kind="slurm", command=("bash", "-c", launcher)), tmp_path)
    number = executor.submit(Job("told", tmp_path / "told", [])).split()[1]
    end = time.monotonic() + 60
    while not (tmp_path / "told" / "started").exists() and time.monotonic() < end:
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=TERM", number], check=True)
    while not (ended := executor.poll()) and time.monotonic() < end:
        time.sleep(0.1)
    assert [(one.run, one.code) for one in ended] == [("told", 143)]


@pytest.mark.slow
def test_a_job_on_two_nodes_starts_one_launcher_on_each(on_slurm, tmp_path):
    settings = ExecutorSettings(
        kind="slurm", nodes=2, ranks=2, command=("bash", "-c", "echo $SLURMD_NODENAME $0", slurm.RENDEZVOUS)
    )
    executor = SlurmExecutor(settings, tmp_path)
    executor.submit(Job("two", tmp_path / "two", []))
    end = time.monotonic() + 60
    while not (ended := executor.poll()) and time.monotonic() < end:
        time.sleep(0.1)
    assert [(one.run, one.code) for one in ended] == [("two", 0)]
    lines = sorted((tmp_path / "two" / "log.txt").read_text().split("\n"))
    nodes, places = zip(*(line.split() for line in lines if line))
    assert nodes == ("n1", "n2") and len(set(places)) == 1 and places[0].startswith("n1:")


@pytest.mark.slow
def test_a_refused_option_is_reported_and_nothing_is_lost(on_slurm, make_study, tmp_path):
    output = tmp_path / "out"
    bad = make_study(ON_SLURM.replace("partition: debug", "partition: nowhere"))
    with pytest.raises(UserError, match=r"sbatch refused .*partition"):
        cli.main(["run", str(bad), "--output", str(output)], "study")
    assert all(r.status == "planned" for r in records(output))
    assert cli.main(["run", str(make_study(ON_SLURM)), "--output", str(output)], "study") == 0


def test_the_script_starts_torchrun_on_every_node_and_quotes_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    settings = ExecutorSettings(
        kind="slurm",
        nodes=4,
        ranks=8,
        timeout_minutes=90,
        environment={"A": "b c"},
        slurm={"gpus_per_node": 8, "account": "lab"},
    )
    script = SlurmExecutor(settings, tmp_path)._script(Job("r1", tmp_path / "a b", ["--lr", "0.1", "--x", "$HOME"]))
    for line in (
        '#SBATCH --nodes="4"',
        '#SBATCH --gpus-per-node="8"',
        '#SBATCH --time="0:5400"',
        "export A='b c'",
        '#SBATCH --signal="B:TERM@120"',
    ):
        assert line in script
    assert '--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head:$port"' in script
    assert "'$HOME'" in script and f"'{tmp_path}/a b'" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def _steps(tmp_path, job, nodes=1):
    settings = ExecutorSettings(kind="slurm", nodes=nodes, ranks=8)
    return SlurmExecutor(settings, tmp_path)._script(job)


def test_the_evaluation_follows_the_training_on_the_same_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    job = Job("r1", tmp_path / "r1", ["--lr", "0.1"], ("a b", "--tasks", "mine"))
    script = _steps(tmp_path, job, nodes=2)
    train, evaluate = (line for line in script.splitlines() if " -m megatron_opt." in line)
    assert train.startswith("step ") and " -m megatron_opt.pretrain --lr 0.1 " in train
    assert evaluate.startswith('[ "$code" != 0 ] || step ') and evaluate.count('--rdzv-endpoint "$head:$port"') == 1
    assert (
        evaluate.endswith(" -m megatron_opt.cli eval 'a b' --tasks mine")
        and "--nnodes 2 --nproc-per-node 8" in evaluate
    )
    again = _steps(tmp_path, replace(job, trained=True))
    assert "megatron_opt.pretrain" not in again and "\nstep " in again
    assert "--standalone --nproc-per-node 8" in again and '"$head:$port"' not in again


@pytest.mark.parametrize(("train", "evaluate", "told", "code", "evaluated"), [
    ("true", "0", False, 0, True), ("exit 7", "0", False, 7, False), ("true", "5", False, 5, True),
    ("touch started; trap 'exit 0' TERM; sleep 30 & wait", "0", True, 143, False),
])  # fmt: skip
def test_the_script_itself_by_a_shell(tmp_path, monkeypatch, train, evaluate, told, code, evaluated):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "ONE_NODE", ("{python}",))
    monkeypatch.setattr(base, "EVALUATE", ("-c", f"open('evaluated', 'w'); raise SystemExit({evaluate})"))
    settings = ExecutorSettings(kind="slurm", command=("/bin/sh", "-c", train))
    script = SlurmExecutor(settings, tmp_path)._script(Job("r1", tmp_path, [], ("x",)))
    tools = 'srun() { shift 2; exec "$@"; }\nscontrol() { echo n1; }\nSLURM_JOB_ID=1\n'
    child = subprocess.Popen(["bash", "-c", tools + script], cwd=tmp_path)
    while told and not (tmp_path / "started").exists():
        time.sleep(0.02)
    if told:
        child.terminate()
    assert child.wait(20) == code and (tmp_path / "exit_code").read_text().strip() == str(code)
    assert (tmp_path / "evaluated").exists() == evaluated


def test_without_slurm_the_message_says_so(monkeypatch, make_study, tmp_path):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs sbatch"):
        SlurmExecutor(read_study(make_study(ON_SLURM)).executor, tmp_path)
