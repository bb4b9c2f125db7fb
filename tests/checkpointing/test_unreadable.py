"""Small files beside checkpoints that say nothing, and folders that this user may not read: one sentence, on every rank alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opt.checkpointing import folders, resuming, run_state, verification
from megatron_opt.errors import UserError
from megatron_opt.training import faults

GARBAGE = [b"", b"twelve", b"\xff\xfe\x00", b"-3", b"1.5", "\u00b2".encode(), b"12 13"]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_tracker_that_holds_no_number(text: bytes, tmp_path: Path) -> None:
    (tmp_path / folders.TRACKER).write_bytes(text)
    with pytest.raises(
        UserError, match=rf"--load .*{folders.TRACKER} holds .* in place of an iteration number"
    ) as error:
        resuming.newest(SimpleNamespace(load=str(tmp_path), ckpt_step=None))
    assert "\n" not in str(error.value)
    (tmp_path / folders.name_of(12)).mkdir()
    assert verification._candidates(tmp_path, None) == ([], str(error.value)), "Megatron would leave with exit code 0"
    assert verification._candidates(tmp_path, 12) == ([], str(error.value))
    (tmp_path / folders.TRACKER).unlink()
    assert verification._candidates(tmp_path, None) == ([12], None), "names of checkpoints are known without it"


def test_what_ends_before_the_first_step_is_no_good_end() -> None:
    from megatron_opt.training import job

    args = SimpleNamespace(exit_on_missing_checkpoint=False)
    with pytest.raises(UserError, match="before its first step"):
        job._why_early(args, 0)
    args.exit_on_missing_checkpoint = True
    assert job._why_early(args, 0) == {"reason": "--exit-on-missing-checkpoint"}


def test_another_schedule_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own assertion, found in its source."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import training  # noqa: F401  (before get_args is replaced)

    scheduler = OptimizerParamScheduler.__new__(OptimizerParamScheduler)
    scheduler.override_opt_param_scheduler = scheduler.use_checkpoint_opt_param_scheduler = False
    with pytest.raises(AssertionError) as theirs:
        scheduler._check_and_set(48000, 32000, "total number of iterations")

    def load(*_: object, **__: object) -> None:
        raise theirs.value

    monkeypatch.setattr("megatron.training.get_args", lambda: SimpleNamespace(load=None, fp8_param_gather=False))
    with pytest.raises(
        UserError, match=r"another schedule: its total number of iterations \(in samples\) is 32000, this run's 48000"
    ):
        resuming._load(load, True, None, None, None)


def test_a_tracker_of_a_checkpoint_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / folders.TRACKER).write_text("7")
    with pytest.raises(UserError, match=r"names the checkpoint .*iter_0000007, which is not there; name one that is"):
        resuming.newest(SimpleNamespace(load=str(tmp_path), ckpt_step=None))


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything: the error is made up."""

    def denied(path: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "iterations", denied)
    assert f"--load {tmp_path} cannot be read ({tmp_path}: Permission denied)" in str(
        verification._candidates(tmp_path, None)[1]
    )
    monkeypatch.setattr(verification, "rank", lambda: 1)
    monkeypatch.setattr(verification, "agree", lambda _: verification._candidates(tmp_path, None))
    with pytest.raises(UserError, match=f"--load {tmp_path} cannot be read .*Permission denied"):
        verification._choose(tmp_path, None, trust=False, own=True)
    monkeypatch.setattr(Path, "is_dir", denied)
    assert "Permission denied" in str(verification._inspect(tmp_path, 3, trust=False)[1])


@pytest.mark.parametrize("text", ["{", "3", '{"a": 1}', '["x"]', "[null]", ""])
def test_skipped_iterations_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / faults.SKIP_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{faults.SKIP_FILE} is no list of iterations"):
        faults.skipped_iterations(tmp_path)


def test_a_damaged_run_state_names_its_file(tmp_path: Path) -> None:
    (tmp_path / run_state.FILE).write_text("{")
    with pytest.raises(UserError, match=rf"{run_state.FILE} is damaged .*--ckpt-step"):
        run_state.restore(tmp_path)
