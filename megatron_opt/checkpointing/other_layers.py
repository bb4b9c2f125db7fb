"""Checkpoints of Megatron's local layers and of Transformer Engine's, each loaded by the other ones."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt import patches
from megatron_opt.checkpointing.agreement import rank
from megatron_opt.training import console

_EXTRA = "_extra_state"
# names of one norm: local layers say the second one also where Transformer Engine's fuse it with no linear layer (MoE, MLA)
_NORMS = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
)


def install() -> None:
    """Before Megatron reads a checkpoint's tensors."""
    patches.wrap("megatron.core.dist_checkpointing.load", "checkpointing/other_layers.py", _adapting)


def _adapting(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapped(sharded_state_dict: Any, checkpoint_dir: Any, *rest: Any, **named: Any) -> Any:
        return load(adapted(sharded_state_dict, Path(checkpoint_dir)), checkpoint_dir, *rest, **named)

    return wrapped


def adapted(sharded_state_dict: Any, folder: Path) -> Any:
    """The state to load: norms by the checkpoint's name, and no extra states that one of local layers lacks.

    A checkpoint of Transformer Engine's layers has extra states, those with FP8 scales among them: one that lacks some is
    left to Megatron, which refuses it, as it does whatever else is absent.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
    from torch.distributed.checkpoint import FileSystemReader

    entries = list(nested_values(sharded_state_dict))
    extra = [x for x in entries if isinstance(x, ShardedObject) and x.key.endswith(_EXTRA)]
    norms = [x for x in entries if isinstance(x, ShardedTensor) and _other_name(x.key)]
    if not (extra or norms) or not (folder / ".metadata").is_file():
        return sharded_state_dict
    there = FileSystemReader(folder).read_metadata().state_dict_metadata
    absent = {x.unique_key for x in extra if x.unique_key not in there}
    renamed = {x.key for x in norms if x.key not in there and _other_name(x.key) in there}
    if absent:
        saved = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
        if getattr(saved, "transformer_impl", "local") != "local":
            absent = set()
        elif rank() == 0:
            console.say(f"{folder} is of local layers: what Transformer Engine's keep besides, FP8 scales, begins anew")
    if not (absent or renamed):
        return sharded_state_dict

    def adapted_entry(x: Any) -> Any:
        if isinstance(x, ShardedObject) and x.unique_key in absent:
            return LocalNonpersistentObject(None)
        if isinstance(x, ShardedTensor) and x.key in renamed:
            x = copy.copy(x)
            x.key = _other_name(x.key)
        return x

    return dict_list_map_outplace(adapted_entry, sharded_state_dict)


def _other_name(key: str) -> str:
    """Of a norm, by the other layers; empty where there is none."""
    if key.startswith("optimizer."):
        return ""
    for one, other in (*_NORMS, *(pair[::-1] for pair in _NORMS)):
        if one in key:
            return key.replace(one, other)
    return ""
