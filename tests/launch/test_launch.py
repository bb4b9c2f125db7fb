"""`megatron-opt train`: rank counts, exit codes, restarts."""

import subprocess
import sys
import textwrap

import pytest

from megatron_opt import launch
from megatron_opt.errors import UserError
from megatron_opt.launch import Machine, rank_count
from megatron_opt.training import events


@pytest.mark.parametrize(
    "host, flags, ranks",
    [
        (Machine(8, 0), {}, 8),
        (Machine(8, 4), {}, 4),
        (Machine(8, 0), {"tensor-model-parallel-size": "2", "pipeline-model-parallel-size": "2"}, 8),
        (Machine(6, 0), {"tensor-model-parallel-size": "4"}, 4),
        (Machine(2, 0), {"tensor-model-parallel-size": "2", "pipeline-model-parallel-size": "2"}, 4),  # shared cores
        (Machine(8, 0), {"global-batch-size": "12", "micro-batch-size": "2"}, 6),
        (Machine(8, 0), {"global-batch-size": "7", "micro-batch-size": "1"}, 7),
        (Machine(4, 0), {"global-batch-size": "5", "micro-batch-size": "5"}, 1),
    ],
)
def test_rank_count(host, flags, ranks):
    assert rank_count(host, flags) == ranks


def test_gpus_are_not_shared():
    with pytest.raises(UserError, match="4 ranks a model copy and this machine has 2 GPUs"):
        rank_count(Machine(64, 2), {"tensor-model-parallel-size": "4"})


def test_flags_of_a_preset_count():
    flags = launch.effective_flags(["--preset", "llama-7b", "--tensor-model-parallel-size=2", "--bf16", "--lr", "-1"])
    assert flags["global-batch-size"] == "1024" and flags["tensor-model-parallel-size"] == "2" and flags["bf16"] == ""


def words(*argv):
    own, training = launch._parser("train").parse_known_args(argv)
    return launch.torchrun_arguments(own, training, Machine(4, 0))


def test_restarts_only_where_there_is_something_to_resume():
    assert words("--lr", "1")[5] == "0"
    assert words("--save", "x")[5] == str(launch.RESTARTS)
    assert words("--save", "x", "--max-restarts", "7")[5] == "7"


def test_nodes_need_a_meeting_point():
    with pytest.raises(UserError, match="--rdzv-endpoint"):
        words("--nnodes", "2")
    line = " ".join(words("--nnodes", "1:2", "--rdzv-endpoint", "a:1", "--nproc-per-node", "3", "--lr", "1"))
    assert "--rdzv-backend c10d --rdzv-endpoint a:1" in line and "--standalone" not in line
    assert line.endswith("-m megatron_opt.pretrain --lr 1")


@pytest.mark.parametrize(
    "codes, code", [([2, -15], 2), ([143, 143], 143), ([138], 138), ([143, 1], 1), ([-9, 1], 1), ([1], 1)]
)
def test_exit_code_of_failures(codes, code):
    assert launch._exit_code(codes) == code


@pytest.fixture
def run(tmp_path):
    """Launch a module of the test's own under the real agent, in a process of its own."""

    def start(body, *argv):
        (tmp_path / "target.py").write_text(textwrap.dedent(body))
        command = [sys.executable, "-c", "import sys; from megatron_opt import cli; sys.exit(cli.main(sys.argv[1:]))"]
        command += ["train", "--module", "target", "--nproc-per-node", "2", *argv]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path)
        )

    return start


def _environment(folder):
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{folder}", "OMP_NUM_THREADS": "1"}


def test_bad_input_is_not_restarted(run, tmp_path):
    process = run(
        f"""
        import os
        open(r"{tmp_path}/" + "started-" + os.environ["RANK"], "a").write("x")
        if os.environ["RANK"] == "1":
            os._exit(2)
    """,
        "--max-restarts",
        "3",
    )
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert (tmp_path / "started-1").read_text() == "x"


def test_a_killed_rank_is_restarted_and_the_ranks_meet_in_a_new_store(run, tmp_path):
    process = run(
        f"""
        import os, signal, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        x = torch.ones(1)
        dist.all_reduce(x)
        group = dist.new_group([0, 1])
        dist.all_reduce(x, group=group)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(x, group=group)
        open(r"{tmp_path}/" + "sum-" + str(dist.get_rank()), "w").write(str(x.item()))
        dist.destroy_process_group()
    """,
        "--max-restarts",
        "1",
    )
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["8.0", "8.0"]


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_reaches_the_ranks_and_is_the_exit_code(run, tmp_path, name, code):
    import signal
    import time

    process = run(
        f"""
        import os, signal, sys, time
        def saved(number, frame):
            open(r"{tmp_path}/" + "saved-" + os.environ["RANK"], "w").write(str(number))
            os._exit(128 + number)
        signal.signal(signal.{name}, saved)
        open(r"{tmp_path}/" + "ready-" + os.environ["RANK"], "w").close()
        time.sleep(100)
    """,
        "--max-restarts",
        "3",
    )
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == code
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_a_failed_rank_is_named_and_the_end_of_the_run_noted(run, tmp_path):
    process = run(
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(60)
    """,
        "--output-dir",
        str(tmp_path),
    )
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1 and "local rank 1 left with 7" in log
    died, failed = events.read(tmp_path)
    assert (died["event"], died["ranks"], died["restart"]) == ("rank_died", {"1": "left with 7"}, 0)
    assert (failed["event"], failed["code"]) == ("failed", 1)
