"""Memory of the fullest GPU: parameters, gradients, main copies, optimizer state, activations, workspace."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layers import held_elements, kinds, quantized_elements, quantized_kinds
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.plan import ShardGroupPlan
from megatron_opt.optimizers.factored import FactoredOptimizer
from megatron_opt.optimizers.kron import Kron
from megatron_opt.optimizers.muon import SpectralOptimizer
from megatron_opt.optimizers.narrow import is_narrow


@dataclass
class Memory:
    """Bytes on one GPU."""

    parameters: float = 0.0
    fp8_weights: float = 0.0  # numbers by row and by column, and scales
    gradients: float = 0.0
    main_copies: float = 0.0
    optimizer_state: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0
    padding: float = 0.0
    reserved: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, item.name) for item in fields(self))


def memory(
    model: Model,
    layout: Layout,
    cluster: Cluster,
    shard_groups: Sequence[Sequence[ShardGroupPlan]],
    states: Sequence[float],
) -> Memory:
    """The stage that needs most."""
    stages = [
        _stage(model, layout, cluster, index, stage, state)
        for index, (stage, state) in enumerate(zip(shard_groups, states, strict=True))
    ]
    return max(stages, key=lambda item: item.total)


def _stage(
    model: Model, layout: Layout, cluster: Cluster, index: int, stage: Sequence[ShardGroupPlan], state: float
) -> Memory:
    elements = sum(shard_group.local_elements for shard_group in stage)
    cut = sum(shard_group.local_elements / (shard_group.data if layout.distributed else 1) for shard_group in stage)
    main = 4.0 * cut if layout.dtype != "fp32" else 0.0
    grads = (2 if layout.grad_reduce_bf16 else 4) * elements
    # Megatron pads each of its buckets so that the shards of all ranks are equal and aligned to 64 elements
    padding = 0.0
    if layout.distributed:
        for shard_group in stage:
            buckets = max(1.0, shard_group.local_elements / max(40e6, 1e6 * shard_group.data * layout.instances))
            padding += buckets * 64 * shard_group.data / 2 * (layout.parameter_bytes + 4)
    kept = activations(model, layout, index) + _weight_gradient(model, layout, index)
    in_bf16, in_fp8 = elements, 0.0
    if layout.fp8 is not None:
        quantized = sum(shard_group.quantized for shard_group in stage)
        in_fp8 = quantized * layout.fp8.copies(cluster.transposes) + sum(shard_group.scales for shard_group in stage)
        in_bf16 -= (
            quantized if layout.fp8.gathered else 0.0
        )  # else both are there: the cast is kept for all micro-batches
    return Memory(
        in_bf16 * layout.parameter_bytes,
        in_fp8,
        grads,
        main,
        state,
        kept,
        max(0.0, max(_workspace(layout, shard_group) for shard_group in stage) - kept),
        padding,
        cluster.reserved,
    )


# fp32 copies that a rule makes of the matrices of one bucket while it works on them: directions, momenta, blocks
_COPIES = ((SpectralOptimizer, 2.0), (FactoredOptimizer, 4.0), (Kron, 4.0))
_WIDENED = 6.0  # moments, factors and bases of narrow state, in fp32 while they are worked on


def _workspace(layout: Layout, shard_group: ShardGroupPlan) -> float:
    """Bytes that the optimizer's step takes for a while, by the rank that owns most: buffers, messages, a rule's copies.

    Of state that rests in host memory, two batches.
    """
    offloaded, cut = layout.engine.offloaded, shard_group.data if layout.distributed else 1
    elements = 0.0
    for entry in shard_group.elements if offloaded else ():
        state = entry.optimizer.cost(1).state_bytes
        whole = state * (entry.cut / shard_group.tp + entry.copied) / cut
        elements = max(elements, 2 * offloaded * min(whole, max(layout.engine.bucket_bytes, state * entry.largest)))
    if not shard_group.infos:
        return elements
    owned: dict[int, float] = {}
    copies = 0.0
    for part in shard_group.plan.parts:
        rows, columns = part.buffer_shape
        owned[part.rank] = owned.get(part.rank, 0.0) + rows * columns
        optimizer = getattr(shard_group.optimizers[part.matrix], "inner", shard_group.optimizers[part.matrix])
        copies = max(
            copies,
            next((n + _WIDENED * is_narrow(optimizer) for kind, n in _COPIES if isinstance(optimizer, kind)), 1.0),
        )
    bucket = max(
        layout.engine.bucket_bytes / layout.communication_bytes, max(info.numel for info in shard_group.infos.values())
    )
    worked_on = min(max(owned.values()), bucket)
    travelling = 0.0
    if shard_group.ranks > 1:  # buffers in fp32, and the messages that come and go
        travelling = worked_on * (4.0 + 2.0 * layout.communication_bytes)
    coming = (
        2.0
        * offloaded
        * max(shard_group.plan.state_bytes)
        * min(0.5 if shard_group.buckets == 1 else 1.0, worked_on / max(owned.values()))
    )
    return max(elements, 4.0 * copies * worked_on + travelling + coming)


def _weight_gradient(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of the largest weight's gradient: backward makes one after the other, unless products add to the buffer."""
    if layout.fused_accumulation:
        return 0.0
    first, last = layout.stages(model)[stage]
    largest = max(p.numel / (layout.tp if p.cut is not None else 1) for p in model.parameters(first, last, range(1)))
    return layout.parameter_bytes * largest


def layer_activations(model: Model, layout: Layout, expert: bool) -> float:
    """Bytes of one micro-batch that a layer keeps between forward and backward (arXiv 2205.05198)."""
    width, tokens = float(layout.parameter_bytes), layout.local_tokens(model)
    t, shared, h = layout.tp, layout.sequence_shards, model.hidden
    if layout.recompute == "full":
        return width * tokens * h / shared
    modules = layout.modules if layout.recompute == "selective" else ()
    product = float(layout.product_bytes)
    kept = width * 2.0 * h / shared  # inputs of the norms
    if "layernorm" not in modules:  # their outputs; a router and the dispatcher read one as it is
        kept += (product + (width if expert else product)) * h / shared
    heads = float((model.heads + 2 * model.groups) * model.head_dim)
    if model.mla:
        heads = model.heads * (2.0 * (model.qk_dim + model.rope_dim) + model.v_dim)
    latent = model.q_lora + model.kv_lora + model.rope_dim if model.mla else 0
    if "mla_up_proj" in modules:
        kept += width * latent
    else:
        kept += width * (heads / t + latent)
    kept += (width + (product if layout.fp8 else 0.0)) * model.heads * (model.v_dim or model.head_dim) / t
    ffn = (model.expert_ffn * model.topk + model.shared_ffn) if expert else model.ffn
    if ("moe" if expert else "mlp") not in modules:
        act = 0.0 if expert and "moe_act" in modules else ffn
        kept += ((1.0 if layout.fp8_activation else width) * (2.0 if model.gated else 1.0) * ffn + product * act) / t
        if expert:  # dispatched tokens; what the experts gave, unless their gates were applied before the last product
            kept += (product + (0.0 if "moe_act" in modules else width)) * model.topk * h / t
    if not layout.flash:  # unfused: rotated queries and keys beside the others, the activation before its product
        kept += width * ((model.heads + model.groups) * model.head_dim + (ffn if model.gated else 0.0)) / t
        if "core_attn" not in modules:
            kept += width * model.sequence * model.heads / t
    return tokens * kept


def activations(model: Model, layout: Layout, stage: int) -> float:
    """Bytes kept between forward and backward, for the micro-batches that a stage has under way, and logits."""
    first, last = layout.stages(model)[stage]
    plain = replace(layout, fp8=None)
    quantized = quantized_kinds(model, layout, first, last)
    kept, whole = 0.0, 0.0
    for expert, (count, in_fp8) in enumerate(zip(kinds(model, first, last), quantized, strict=True)):
        for number, how in ((in_fp8, layout), (count - in_fp8, plain)):
            if number:
                kept += number * layer_activations(model, how, bool(expert))
                whole = max(whole, layer_activations(model, replace(how, recompute="none"), bool(expert)))
    total = kept * layout.in_flight(stage)
    if layout.recompute == "full":  # one layer at a time is whole again
        total += whole
    if stage == layout.pp - 1:  # logits; where they are narrower, in fp32 too, and their gradient
        width = float(layout.parameter_bytes)
        total += layout.local_tokens(model) * model.vocabulary / layout.tp * (width if width == 4 else width + 8.0)
    return total


def least(model: Model, layout: Layout, cluster: Cluster) -> float:
    """Bytes of the fullest GPU without optimizer state, padding and workspace: a lower bound that needs no plan."""
    largest = 0.0
    for stage, (first, last) in enumerate(layout.stages(model)):
        dense, experts = held_elements(model, layout.tp, layout.etp, layout.ep, first, last)
        weights = layout.parameter_bytes * (dense + experts)
        if layout.fp8 is not None:
            quantized = sum(quantized_elements(model, layout, first, last))
            weights += quantized * layout.fp8.copies(cluster.transposes)
            weights -= quantized * layout.parameter_bytes if layout.fp8.gathered else 0.0
        grads = (2 if layout.grad_reduce_bf16 else 4) * (dense + experts)
        main = 0.0
        if layout.dtype != "fp32":
            data = layout.data_parallel * layout.cp, layout.expert_data_parallel
            cut = [ranks / layout.instances for ranks in data] if layout.distributed else [1, 1]
            main = 4.0 * (dense / cut[0] + experts / cut[1])
        largest = max(largest, weights + grads + main + activations(model, layout, stage))
    return largest + cluster.reserved
