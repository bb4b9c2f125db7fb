"""A whole small run: what it prints and leaves behind; a diverging one is a result, not a failure."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from megatron_opt import run_files
from tests.distributed.pool import write_dataset

FLAGS = [
    "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16",
    "--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "6", "--lr", "3e-3",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--eval-iters", "2", "--eval-interval", "3",
    "--attention-dropout", "0", "--hidden-dropout", "0", "--log-interval", "2", "--swiglu", "--normalization", "RMSNorm",
    "--position-embedding-type", "rope", "--disable-bias-linear", "--untie-embeddings-and-output-weights",
    "--tensorboard-log-interval", "2", "--log-timers-to-tensorboard",
]  # fmt: skip


def run(folder, *more):
    prefix = write_dataset(folder / "text")
    command = [sys.executable, "-m", "megatron_opt.pretrain", *FLAGS, "--train-data-path", prefix,
               "--valid-data-path", prefix, "--test-data-path", prefix, "--output-dir", str(folder / "out"), *more]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def read(folder):
    lines = run_files.lines(folder / "out" / run_files.METRICS)
    return json.loads((folder / "out" / "results.json").read_text()), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, "--optimizer", "muon", "--megatron-log", "--tensorboard-dir", str(folder / "tensorboard"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_results(finished):
    result, _ = read(finished[0])
    assert result["status"] == "completed" and result["diverged"] is False and result["optimizer"] == "muon"
    assert result["tokens"] == 6 * 8 * 16 and result["iterations"] == 6
    hidden, ffn = 32, 64  # Megatron's default for SwiGLU: 8/3 of the width, down to a multiple of 64
    matrices = 2 * (4 * hidden**2 + 3 * hidden * ffn) + 5 * hidden
    assert result["params_non_embedding"] == matrices
    assert result["params_total"] == matrices + 2 * 128 * hidden
    assert 0 < result["final_valid_loss"] < math.log(128) and math.isfinite(result["final_train_loss"])
    assert result["tokens_per_s"] > 0 and result["peak_memory_bytes"] > 1e8 and result["flops_per_s"] > 0
    assert {"total", "forward_backward", "optimizer", "communication"} <= set(result["step_time_s"])
    split = result["step_time_s"]
    assert split["forward_backward"] + split["optimizer"] <= split["total"]  # evaluation counts in none of them
    assert result["config"]["hidden_size"] == 32 and "--optimizer" in result["argv"]
    assert result["versions"]["megatron_core"].startswith("0.19.2")


def test_the_record_holds_what_trained(finished):
    folder = finished[0]
    result, _ = read(folder)
    record = json.loads((folder / "out" / "config.json").read_text())
    assert record["groups"] == result["groups"] and record["config"] == result["config"]
    muon, adamw = record["groups"][0], record["groups"][-1]
    assert muon["optimizer"] == "muon" and muon["options"]["momentum"] == 0.98 and muon["lr"] == 3e-3
    assert (adamw["optimizer"], adamw["lr"]) == ("adamw", pytest.approx(9e-4))
    assert (adamw["options"]["beta2"], adamw["options"]["eps"]) == (0.98, 1e-15)
    config = record["config"]
    assert config["rule_adamw_beta2"] == 0.98 and "adam_beta2" not in config
    assert not [key for key, value in config.items() if key.startswith("rule_") and value is None]
    assert record["flags"]["optimizer"] == "muon" and "micro-batch-size" in record["flags"]
    (dataset,) = record["data"]
    assert len(dataset["idx_sha256"]) == 64 and dataset["bin_bytes"] > 0
    assert (record["validation"]["samples"], record["validation"]["tokens"]) == (16, 16 * 16)
    assert {"torch", "megatron_core", "megatron_opt", "python"} <= set(record["versions"])


def test_the_log_is_whole(finished):
    log = (finished[0] / "out" / "logs" / "rank-0.txt").read_text()
    assert "lm loss" in log and "validation loss at iteration 6" in log


def test_metrics(finished):
    result, lines = read(finished[0])
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in train] == [2, 4, 6]
    assert all(line["tokens"] == line["iteration"] * 8 * 16 for line in train)
    assert {group: set(norms) for group, norms in train[0]["groups"].items()} == {
        name: {"weight_norm", "update_norm"} for name in train[0]["groups"]
    }
    evaluations = [(line["split"], line["iteration"]) for line in lines if line["kind"] == "eval"]
    assert ("valid", 3) in evaluations and ("valid", 6) in evaluations and ("test", 6) in evaluations
    assert lines[-2]["loss"] == result["final_valid_loss"]


def test_log_lines_have_true_numbers(finished):
    rates = re.findall(r"TFLOP/s/GPU\): ([0-9.e-]+)", finished[1])
    assert rates and all(float(rate) > 0 for rate in rates)
    memory = re.search(r"max allocated: ([0-9.]+)", finished[1])
    assert memory and float(memory[1]) > 100  # MB
    assert "kind" in finished[1] and re.search(r"muon\s+hidden\s+14", finished[1])


def test_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"lm loss", "learning-rate", "grad-norm", "tokens-per-second", "step-time/total",
              "step-time/forward-backward", "step-time/optimizer", "step-time/communication"}  # fmt: skip
    assert wanted <= tags
    assert any(tag.startswith("update-norm/muon") for tag in tags)
    assert any(tag.startswith("weight-norm/adamw") for tag in tags)


def test_divergence_is_a_result(tmp_path):
    done = run(tmp_path, "--optimizer", "adamw", "--lr", "1e4", "--weight-decay", "0", "--clip-grad", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    result, _ = read(tmp_path)
    assert result["status"] == "diverged" and result["diverged"] is True
    lines = done.stdout.splitlines()
    assert len([line for line in lines if re.match(r" +[246]/6 ", line)]) == 3 and len(lines) < 20, done.stdout
    assert "lm loss" not in done.stdout and "lm loss" in (tmp_path / "out" / "logs" / "rank-0.txt").read_text()


def test_curvatures_cost_is_in_the_log_and_the_results(tmp_path):
    done = run(tmp_path, "--optimizer", "sophia", "--sophia-curvature-every", "2", "--sophia-curvature", "hutchinson")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.findall(r" curvature: ([0-9.]+) ms a step, ([0-9.]+)% of it", done.stdout)
    assert len(shown) == 3 and all(0 < float(share) < 100 for _, share in shown)
    result, lines = read(tmp_path)
    split = result["step_time_s"]
    assert (
        0 < split["curvature"] and split["curvature"] + split["forward_backward"] + split["optimizer"] <= split["total"]
    )
    assert all(line["split"]["curvature"] > 0 for line in lines if line["kind"] == "train")


def test_a_hybrid_model_that_needs_a_gpu_is_refused_before_it_is_built():
    from argparse import Namespace

    from megatron_opt.errors import UserError
    from megatron_opt.training.flags import checks

    with pytest.raises(UserError, match=r"--hybrid-layer-pattern M-.*GPU"):
        checks.trainable(Namespace(hybrid_layer_pattern="M-"))
    checks.trainable(Namespace(hybrid_layer_pattern="*-"))
