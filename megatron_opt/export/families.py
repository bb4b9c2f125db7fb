"""Which Hugging Face model a checkpoint is, and its config.json from Megatron's flags.

A flag that decides the function (`checkpointing/compared.py` lists them all) is either one that a family's config.json
says, or must have the value that changes nothing; any other is refused by its name.
"""

import argparse
import functools
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.export import names
from megatron_opt.layout.flags import structural
from megatron_opt.layout.spec import ModelSpec

_SAID = frozenset(
    """
    num_layers hidden_size num_attention_heads num_query_groups group_query_attention ffn_hidden_size kv_channels
    layernorm_epsilon norm_epsilon add_bias_linear normalization position_embedding_type swiglu bias_gelu_fusion rotary_base
    untie_embeddings_and_output_weights vocab_size padded_vocab_size num_experts moe_router_topk moe_ffn_hidden_size
    moe_layer_freq use_rope_scaling
    """.split()
)
FACTOR = 8.0  # of --use-rope-scaling, which Megatron has no flag for
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture: its table of names, and what its config.json may and must say."""

    model_type: str
    architecture: str
    rows: list[names.Row] = field(hash=False)


LLAMA = Family("llama", "LlamaForCausalLM", names.LLAMA)
MIXTRAL = Family("mixtral", "MixtralForCausalLM", names.MIXTRAL)
GPT2 = Family("gpt2", "GPT2LMHeadModel", names.GPT2)
FAMILIES = {family.model_type: family for family in (LLAMA, MIXTRAL, GPT2)}


@functools.cache
def _defaults() -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_opt.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return argparse.Namespace(**{action.dest: parser.get_default(action.dest) for action in parser._actions})


def spec_of(args: Any) -> ModelSpec:
    """The one description of the model of a checkpoint's flags."""
    flags = {key.replace("_", "-"): value for key, value in vars(args).items()}
    return ModelSpec.of(
        structural(flags) | {"disable-bias-linear": not args.add_bias_linear, "transformer-impl": "local"}
    )


def _off(value: Any) -> bool:
    return value is None or value is False


def refuse_unsaid(args: Any) -> None:
    """Raise UserError for a flag that changes the function and that no config.json here can say."""
    from megatron_opt.checkpointing import compared

    defaults = _defaults()
    if args.add_qkv_bias and not args.add_bias_linear:
        raise UserError(
            "--add-qkv-bias without other biases: no model of those written here has it; it cannot be exported."
        )
    for name in compared.FUNCTION:
        if name in _SAID or not hasattr(args, name) or (name.startswith("moe_") and not args.num_experts):
            continue
        value = compared.value(args, name)
        neutral = compared.value(defaults, name) if hasattr(defaults, name) else None
        if value is None:  # set by no one, or by Megatron's own checks
            continue
        same = value == neutral or (_off(value) and _off(neutral)) or _NEUTRAL.get(name, object()) == value
        if not same:
            raise UserError(
                f"--{compared.option(name)} {value} has no counterpart in the Hugging Face models written here "
                f"({', '.join(FAMILIES)}); such a model cannot be exported."
            )


# what Megatron's own checks set without being asked
_NEUTRAL: dict[str, Any] = {"mup_width_mult": 1.0, "is_hybrid_model": False, "add_qkv_bias": True}


def _need(fits: bool, flag: str, family: Family) -> None:
    if not fits:
        raise UserError(
            f"{flag}: no {family.architecture} has it, which this model otherwise is; it cannot be exported."
        )


def family_of(args: Any) -> Family:
    """The architecture that computes what these flags describe; raises UserError, naming the flag, where none does."""
    refuse_unsaid(args)
    spec = spec_of(args)
    if args.normalization == "RMSNorm":
        family = MIXTRAL if args.num_experts else LLAMA
        _need(args.swiglu, "no --swiglu beside --normalization RMSNorm", family)
        positions = args.position_embedding_type
        _need(positions == "rope", f"--position-embedding-type {positions}", family)
        _need(not (args.num_experts and spec.bias), "linear biases (no --disable-bias-linear)", family)
        whole = len(spec.expert_layers) == spec.layers
        _need(not args.num_experts or whole, f"--moe-layer-freq {args.moe_layer_freq}", family)
        _need(
            spec.hidden % spec.heads == 0, f"--num-attention-heads {spec.heads} of --hidden-size {spec.hidden}", family
        )
        return family
    family = GPT2
    _need(not args.num_experts, f"--num-experts {args.num_experts} beside --normalization LayerNorm", family)
    _need(not args.swiglu, "--swiglu beside --normalization LayerNorm", family)
    _need(spec.bias, "--disable-bias-linear beside --normalization LayerNorm", family)
    _need(spec.groups == spec.heads, f"--num-query-groups {spec.groups}", family)
    _need(spec.heads * spec.head_dim == spec.hidden, f"--kv-channels {spec.head_dim}", family)
    positions = args.position_embedding_type
    _need(positions == "learned_absolute", f"--position-embedding-type {positions}", family)
    return family


def config_json(family: Family, args: Any, vocabulary: int, dtype: str, end: int | None) -> dict[str, Any]:
    """config.json of the model; `vocabulary` ids, `end` the id that ends a document."""
    spec = spec_of(args)
    epsilon = getattr(args, "layernorm_epsilon", None) or getattr(args, "norm_epsilon", 1e-5)
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": None,
        "eos_token_id": end,
        "torch_dtype": dtype,
        "initializer_range": float(getattr(args, "init_method_std", None) or 0.02),
        "use_cache": True,
    }
    if family is GPT2:
        return common | {
            "n_layer": spec.layers,
            "n_embd": spec.hidden,
            "n_head": spec.heads,
            "n_inner": spec.ffn,
            "n_positions": spec.learned_positions,
            "activation_function": "gelu_new" if args.bias_gelu_fusion else "gelu",
            "layer_norm_epsilon": epsilon,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "scale_attn_weights": True,
        }
    said: dict[str, Any] = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.expert_ffn if spec.experts else spec.ffn,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.groups,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings or spec.sequence,
        "rms_norm_eps": epsilon,
        "rope_theta": float(args.rotary_base),
        "attention_dropout": 0.0,
    }
    if getattr(args, "use_rope_scaling", False):
        said["rope_scaling"] = {"rope_type": "llama3", "factor": FACTOR, **LLAMA3}
    if family is LLAMA:
        said |= {"attention_bias": spec.bias, "mlp_bias": spec.bias}
    else:
        said |= {"num_local_experts": spec.experts, "num_experts_per_tok": spec.topk, "sliding_window": None}
    return common | said
