"""Names that depend neither on the ranks' layout nor on who builds the layers: those of Megatron's local layers."""

import re
from collections.abc import Iterator
from typing import Any

# Transformer Engine keeps a norm inside the linear layer that follows it; the local layers have it apart
_FUSED_NORMS = (
    (r"self_attention\.linear_(?:qkv|qkv_down_proj|q_down_proj|kv_down_proj)", "input_layernorm"),
    (r"self_attention\.linear_q_up_proj", "self_attention.q_layernorm"),
    (r"self_attention\.linear_kv_up_proj", "self_attention.kv_layernorm"),
    (r"mlp\.linear_fc1", "pre_mlp_layernorm"),
    (r"mixer\.in_proj", "norm"),
)
_PATTERNS = [
    (re.compile(rf"(^|\.){linear}\.layer_norm_(weight|bias)$"), rf"\1{norm}.\2") for linear, norm in _FUSED_NORMS
]


def canonical_name(name: str) -> str:
    """The name that the local layers give to a parameter of Transformer Engine's layers; others stay."""
    for pattern, local in _PATTERNS:
        name, hits = pattern.subn(local, name)
        if hits:
            break
    return name


def global_names(module: Any, ep_rank: int) -> Iterator[tuple[str, Any]]:
    """Parameters of a model chunk under canonical names with global layer and expert numbers."""
    layer_numbers = {
        f"{name}.": sub.layer_number - 1
        for name, sub in module.named_modules()
        if re.search(r"layers\.\d+$", name) and hasattr(sub, "layer_number")
    }
    local_experts = {
        f"{name}.": sub.num_local_experts
        for name, sub in module.named_modules()
        if hasattr(sub, "num_local_experts") and name.endswith("experts")
    }
    for local, param in module.named_parameters():
        name = local
        for prefix, number in local_experts.items():
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if match := re.match(r"local_experts\.(\d+)\.(.*)", rest):  # one module an expert
                name = f"{prefix}{ep_rank * number + int(match[1])}.{match[2]}"
            elif match := re.match(r"(.*\.(?:weight|bias))(\d+)$", rest):  # grouped: one tensor an expert
                name = f"{prefix}{ep_rank * number + int(match[2])}.{match[1]}"
        for prefix, number in layer_numbers.items():
            if local.startswith(prefix) and ".mtp" not in prefix and not prefix.startswith("mtp"):
                name = re.sub(r"layers\.\d+\.$", f"layers.{number}.", prefix) + name[len(prefix) :]
        if getattr(param, "shared_embedding", False):  # the last stage's copy of a tied embedding
            name = "embedding.word_embeddings.weight"
        yield canonical_name(name), param
