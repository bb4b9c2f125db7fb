"""A Hugging Face config.json as Megatron's flags; every key in it is read, neutral, or refused by its name."""

import json
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.export.families import FACTOR, FAMILIES, GPT2, LLAMA, LLAMA3, MIXTRAL, Family

# Of no matter to the function in inference, or said again by the weights and the tokenizer
_NO_MATTER = frozenset(
    """
    architectures model_type _name_or_path name_or_path torch_dtype dtype transformers_version use_cache auto_map
    initializer_range bos_token_id eos_token_id pad_token_id unk_token_id pretraining_tp attention_dropout
    attn_pdrop embd_pdrop resid_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout task_specific_params output_router_logits router_aux_loss_coef router_jitter_noise
    output_attentions output_hidden_states return_dict gradient_checkpointing id2label label2id num_labels
    problem_type chunk_size_feed_forward attn_implementation _attn_implementation_autoset n_ctx is_decoder
    """.split()
)
# What must have one of these values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (None, 1.0),
    "layer_types": (None,),
}
_READ = {
    "llama": frozenset(
        """
        vocab_size tie_word_embeddings num_hidden_layers hidden_size intermediate_size num_attention_heads
        num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
        attention_bias mlp_bias
        """.split()
    ),
    "gpt2": frozenset(
        """
        vocab_size tie_word_embeddings n_layer n_embd n_head n_inner n_positions activation_function layer_norm_epsilon
        """.split()
    ),
}
_READ["mixtral"] = (_READ["llama"] - {"attention_bias", "mlp_bias"}) | {"num_local_experts", "num_experts_per_tok"}
_MISSING = object()


class Config:
    """config.json of a folder, whose model is one of the families."""

    def __init__(self, folder: Path):
        """Raises UserError for a file that is missing, broken, of another architecture or with an unknown key."""
        self.path = folder / "config.json"
        try:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}); give a Hugging Face model's folder."
            ) from None
        except ValueError as error:
            raise UserError(f"{self.path} is not JSON: {error}") from None
        kind = self.values.get("model_type") if isinstance(self.values, dict) else None
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(
                f"{self.path}: the architecture {kind!r} is none of {', '.join(FAMILIES)}; it cannot be imported."
            )
        self.family: Family = FAMILIES[kind]
        for key, value in self.values.items():
            if key in _NEUTRAL and value in _NEUTRAL[key]:
                continue
            if key not in _READ[self.family.model_type] and key not in _NO_MATTER:
                raise UserError(
                    f"{self.path}: {key} {value!r} is not understood here; such a model cannot be imported."
                )

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """A value; UserError where a needed one is missing."""
        value = self.values.get(key)
        if value is None and default is _MISSING:
            raise UserError(f"{self.path} does not say {key}.")
        return default if value is None else value

    def number(self, key: str, default: Any = _MISSING) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.path}: {key} is {value!r}; it must be a positive whole number.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key} is {value!r}; it must be true or false.")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty where it is not there."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {key} is {value!r}; it must be an object.")
        return value

    @property
    def vocabulary(self) -> int:
        """Ids of the model."""
        return self.number("vocab_size")

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding; Hugging Face's defaults differ by family."""
        return self.flag("tie_word_embeddings", self.family is GPT2)

    def flags(self) -> dict[str, Any]:
        """Megatron's flags of the model, names with hyphens; the vocabulary is left to the caller."""
        flags = self._gpt2() if self.family is GPT2 else self._llama()
        return flags | ({} if self.tied else {"untie-embeddings-and-output-weights": True})

    def _gpt2(self) -> dict[str, Any]:
        known = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}  # whether it is Megatron's fused one
        activation = self.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in known:
            raise UserError(f"{self.path}: activation_function {activation!r} is none of {', '.join(known)}.")
        hidden = self.number("n_embd")
        return {
            "num-layers": self.number("n_layer"),
            "hidden-size": hidden,
            "num-attention-heads": self.number("n_head"),
            "ffn-hidden-size": self.number("n_inner", 4 * hidden),
            "max-position-embeddings": self.number("n_positions"),
            "position-embedding-type": "learned_absolute",
            "normalization": "LayerNorm",
            "norm-epsilon": self.get("layer_norm_epsilon", 1e-5),
            **({} if known[activation] else {"no-bias-gelu-fusion": True}),
        }

    def _llama(self) -> dict[str, Any]:
        bias = self.flag("attention_bias", False)
        if bias != self.flag("mlp_bias", False):
            raise UserError(f"{self.path}: attention_bias and mlp_bias differ; Megatron has biases in both or in none.")
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        groups = self.number("num_key_value_heads", 8 if self.family is MIXTRAL else heads)
        flags = {
            "num-layers": self.number("num_hidden_layers"),
            "hidden-size": hidden,
            "ffn-hidden-size": self.number("intermediate_size"),
            "num-attention-heads": heads,
            "kv-channels": self.number("head_dim", hidden // heads),
            "max-position-embeddings": self.number("max_position_embeddings"),
            "normalization": "RMSNorm",
            "norm-epsilon": self.get("rms_norm_eps", 1e-6 if self.family is LLAMA else 1e-5),
            "swiglu": True,
            **self._rope(),
        }
        if groups != heads:
            flags |= {"group-query-attention": True, "num-query-groups": groups}
        if not bias:
            flags["disable-bias-linear"] = True
        if self.family is MIXTRAL:
            flags["num-experts"] = self.number("num_local_experts", 8)
            flags["moe-router-topk"] = self.number("num_experts_per_tok", 2)
        return flags

    def _rope(self) -> dict[str, Any]:
        new = self.table("rope_parameters")
        scaling = {**self.table("rope_scaling"), **{key: value for key, value in new.items() if key != "rope_theta"}}
        base = new.get("rope_theta", self.get("rope_theta", 1e6 if self.family is MIXTRAL else 1e4))
        if isinstance(base, bool) or not isinstance(base, int | float) or not float(base).is_integer():
            raise UserError(f"{self.path}: rope_theta {base!r} is no whole number, which --rotary-base takes.")
        flags = {"position-embedding-type": "rope", "rotary-base": int(base)}
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        scaling.pop("type", None)
        if kind == "default":
            return flags
        factor = scaling.pop("factor", None)
        if kind != "llama3" or scaling != LLAMA3 or factor != FACTOR:
            raise UserError(
                f"{self.path}: the rope scaling {kind!r} with {scaling}, factor {factor}, is not Megatron's --use-rope-scaling "
                f"({LLAMA3}, factor {FACTOR:g})."
            )
        return flags | {"use-rope-scaling": True}
