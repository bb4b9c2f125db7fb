"""The models of a study: their shape, their parameter count, their training FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_opt import presets

ARCHITECTURE = "llama"
"""preset of a model that gives only its shape: the architecture of the published study"""
SHAPE_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class Model:
    """A model of the study: a preset name or a shape, plus any further Megatron flags."""

    name: str
    preset: str | None = None
    shape: dict[str, int] = field(default_factory=dict)
    """num_layers, hidden_size, ffn_hidden_size, num_attention_heads"""
    flags: dict[str, Any] = field(default_factory=dict)
    """further Megatron flags of this model, underscores for hyphens"""
    gated: bool = True
    """SwiGLU (three FFN matrices) or a plain FFN (two)"""
    parameters: int | None = None
    """non-embedding parameters, where the formula does not hold (MoE, grouped queries)"""

    @property
    def non_embedding_parameters(self) -> int:
        """layers·(3·h·ffn + 4·h²) for SwiGLU, 2·h·ffn for a plain FFN (arXiv 2509.02046, section 3)."""
        if self.parameters is not None:
            return self.parameters
        layers, hidden = self.shape["num_layers"], self.shape["hidden_size"]
        return layers * ((3 if self.gated else 2) * hidden * self.shape["ffn_hidden_size"] + 4 * hidden**2)

    def flops_per_token(self, sequence_length: int, vocabulary: int | None) -> float:
        """Training FLOPs a token: 6·N + 6·h·V (output layer) + 6·layers·h·seq (causal attention)."""
        hidden, layers = self.shape["hidden_size"], self.shape["num_layers"]
        output = 6 * hidden * (vocabulary or 0)
        return 6 * self.non_embedding_parameters + output + 6 * layers * hidden * sequence_length


def preset_flags(name: str) -> dict[str, Any]:
    """The flags of a preset of this package and of its `base:`, underscores for hyphens; raises UserError."""
    return {str(key).replace("-", "_"): value for key, value in presets.read(name).items()}
