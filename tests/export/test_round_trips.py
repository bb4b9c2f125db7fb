"""Ours → Hugging Face → ours, bitwise, and the same logits on both sides; in one process, without training."""

import functools
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests import apart

transformers = apart.transformers()

from megatron_opt.errors import UserError  # noqa: E402
from megatron_opt.export import families, model, names  # noqa: E402
from megatron_opt.export.exporting import export  # noqa: E402
from megatron_opt.export.importing import import_model  # noqa: E402
from megatron_opt.export.reading import Checkpoint  # noqa: E402
from tests.export import models  # noqa: E402

TOKENS = torch.randint(0, models.IDS, (2, 17), generator=torch.Generator().manual_seed(3))


@functools.cache
def _flags(case: str) -> Namespace:
    return models.flags(models.CASES[case])


def _exported(case: str, folder: Path, **options) -> tuple[Path, dict[str, torch.Tensor]]:
    values = models.weights(_flags(case))
    source = models.save(_flags(case), values, folder / "ours")
    export(source, folder / "hf", vocabulary=models.IDS, **options)
    return folder / "hf", values


def _our_logits(args: Namespace, weights) -> torch.Tensor:
    with model.one_process():
        return model.logits(model.build(args, weights), TOKENS)


def _their_logits(folder: Path) -> torch.Tensor:
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        return theirs.eval()(TOKENS).logits


@pytest.mark.parametrize("case", [name for name in models.CASES if name != "bf16"])
def test_logits_are_the_same_and_weights_come_back_bitwise(case: str, tmp_path: Path) -> None:
    folder, values = _exported(case, tmp_path, shard_gb=2e-5)
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = _our_logits(_flags(case), values.__getitem__)[..., : models.IDS]
    theirs = _their_logits(folder)
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    import_model(folder, tmp_path / "back")
    back = Checkpoint(tmp_path / "back")
    for name, value in values.items():
        assert torch.equal(back(name), value[: models.IDS] if name in names.VOCABULARY else value), name
    again = model.of_checkpoint(back.args)
    torch.testing.assert_close(_our_logits(again, back), ours, rtol=0, atol=1e-6)


def test_bf16_and_its_padding_come_back_bitwise(tmp_path: Path) -> None:
    folder, values = _exported("bf16", tmp_path, keep_padding=True)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == models.PADDED
    import_model(folder, tmp_path / "back")
    back = Checkpoint(tmp_path / "back")
    assert back.dtype == torch.bfloat16 and all(torch.equal(back(name), value) for name, value in values.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_public_style_model_comes_in_and_goes_out(kind: str, tmp_path: Path) -> None:
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=3, n_head=2)
    else:
        common = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
                  "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 20}  # fmt: skip
        config = transformers.LlamaConfig(**common)
        if kind == "mixtral":
            config = transformers.MixtralConfig(**common, num_local_experts=3, num_experts_per_tok=2)
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "hf")
    said = import_model(tmp_path / "hf", tmp_path / "ours", multiple=8)
    assert "3 ids pad the vocabulary" in said[1]
    checkpoint = Checkpoint(tmp_path / "ours")
    table = checkpoint("embedding.word_embeddings.weight")
    torch.testing.assert_close(table[61:], table[:61].mean(0, keepdim=True).expand(3, -1))
    ids = TOKENS[:, :16] % 61
    with model.one_process():
        ours = model.logits(model.build(model.of_checkpoint(checkpoint.args), checkpoint), ids)[..., :61]
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    export(tmp_path / "ours", tmp_path / "again", vocabulary=61)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    before = theirs.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(("case", "changed", "flag"), [
    ("llama", {"multi_latent_attention": True}, "--multi-latent-attention"),
    ("llama", {"mtp_num_layers": 1}, "--mtp-num-layers"),
    ("llama", {"hybrid_layer_pattern": "M*M*"}, "--hybrid-layer-pattern"),
    ("llama", {"attention_output_gate": True}, "--attention-output-gate"),
    ("llama", {"qk_layernorm": True}, "--qk-layernorm"),
    ("llama", {"rotary_percent": 0.5}, "--rotary-percent"),
    ("llama", {"rotary_seq_len_interpolation_factor": 2}, "--rotary-seq-len-interpolation-factor"),
    ("llama", {"add_qkv_bias": True}, "--add-qkv-bias"),
    ("llama", {"use_mup": True}, "--use-mup"),
    ("llama", {"swiglu": False}, "--swiglu"),
    ("llama", {"window_size": (8, 0)}, "--window-size"),
    ("mixtral", {"moe_layer_freq": [0, 1]}, "--moe-layer-freq"),
    ("mixtral", {"moe_shared_expert_intermediate_size": 16}, "--moe-shared-expert-intermediate-size"),
    ("mixtral", {"moe_router_score_function": "sigmoid"}, "--moe-router-score-function"),
    ("mixtral", {"moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
    ("mixtral", {"add_bias_linear": True}, "--disable-bias-linear"),
    ("gpt2", {"group_query_attention": True, "num_query_groups": 2}, "--num-query-groups"),
    ("gpt2", {"position_embedding_type": "rope"}, "--position-embedding-type"),
    ("gpt2", {"squared_relu": True}, "--squared-relu"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_its_flag(case: str, changed: dict, flag: str) -> None:
    assert families.family_of(_flags(case))
    with pytest.raises(UserError, match=flag) as refused:
        families.family_of(Namespace(**vars(_flags(case)) | changed))
    assert str(refused.value).count("\n") == 0
