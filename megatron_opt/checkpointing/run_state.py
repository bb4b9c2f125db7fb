"""What a run carries from one process to the next beside Megatron's state (time trained, first loss …), as JSON.

The last rank, which has the loss, writes its values into each checkpoint; every rank gets them back when it resumes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError

FILE = "run_state.json"

_providers: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}


def provide(name: str, current: Callable[[], Any], resumed: Callable[[Any], None]) -> None:
    """Save what `current()` gives, JSON, under `name` with each checkpoint; `resumed` gets it on every rank after a load.

    `resumed` is not called where the checkpoint has no such value, nor under --finetune, which begins another run.
    """
    _providers[name] = current, resumed


def current() -> str:
    """All values, for a checkpoint that is being made."""
    return json.dumps({name: now() for name, (now, _) in _providers.items()})


def restore(folder: Path) -> None:
    """Hand the values of a verified checkpoint back."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); resume from an earlier checkpoint (--ckpt-step N).") from error
    for name, (_, resumed) in _providers.items():
        if name in values:
            resumed(values[name])
