"""The models of a study: their shape, their parameter count, their training FLOPs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from megatron_opt import presets
from megatron_opt.layout.flags import structural
from megatron_opt.layout.spec import ModelSpec

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
    """N given by hand, for models that the flags do not describe"""
    shared_flags: dict[str, Any] = field(default_factory=dict)
    """Megatron flags of all models of the study"""

    @property
    def every_flag(self) -> dict[str, Any]:
        """Megatron flags of preset, shape, study and model, the later winning; underscores for hyphens."""
        preset = preset_flags(self.preset) if self.preset else {}
        return preset | self.shape | {"swiglu": self.gated} | self.shared_flags | self.flags

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model as its preset, shape and flags describe it; raises UserError for structures that are not known."""
        return ModelSpec.of(structural({key.replace("_", "-"): value for key, value in self.every_flag.items()}))

    @property
    def non_embedding_parameters(self) -> int:
        """N: elements of the matrices between embedding and output layer, of all experts where there are some.

        Llama: layers·(3·h·ffn + 4·h²); 2·h·ffn for a plain FFN (arXiv 2509.02046, section 3).
        """
        return self.spec.hidden_parameters if self.parameters is None else self.parameters

    @property
    def active_parameters(self) -> int:
        """The part of N that a token meets: the router's choice of experts."""
        return self.spec.active_hidden_parameters if self.parameters is None else self.parameters

    def flops_per_token(self, sequence_length: int, vocabulary: int | None) -> float:
        """Training FLOPs a token: 6·active N + 6·h·V (output layer) + 6·layers·h·seq (causal attention)."""
        hidden, layers = self.shape["hidden_size"], self.shape["num_layers"]
        output = 6 * hidden * (vocabulary or 0)
        return 6 * self.active_parameters + output + 6 * layers * hidden * sequence_length


def preset_flags(name: str) -> dict[str, Any]:
    """The flags of a preset of this package and of its `base:`, underscores for hyphens; raises UserError."""
    return {str(key).replace("-", "_"): value for key, value in presets.read(name).items()}
