"""What a search asks of a model thousands of times, worked out once: weights and FLOPs of a layer of each kind."""

import functools
from dataclasses import dataclass

from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model, Parameter
from megatron_opt.layout.kinds import find_kind


@dataclass(frozen=True)
class LayerShape:
    """One layer without its routed experts: elements that TP cuts and that it copies; forward FLOPs of a token."""

    cut: int
    copied: int
    flops: float  # products with weights, routed experts included
    up_flops: float  # of MLA's up-projections
    mlp_flops: float  # of the MLP, or of router, routed and shared experts
    expert: int  # elements of one expert
    weights: "Weights"  # of products, without routers
    expert_weights: "Weights"


@dataclass(frozen=True)
class Weights:
    """Weights of products: elements that TP cuts and that it copies, and the sum of their rows and columns, as cut and as whole."""

    cut: int = 0
    copied: int = 0
    sides_cut: int = 0
    sides_whole: int = 0

    @staticmethod
    def of(parameters: "list[Parameter]") -> "Weights":
        matrices = [p for p in parameters if len(p.shape) == 2 and _is_hidden(p)]
        cut = sum(p.shape[p.cut] for p in matrices if p.cut is not None)
        return Weights(
            sum(p.numel for p in matrices if p.cut is not None),
            sum(p.numel for p in matrices if p.cut is None),
            cut,
            sum(sum(p.shape) for p in matrices) - cut,
        )

    def local_elements(self, tp: int) -> float:
        """Elements on one of `tp` ranks."""
        return self.cut / tp + self.copied

    def sides(self, cut_over: int, whole_over: int) -> float:
        """Elements of a token that products read forward and backward: an input by column, a gradient by row."""
        return self.sides_cut / cut_over + self.sides_whole / whole_over


def _is_hidden(parameter: Parameter) -> bool:
    kind = find_kind(parameter.name)
    return kind is not None and kind.kind == "hidden"


@functools.lru_cache(maxsize=64)
def layer_shape(model: Model, expert: bool) -> LayerShape:
    """The shape of the model's dense layers, or of those with experts."""
    layer = next((i for i in range(model.layers) if (i in model.expert_layers) == expert), None)
    if layer is None:
        return LayerShape(0, 0, 0.0, 0.0, 0.0, 0, Weights(), Weights())
    of_layer = [p for p in model.parameters(layer, layer + 1, range(1)) if p.layer == layer]
    plain = [p for p in of_layer if p.expert is None]
    up = 2.0 * sum(p.numel for p in plain if "up_proj" in p.name and len(p.shape) == 2)
    attention = 2.0 * sum(p.numel for p in plain if "self_attention" in p.name and len(p.shape) == 2)
    flops = model.layer_flops(layer)
    return LayerShape(
        sum(p.numel for p in plain if p.cut is not None),
        sum(p.numel for p in plain if p.cut is None),
        flops,
        up,
        flops - attention,
        sum(p.numel for p in of_layer if p.expert is not None),
        Weights.of(plain),
        Weights.of([p for p in of_layer if p.expert is not None]),
    )


@functools.lru_cache(maxsize=64)
def outer_elements(model: Model) -> tuple[int, int, int]:
    """Elements before the first layer that TP cuts, those that it copies, and those after the last layer that it cuts."""
    first = [p for p in model.parameters(0, 0, range(0)) if p.layer == -1]
    last = [p for p in model.parameters(model.layers, model.layers, range(0), copy=True) if p.layer == model.layers]
    return (
        sum(p.numel for p in first if p.cut is not None),
        sum(p.numel for p in first if p.cut is None),
        sum(p.numel for p in last if p.cut is not None),
    )


@functools.lru_cache(maxsize=64)
def _before(model: Model) -> tuple[int, ...]:
    sums = [0]
    for layer in range(model.layers):
        sums.append(sums[-1] + (layer in model.expert_layers))
    return tuple(sums)


def kinds(model: Model, first: int, last: int) -> tuple[int, int]:
    """Dense layers and layers with experts in [first, last)."""
    before = _before(model)
    expert = before[last] - before[first]
    return last - first - expert, expert


def held_elements(model: Model, tp: int, etp: int, ep: int, first: int, last: int) -> tuple[float, float]:
    """Elements of one rank of a stage: dense parameters, and its routed experts."""
    dense = experts = 0.0
    for count, expert in zip(kinds(model, first, last), (False, True), strict=True):
        if count:
            shape = layer_shape(model, expert)
            dense += count * (shape.cut / tp + shape.copied)
            experts += count * shape.expert * model.experts / ep / etp if expert else 0.0
    cut, copied, after = outer_elements(model)
    dense += (cut / tp + copied) if first == 0 else 0.0
    dense += after / tp if last == model.layers and (first > 0 or not model.tied) else 0.0
    return dense, experts


def quantized_kinds(model: Model, layout: Layout, first: int, last: int) -> tuple[int, int]:
    """Of `kinds`, the layers whose products are in FP8."""
    if layout.fp8 is None:
        return 0, 0
    begin, end = max(first, layout.fp8.first), min(last, model.layers - layout.fp8.last)
    return kinds(model, begin, end) if begin < end else (0, 0)


def quantized_elements(model: Model, layout: Layout, first: int, last: int) -> tuple[float, float]:
    """Of `held_elements`, the weights of FP8 products."""
    dense = experts = 0.0
    for count, expert in zip(quantized_kinds(model, layout, first, last), (False, True), strict=True):
        if count:
            shape = layer_shape(model, expert)
            dense += count * shape.weights.local_elements(layout.tp)
            experts += (
                count * shape.expert_weights.local_elements(layout.etp) * model.experts / layout.ep if expert else 0.0
            )
    if layout.fp8 is not None and last == model.layers:
        dense += _after(model).cut / layout.tp
    return dense, experts


@functools.lru_cache(maxsize=64)
def _after(model: Model) -> Weights:
    return Weights.of(model.mtp_layers(range(0)))
