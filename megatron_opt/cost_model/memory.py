"""Memory of the fullest GPU: parameters, gradients, main copies, optimizer state, activations, workspace."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.plan import DomainPlan


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

    @property
    def model_and_optimizer(self) -> float:
        """What does not depend on the micro-batch."""
        return self.total - self.activations - self.reserved


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
    return Memory(
        held * layout.parameter_bytes,
        grads,
        main,
        state,
        activations(model, layout, index),
        _workspace(layout, stage),
        padding,
        cluster.reserved,
    )


def _workspace(layout: Layout, stage: Sequence[DomainPlan]) -> float:
    """Gradients in fp32 where the buffer is narrower, slabs on their way, and the largest matrix's temporaries."""
    total = 0.0
    for domain in stage:
        if not domain.infos:
            continue
        largest = max(info.shape[0] * (info.shape[1] if len(info.shape) > 1 else 1) for info in domain.infos.values())
        slab = largest / max(domain.slices[name] for name in domain.infos)
        travelling = (
            min(4.0 * layout.bucket_bytes, 8.0 * domain.matrix_numel / domain.ranks) if domain.ranks > 1 else 0.0
        )
        total = max(total, travelling + 12.0 * slab)
    return total


def activations(model: Model, layout: Layout, stage: int) -> float:
    """Bytes kept between forward and backward (arXiv 2205.05198), for the micro-batches that a stage has under way."""
    width = 4.0 if layout.dtype == "fp32" else 2.0
    tokens = layout.micro_batch * model.sequence / layout.cp
    t = layout.tp
    shared = t if layout.sequence_parallel else 1
    first, last = layout.stages(model)[stage]
    h = model.hidden
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
        layers += width * tokens * kept
        if not layout.flash and layout.recompute == "none":
            layers += (2 * width) * tokens * model.sequence * model.heads / t
    under_way = 1.0
    if layout.pp > 1:
        under_way = min(layout.microbatches, layout.pp - stage)
        if layout.virtual > 1:
            under_way *= 1 + (layout.pp - 1) / (layout.pp * layout.virtual)
    total = layers * under_way
    if stage == layout.pp - 1:  # logits in the model's type and in fp32, and their gradient
        total += tokens * model.vocabulary / t * (width + 8.0)
    return total
