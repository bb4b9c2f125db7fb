"""Values that go through checkpoints."""

import json
from pathlib import Path

from megatron_opt.checkpointing import run_state


def test_values_come_back_and_unknown_or_missing_ones_are_passed_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_state, "_providers", {})
    got = []
    run_state.provide("clock", lambda: {"seconds": 1.5, "first_loss": 4.0}, got.append)
    (tmp_path / run_state.FILE).write_text(run_state.current())
    run_state.provide("later", lambda: 1, lambda value: got.append("never"))
    run_state.restore(tmp_path)
    assert got == [{"seconds": 1.5, "first_loss": 4.0}]
    assert json.loads(run_state.current()) == {"clock": {"seconds": 1.5, "first_loss": 4.0}, "later": 1}
    run_state.restore(tmp_path / "nothing")
    assert len(got) == 1
