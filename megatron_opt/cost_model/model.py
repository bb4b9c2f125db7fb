"""A model as its flags describe it, with its logical matrices and the FLOPs of a step."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_opt.cost_model.flags import required
from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import split_param
from megatron_opt.layout.parameter import Parameter
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.optimizers.base import MatrixInfo

__all__ = ["Model", "Parameter"]


@dataclass(frozen=True)
class Model(ModelSpec):
    """Shapes of a language model, and what a step of it costs; a multiplication and an addition are two FLOPs."""

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Model":
        """From Megatron's flags; refuses those that lack what a step needs, and models that are not described."""
        sized = () if flags.get("hybrid-layer-pattern") else ("num-layers",)
        required(flags, (*sized, "hidden-size", "num-attention-heads", "seq-length"))
        model = super().of(flags)
        assert isinstance(model, cls)
        return model

    def priced(self) -> "Model":
        """The model itself; raises UserError for layers whose time and activations are not known."""
        if self.pattern:
            raise UserError(
                f"--hybrid-layer-pattern {self.pattern}: the cost model knows the parameters, matrices and plan of hybrid "
                "models, not the time of their layers; leave the pattern out, or print the plan by --plan-world-size."
            )
        return self

    def infos(self, parameter: Parameter) -> list[MatrixInfo]:
        """The logical matrices in a parameter."""
        pattern = _infos(replace(parameter, name=_pattern(parameter), layer=0, expert=None), self.geometry)
        if pattern and pattern[0].name.startswith(_pattern(parameter)):
            cut = len(_pattern(parameter))
            return [replace(info, name=parameter.name + info.name[cut:]) for info in pattern]
        return pattern

    def attends(self, layer: int) -> bool:
        """Whether a decoder layer has attention."""
        return "*" in self.symbol(layer)

    def attention_flops(self, layer: int | None = None) -> float:
        """Scores and values of one layer's forward pass, one token, causal: half of the square; 0 in other layers."""
        if layer is not None and not self.attends(layer):
            return 0.0
        keys, values = (self.qk_dim + self.rope_dim, self.v_dim) if self.mla else (self.head_dim, self.head_dim)
        return float(self.sequence * self.heads * (keys + values))

    def layer_flops(self, layer: int) -> float:
        """Products with weights in one layer's forward pass, one token."""
        return 2.0 * _products(self.layer(layer, range(self.topk)))

    def output_flops(self) -> float:
        """The output layer, and multi-token prediction: its layers, and the output layer once more a depth."""
        one = 2.0 * self.vocabulary * self.hidden
        if not self.mtp:
            return one
        layers = 2.0 * _products(self.mtp_layers(range(self.topk))) * (self.mtp if self.mtp_shared else 1)
        inner = self.mtp_pattern.count("*") if self.pattern else 1
        return one * (1 + self.mtp) + layers + self.mtp * inner * self.attention_flops()

    @functools.cached_property
    def step_flops_per_token(self) -> float:
        """Forward and backward of one token: three times the forward's products."""
        layers = sum(self.layer_flops(layer) + self.attention_flops(layer) for layer in range(self.layers))
        return 3.0 * (layers + self.output_flops())


def _products(parameters: list[Parameter]) -> int:
    return sum(p.numel for p in parameters if len(p.shape) == 2)


def _pattern(parameter: Parameter) -> str:
    """The name with layer and expert 0: all layers of a kind have the same shapes."""
    name = parameter.name
    if parameter.layer >= 0 and name.startswith(f"decoder.layers.{parameter.layer}."):
        name = "decoder.layers.0." + name.split(".", 3)[3]
    if parameter.expert is not None:
        name = name.replace(f".experts.{parameter.expert}.", ".experts.0.")
    return name


@functools.lru_cache(maxsize=512)
def _infos(parameter: Parameter, geometry: Geometry) -> list[MatrixInfo]:
    infos, _, _, _ = split_param(parameter.name, parameter.shape, geometry, tp_rank=0, tp_size=1, partition_dim=None)
    return infos
