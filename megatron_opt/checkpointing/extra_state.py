"""Checkpoints of local layers loaded by Transformer Engine's: what only those keep, their `_extra_state`, begins anew."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt import patches
from megatron_opt.checkpointing.agreement import rank
from megatron_opt.training import console

_SUFFIX = "_extra_state"


def install() -> None:
    """Before Megatron reads a checkpoint's tensors."""
    patches.wrap("megatron.core.dist_checkpointing.load", "checkpointing/extra_state.py", _without_absent)


def _without_absent(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapped(sharded_state_dict: Any, checkpoint_dir: Any, *rest: Any, **named: Any) -> Any:
        wanted = drop_absent(sharded_state_dict, Path(checkpoint_dir))
        return load(sharded_state_dict if wanted is None else wanted, checkpoint_dir, *rest, **named)

    return wrapped


def drop_absent(sharded_state_dict: Any, folder: Path) -> Any:
    """The state to load without extra states that a checkpoint of local layers does not have; None where all stays.

    A checkpoint of Transformer Engine's layers has them, those with FP8 scales among them: one that lacks some is left to
    Megatron, which refuses it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
    from torch.distributed.checkpoint import FileSystemReader

    extra = [x for x in nested_values(sharded_state_dict) if isinstance(x, ShardedObject) and x.key.endswith(_SUFFIX)]
    if not extra or not (folder / ".metadata").is_file():
        return None
    there = FileSystemReader(folder).read_metadata().state_dict_metadata
    absent = {x.unique_key for x in extra if x.unique_key not in there}
    if not absent:
        return None
    saved = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    if getattr(saved, "transformer_impl", "local") != "local":
        return None
    if rank() == 0:
        console.say(f"{folder} is of local layers: what Transformer Engine's keep besides, FP8 scales, begins anew")

    def kept(x: Any) -> Any:
        return LocalNonpersistentObject(None) if isinstance(x, ShardedObject) and x.unique_key in absent else x

    return dict_list_map_outplace(kept, sharded_state_dict)
