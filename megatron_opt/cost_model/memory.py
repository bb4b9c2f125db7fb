"""Memory of the fullest GPU: parameters, gradients, main copies, optimizer state, activations, workspace."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.plan import DomainPlan
from megatron_opt.optimizers.factored import FactoredOptimizer
from megatron_opt.optimizers.kron import Kron
from megatron_opt.optimizers.muon import SpectralOptimizer


@dataclass
class Memory:
    """Bytes on one GPU."""

    parameters: float = 0.0
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
    model: Model, layout: Layout, cluster: Cluster, domains: Sequence[Sequence[DomainPlan]], states: Sequence[float]
) -> Memory:
    """The stage that needs most."""
    found = [
        _stage(model, layout, cluster, index, stage, state)
        for index, (stage, state) in enumerate(zip(domains, states, strict=True))
    ]
    return max(found, key=lambda item: item.total)


def _stage(
    model: Model, layout: Layout, cluster: Cluster, index: int, stage: Sequence[DomainPlan], state: float
) -> Memory:
    held = sum(domain.held for domain in stage)
    cut = sum(domain.held / (domain.data if layout.distributed else 1) for domain in stage)
    main = 4.0 * cut if layout.dtype != "fp32" else 0.0
    grads = (2 if layout.grad_reduce_bf16 else 4) * held
    # Megatron pads each of its buckets so that the shards of all ranks are equal and aligned to 64 elements
    padding = 0.0
    if layout.distributed:
        for domain in stage:
            buckets = max(1.0, domain.held / max(40e6, 1e6 * domain.data))
            padding += buckets * 64 * domain.data / 2 * (layout.parameter_bytes + 4)
    kept = activations(model, layout, index) + _weight_gradient(model, layout, index)
    return Memory(
        held * layout.parameter_bytes,
        grads,
        main,
        state,
        kept,
        max(0.0, max(_workspace(layout, domain) for domain in stage) - kept),
        padding,
        cluster.reserved,
    )


# fp32 copies that a rule makes of the matrices of one bucket while it works on them: directions, momenta, blocks
_COPIES = ((SpectralOptimizer, 2.0), (FactoredOptimizer, 4.0), (Kron, 4.0))


def _workspace(layout: Layout, domain: DomainPlan) -> float:
    """Bytes that the optimizer's step takes for a while, by the rank that owns most: slabs, messages, a rule's copies."""
    if not domain.infos:
        return 0.0
    owned: dict[int, float] = {}
    copies = 0.0
    for part in domain.plan.parts:
        rows, columns = part.slab_shape
        owned[part.rank] = owned.get(part.rank, 0.0) + rows * columns
        copies = max(copies, next((n for kind, n in _COPIES if isinstance(domain.rules[part.matrix], kind)), 1.0))
    bucket = max(layout.bucket_bytes / layout.wire_bytes, max(info.numel for info in domain.infos.values()))
    worked_on = min(max(owned.values()), bucket)
    travelling = 0.0
    if domain.ranks > 1:  # slabs in fp32, and the messages that come and go
        travelling = worked_on * (4.0 + 2.0 * layout.wire_bytes)
    return 4.0 * copies * worked_on + travelling


def _weight_gradient(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of the largest weight's gradient: backward makes one after the other, unless products add to the buffer."""
    if layout.fused_accumulation:
        return 0.0
    first, last = layout.stages(model)[stage]
    largest = max(p.numel / (layout.tp if p.cut is not None else 1) for p in model.parameters(first, last, range(1)))
    return layout.parameter_bytes * largest


def activations(model: Model, layout: Layout, stage: int) -> float:
    """Bytes kept between forward and backward (arXiv 2205.05198), for the micro-batches that a stage has under way."""
    width, tokens = float(layout.parameter_bytes), layout.local_tokens(model)
    t, shared, h = layout.tp, layout.sequence_shards, model.hidden
    first, last = layout.stages(model)[stage]
    layers = 0.0
    for layer in range(first, last):
        if layout.recompute == "full":
            layers += width * tokens * h / shared
            continue
        expert = layer in model.expert_layers
        ffn = (model.expert_ffn * model.topk + model.shared_ffn) if expert else model.ffn
        heads = (
            (model.heads + 2 * model.groups) * model.head_dim
            if not model.mla
            else (model.heads * (2 * (model.qk_dim + model.rope_dim) + model.v_dim))
        )
        kept = 4.0 * h / shared  # inputs of the norms, their outputs
        kept += (heads + model.heads * (model.v_dim or model.head_dim) + (3.0 if model.gated else 2.0) * ffn) / t
        if expert:
            kept += 2.0 * model.topk * h / t  # dispatched and combined tokens
        if not layout.flash:  # unfused: rotated queries and keys beside the others, the activation before its product
            kept += ((model.heads + model.groups) * model.head_dim + (ffn if model.gated else 0.0)) / t
        layers += width * tokens * kept
        if not layout.flash and layout.recompute == "none":
            layers += width * tokens * model.sequence * model.heads / t
    total = layers * layout.under_way(stage)
    if stage == layout.pp - 1:  # logits; where they are narrower, in fp32 too, and their gradient
        total += tokens * model.vocabulary / t * (width if width == 4 else width + 8.0)
    return total
