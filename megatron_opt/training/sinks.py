"""One writer for TensorBoard and Weights & Biases: every series goes to both, whichever is there.

Megatron writes to W&B only where there is a TensorBoard folder too, and its own series only. Its `add_scalar` calls come
here, and ours; a step's values reach W&B as one row. A resumed run goes on in the W&B run whose id lies in OUTPUT.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.training import record

_ID = "wandb_run_id"


class Writer:
    """Megatron's idea of a TensorBoard writer."""

    def __init__(self, board: Any, wandb: Any) -> None:
        self.board, self.wandb = board, wandb
        self._step: int | None = None
        self._row: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """One value of a series; `… vs samples` repeats a series over another axis, for TensorBoard alone."""
        if self.board is not None:
            self.board.add_scalar(name, value, step, *args, **kwargs)
        if self.wandb is None or name.endswith(" vs samples"):
            return
        if step != self._step:
            self._send()
            self._step = step
        self._row[name] = float(value)

    def add_text(self, name: str, text: str, *args: Any, **kwargs: Any) -> None:
        """TensorBoard alone; W&B has the record as its config."""
        if self.board is not None:
            self.board.add_text(name, text, *args, **kwargs)

    def _send(self) -> None:
        if self._row and self.wandb is not None:
            self.wandb.log(self._row, step=self._step)
        self._row = {}

    def flush(self) -> None:
        """What is known so far, out."""
        self._send()
        if self.board is not None:
            self.board.flush()

    def close(self, results: dict[str, Any]) -> None:
        """The run has ended with these results."""
        self.flush()
        if self.wandb is not None:
            numbers = {key: value for key, value in results.items() if isinstance(value, (int, float, str, bool))}
            self.wandb.run.summary.update(numbers)
            self.wandb.finish()
            self.wandb = None


_writer: Writer | None = None


def writer() -> Writer | None:
    """This rank's writer; None where nothing is to be written."""
    from megatron.training import global_vars

    global _writer
    if _writer is None:
        board, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
        if board is None and wandb is None:
            return None
        _writer = Writer(board, wandb)
    return _writer


def install(training: Any, args: Any) -> None:
    """Send all that Megatron's loop writes through the one writer."""
    from megatron.core import timers

    timers.SummaryWriter = Writer  # which they ask for by class
    training.get_tensorboard_writer, training.get_wandb_writer = writer, lambda: None

    def write_record() -> None:
        if (tensorboard := writer()) is not None:
            tensorboard.add_text("config", f"```json\n{json.dumps(record.build(args), indent=1)}\n```")

    training.write_args_to_tensorboard = write_record


def check(args: Any) -> None:
    """Where W&B is asked for: that it is there, a name, and a folder."""
    if not args.wandb_project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs the package wandb, which is not installed: pip install wandb.")
    if not args.wandb_exp_name:
        if not args.output_dir:
            raise UserError(
                "--wandb-project without --wandb-exp-name takes the name of --output-dir; give one of them."
            )
        args.wandb_exp_name = Path(args.output_dir).resolve().name
    args.wandb_save_dir = args.wandb_save_dir or args.output_dir or args.save or "."


def start_wandb(args: Any) -> None:
    """In place of Megatron's `_set_wandb_writer`: the last rank opens the run, with the record as its config."""
    from megatron.training import global_vars

    if not args.wandb_project or args.rank != args.world_size - 1:
        return
    import wandb

    os.makedirs(args.wandb_save_dir, exist_ok=True)
    known = Path(args.output_dir) / _ID if args.output_dir else None
    given: dict[str, Any] = {"entity": args.wandb_entity} if args.wandb_entity else {}
    if known is not None and known.is_file():
        given |= {"id": known.read_text().strip(), "resume": "allow"}
    run = wandb.init(
        dir=args.wandb_save_dir,
        name=args.wandb_exp_name,
        project=args.wandb_project,
        config=record.build(args),
        **given,
    )
    if known is not None and not known.is_file():
        write_atomic(known, str(run.id))
    global_vars._GLOBAL_WANDB_WRITER = wandb
