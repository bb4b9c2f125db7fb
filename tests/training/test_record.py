"""What a run records and says, piece by piece: progress over restarts, the fixed validation set, sinks, foresight, lines."""

import json
import math
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_opt import run_files
from megatron_opt.cost_model.flags import from_run, options
from megatron_opt.errors import UserError
from megatron_opt.training import console, foresight, sinks, validation
from megatron_opt.training.progress import Progress


def step(progress, iteration, loss, tokens=32, seconds=0.5):
    progress.take_loss(loss, 1.0)
    progress.take_time(1, seconds, tokens, tokens * 10.0, {"optimizer": seconds / 5})
    return {"kind": "train", "iteration": iteration, "loss": loss, "run": progress.as_row()}


def test_a_resumed_run_counts_from_its_log():
    whole = Progress()
    rows = [step(whole, n, 6.0 - n) for n in range(1, 4)]
    resumed = Progress.of_rows(json.loads(json.dumps(rows[:2])))
    step(resumed, 3, 3.0)
    assert resumed == whole and resumed.first_loss == 5.0 and not resumed.diverged(3.0)
    assert Progress.of_rows(rows[:2]).first_loss == 5.0, "the run is judged from its own first loss"
    assert Progress.of_rows([{"kind": "train", "iteration": 1, "loss": 7.0}]).first_loss == 7.0


def test_divergence_is_of_the_run():
    progress = Progress()
    step(progress, 1, 5.0)
    assert progress.diverged(5.0) and progress.diverged(6.0) and not progress.diverged(4.9)
    progress.take_loss(math.nan, math.nan)
    assert progress.diverged(4.9) and progress.last_loss == 5.0
    assert "grad_norm" not in progress.as_row()


def test_rates_under_growing_batches_are_tokens_over_time():
    progress = Progress()
    for tokens in (32, 64, 128):
        step(progress, 1, 5.0, tokens)
    assert progress.tokens_per_s == pytest.approx(224 / 1.5) and progress.flops_per_s == pytest.approx(2240 / 1.5)
    assert progress.train_time(224) == pytest.approx(1.5)
    assert progress.step_time() == pytest.approx({"total": 0.5, "optimizer": 0.1})


@pytest.mark.parametrize(("interval", "iteration", "first"), [(1, 8, False), (4, 8, False), (4, 9, True)])
def test_a_processs_first_line_is_of_its_own_steps(monkeypatch, interval, iteration, first):
    """Megatron keeps a process's first step for its next line; where that line is one of its own, two steps were averaged."""
    from megatron_opt.training import monitoring

    asked = []
    loop = SimpleNamespace(
        training_log=lambda *args, is_first_iteration=False, **_: asked.append(is_first_iteration),
        evaluate_and_print_results=None, evaluate=None, print_rank_last=None, get_forward_backward_func=None, train=None,
    )  # fmt: skip
    monkeypatch.setattr(sinks, "install", lambda *_: None)
    monkeypatch.setattr(monitoring.Monitor, "on_step", lambda *_: None)
    flags = {
        "log_interval": interval,
        "output_dir": None,
        "straggler_factor": 0,
        "straggler_window": 1,
        "log_fp8_ranges": False,
    }
    monitoring.Monitor(SimpleNamespace(**flags)).install(loop)
    loop.training_log({}, {}, 1e-3, iteration, 1.0, True, 0, 1.0, is_first_iteration=True)
    assert asked == [first]


class Text:
    """A dataset of `n` samples, sample i of tokens i."""

    index_split = "valid"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert 0 <= i < self.n
        return {"labels": torch.full((4,), i), "loss_mask": torch.ones(4)}


@pytest.mark.parametrize(("batch", "rounds"), [(2, 1), (3, 2), (5, 4), (8, 1)])
def test_every_evaluation_reads_the_same_samples_whatever_the_batch(batch, rounds):
    length = -(-5 // batch) * batch
    fixed = validation.Fixed(Text(9), 5, length, rounds)
    assert len(fixed) == length * rounds and fixed.index_split == "valid"
    for start in range(0, len(fixed), length):
        one = [fixed[start + i] for i in range(length)]
        counted = [int(sample["labels"][0]) for sample in one if sample["loss_mask"].sum()]
        assert counted == [0, 1, 2, 3, 4]


def test_the_identity_tells_sets_apart():
    one = validation.identity(Text(9), 5, 4)
    assert (one["samples"], one["tokens"], one["of_samples"], one["whole"]) == (5, 20, 9, False)
    assert one == validation.identity(Text(9), 5, 4)
    assert one["digest"] != validation.identity(Text(9), 6, 4)["digest"]
    assert validation.identity(Text(9), None, 4)["whole"] and validation.identity(Text(9), 50, 4)["samples"] == 9
    assert validation.identity(None, 5, 4) is None


GOOD = {
    "log_interval": 1, "tensorboard_log_interval": 1, "eval_interval": 10, "eval_iters": 2, "eval_samples": None,
    "full_validation": False, "given_flags": set(), "mock_data": False,
    "data_args_path": None, "per_split_data_args_path": None, "sft": False, "train_data_path": ["a"],
    "valid_data_path": ["b"], "data_path": None, "split": None, "wandb_project": "", "wandb_exp_name": "",
    "wandb_save_dir": "", "output_dir": None, "save": None,
}  # fmt: skip
BAD = [
    ({"log_interval": 0}, "--log-interval 0"),
    ({"tensorboard_log_interval": 0}, "--tensorboard-log-interval 0"),
    ({"eval_interval": 0}, "--eval-interval 0"),
    ({"eval_iters": -1}, "--eval-iters -1"),
    ({"eval_samples": 0}, "--eval-samples 0"),
    ({"eval_samples": 8, "full_validation": True}, "give one"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD)
def test_what_would_end_late_is_refused_at_start(wrong, says):
    with pytest.raises(UserError, match=says):
        foresight.check(Namespace(**GOOD | wrong))


def test_what_works_without_a_flag():
    none = Namespace(**GOOD | {"eval_iters": 0, "valid_data_path": None})
    foresight.check(none)
    whole = Namespace(**GOOD | {"full_validation": True})
    foresight.check(whole)
    assert whole.whole_validation and not whole.full_validation and whole.eval_iters > 0


def test_what_a_user_may_not_mean_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(console, "note", said.append)
    args = Namespace(
        rank=0, lr_decay_iters=40, train_iters=60, lr_decay_samples=None, train_samples=None, min_lr=0.0,
        lr_decay_style="cosine", attention_dropout=0.1, hidden_dropout=0.0, optimizer="adamw", optimizer_groups=None,
        scalar_lr_ratio=None, given_flags=set(),
    )  # fmt: skip
    foresight.tell(args)
    assert "--lr-decay-iters 40" in said[0] and "learning rate is 0" in said[0]
    assert "--attention-dropout 0.1" in said[1] and "hidden" not in said[1]
    said.clear()
    foresight.tell(Namespace(**vars(args) | {"lr_decay_iters": None, "attention_dropout": 0.0}))
    foresight.tell(Namespace(**vars(args) | {"rank": 1}))
    assert not said


def test_flags_of_matrices_without_a_matrix_rule_are_said_to_have_no_effect(monkeypatch):
    """Studies give all their runs the same flags, so that they are no error."""
    said = []
    monkeypatch.setattr(console, "note", said.append)
    args = Namespace(
        rank=0, lr_decay_iters=None, train_iters=60, lr_decay_samples=None, train_samples=None, attention_dropout=0.0,
        hidden_dropout=0.0, optimizer="lion", optimizer_groups=None, scalar_lr_ratio=None,
        given_flags={"matrix-mode", "split-heads", "exchange-dtype", "lr"},
    )  # fmt: skip
    foresight.tell(args)
    assert said == [
        "--matrix-mode, --exchange-dtype, --split-heads have no effect: --optimizer lion is element-wise, and no matrix is "
        "computed as a whole or sent."
    ]
    said.clear()
    for optimizer in ("muon", "adam_mini", "adam"):
        foresight.tell(Namespace(**vars(args) | {"optimizer": optimizer}))
    assert not said


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: keeps what it is given."""
    fake = SimpleNamespace(rows={}, inits=[], finished=0, run=SimpleNamespace(summary={}, id="abc123"))

    def init(**kwargs):
        fake.inits.append(kwargs)
        return fake.run

    def finish():
        fake.finished += 1

    fake.init, fake.finish = init, finish
    fake.log = lambda row, step: fake.rows.setdefault(step, {}).update(row)
    fake.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_series_without_tensorboard(wandb):
    writer = sinks.Writer(None, wandb)
    writer.add_scalar("lm loss", torch.tensor(5.0), 1)
    writer.add_scalar("lm loss vs samples", torch.tensor(5.0), 8)
    writer.add_scalar("tokens-per-second", 100.0, 1)
    writer.add_scalar("lm loss", torch.tensor(4.0), 2)
    writer.add_text("config", "{}")
    writer.close({"status": "completed", "final_valid_loss": 4.5, "layout": {"tp": 1}})
    assert wandb.rows == {1: {"lm loss": 5.0, "tokens-per-second": 100.0}, 2: {"lm loss": 4.0}}
    assert wandb.run.summary == {"status": "completed", "final_valid_loss": 4.5} and wandb.finished == 1


def test_wandb_needs_no_more_than_a_project(wandb, tmp_path, monkeypatch):
    args = Namespace(
        wandb_project="p", wandb_exp_name="", wandb_save_dir="", wandb_entity="", output_dir=str(tmp_path / "run7"),
        save=None, rank=0, world_size=1,
    )  # fmt: skip
    sinks.check(args)
    assert (args.wandb_exp_name, args.wandb_save_dir) == ("run7", str(tmp_path / "run7"))
    monkeypatch.setattr(sinks.record, "build", lambda _: {"optimizer": "muon"})
    fake = SimpleNamespace(_GLOBAL_WANDB_WRITER=None)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", fake)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(global_vars=fake))
    sinks.start_wandb(args)
    assert fake._GLOBAL_WANDB_WRITER is wandb and wandb.inits[0]["config"] == {"optimizer": "muon"}
    assert "id" not in wandb.inits[0]
    sinks.start_wandb(args)
    assert wandb.inits[1]["id"] == "abc123" and wandb.inits[1]["resume"] == "allow", "a resumed run is the same run"


def test_wandb_that_is_not_installed_is_said_at_start(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install wandb"):
        sinks.check(Namespace(wandb_project="p"))


def test_lines_are_aligned():
    table = console.Table(60, 1e12)
    first = table.row(1, 4.8, 3e-3, 1.234, 0.1656, 12345.0, 4e11, 2, 885 << 20)
    head, line = first.split("\n")
    other = table.row(10, None, None, None, 10.5, 1.0, None, 2, 3 << 30)
    assert len(head) == len(line) == len(other) and "\n" not in other
    assert "20.0%" in line and "885 MiB" in line and "1/60" in line and "3.00 GiB" in other and "0:08:45" in other


def test_a_killed_run_tells_its_flags(tmp_path):
    config = {"num_layers": 2, "hidden_size": 64, "lr": 0.1, "rule_muon_momentum": 0.9, "optimizer": "muon"}
    (tmp_path / run_files.CONFIG).write_text(json.dumps({"config": config, "world_size": 4}))
    flags = from_run(tmp_path)
    assert flags == {
        "num-layers": 2, "hidden-size": 64, "lr": 0.1, "muon-momentum": 0.9, "optimizer": "muon", "world-size": 4,
    }  # fmt: skip
    assert options(flags) == {"muon": {"momentum": 0.9}}
    (tmp_path / run_files.CONFIG).write_text("{}")
    with pytest.raises(UserError, match="has no `config`"):
        from_run(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        run_files.record(tmp_path / "none")
