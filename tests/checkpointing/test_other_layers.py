"""What a checkpoint of other layers may lack or call otherwise, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_opt.checkpointing import other_layers
from megatron_opt.checkpointing.other_layers import adapted

EXTRA, NORM, LOCAL_NORM = "linear_qkv._extra_state", "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_only_what_other_layers_lack_is_left_out(impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
    from torch.distributed.checkpoint import FileSystemReader

    (tmp_path / ".metadata").touch()
    monkeypatch.setattr(other_layers, "rank", lambda: 1)
    there = {f"decoder.{LOCAL_NORM}": 0, "decoder.known._extra_state/shard_0_1": 0}
    monkeypatch.setattr(FileSystemReader, "read_metadata", lambda self: SimpleNamespace(state_dict_metadata=there))
    common = {"args": SimpleNamespace(transformer_impl=impl)}
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda folder: common)
    names = [f"decoder.{NORM}", "decoder.q_layernorm.weight", "decoder.linear.weight"]
    wanted = {
        "model": {name: ShardedTensor.from_rank_offsets(name, torch.ones(2)) for name in names}
        | {name: ShardedObject(name, None, (1,), (0,)) for name in (f"decoder.{EXTRA}", "decoder.known._extra_state")},
        "optimizer": {"x": ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.decoder.{NORM}", torch.ones(2))},
    }
    found = adapted(wanted, tmp_path)
    model = found["model"]
    assert (
        model[f"decoder.{NORM}"].key == f"decoder.{LOCAL_NORM}" and wanted["model"][f"decoder.{NORM}"].key == names[0]
    )
    assert isinstance(model[f"decoder.{EXTRA}"], LocalNonpersistentObject) is (impl == "local")
    for name in (*names[1:], "decoder.known._extra_state"):  # absent or not, Megatron's to read or to refuse
        assert model[name] is wanted["model"][name]
    assert found["optimizer"]["x"] is wanted["optimizer"]["x"]
