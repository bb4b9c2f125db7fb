"""A batch that grows: whole steps, the same tokens as any other run, Megatron's own schedule; mistakes are named with their line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.batch_ramp import parse, ramp_of
from megatron_opt.study.runs import make_run
from megatron_opt.study.spec import Regime
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY


@given(st.integers(100, 5000), st.floats(0.02, 0.4), st.floats(0.02, 0.4))
def test_every_part_is_whole_steps_and_the_budget_is_kept(steps, first, second):
    samples = 8 * steps
    ramp = ramp_of(f"0:2 {first}:4 {first + second}:8", 8, samples)
    ends = (*ramp.starts[1:], ramp.samples)
    assert all((end - start) % batch == 0 and end > start for start, end, batch in zip(ramp.starts, ends, ramp.batches))
    assert samples - 8 < ramp.samples <= samples
    assert abs(ramp.starts[1] - first * samples) <= 2 and abs(ramp.starts[2] - (first + second) * samples) <= 4
    seen = done = 0
    while seen < ramp.samples:  # as Megatron counts them
        seen += max(batch for start, batch in zip(ramp.starts, ramp.batches) if start <= seen)
        done += 1
    assert (seen, done) == (ramp.samples, ramp.iterations)


def test_megatrons_calculator_reads_the_schedule_as_meant():
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator as Calculator

    ramp = ramp_of("0:2 0.25:4 0.5:8", 8, 800)
    text = ramp.flags(64)["step-batch-size-schedule"]
    calculator = Calculator(2, 1, False, 0, text, 64)
    for at, batch in ((0, 2), (ramp.starts[1] - 2, 2), (ramp.starts[1], 4), (ramp.starts[2], 8), (799, 8)):
        calculator.update(at, consistency_check=False)
        assert calculator.get_current_global_batch_size() == batch


def test_a_run_has_the_tokens_of_its_budget_and_a_schedule_in_samples(make_study):
    study = read_study(make_study(STUDY))
    hyper = {"lr": 0.004, "batch_size": 4, "warmup": 0.1}
    plain = make_run(study, "adamw", Regime("tiny", 1), hyper, 1)
    ramp = make_run(study, "adamw", Regime("tiny", 1), hyper | {"batch_ramp": "0:1 0.2:4"}, 1)
    flags = ramp.config["flags"]
    assert 0 <= plain.tokens - ramp.tokens < 4 * 64 and ramp.id != plain.id
    assert not {"global-batch-size", "train-iters", "lr-decay-iters"} & flags.keys()
    assert flags["lr-decay-samples"] == flags["train-samples"] and ramp.surroundings["micro-batch-size"] == 1
    assert flags["lr-warmup-samples"] == int(0.1 * flags["train-samples"])


@pytest.mark.parametrize(("text", "said"), [
    ("4", "such as"), ("0:2", "begin at 0 and grow"), ("0.1:2 0.5:4", "begin at 0"), ("0:2 1.5:4", "below 1"),
    ("0:4 0.5:2", "must grow and divide"), ("0:3 0.5:4", "must grow and divide"), ("0:1 0.5:2", "ends at a batch of 2"),
])  # fmt: skip
def test_what_is_no_ramp_says_why(text, said):
    with pytest.raises(UserError, match=said):
        parse(text, 4)


@pytest.mark.parametrize(("start", "more", "said"), [
    ('batch_ramp: "0:2 0.5:8"', "", "`batch_ramp: 0:2 0.5:8`: its batches must grow and divide `batch_size: 4`"),
    ('batch_ramp: "0:2 0.5:4"', "epochs: [1, 2]\n", "`batch_ramp` does not go with tiny@1x-2ep"),
    ("router_z_loss: 0.001", "", "`router_z_loss` is of the routers of experts.*tiny has none"),
])  # fmt: skip
def test_mistakes_in_the_file_are_named_with_their_line(make_study, start, more, said):
    text = STUDY[: STUDY.index("executor:")].replace(
        "    grid: {lr: [0.004", f"    start: {{{start}}}\n    grid: {{lr: [0.004"
    )
    with pytest.raises(UserError, match=rf"study.yaml:12: optimizer `adamw`: {said}"):
        cli.main(["plan", str(make_study(text + more))], "study")
