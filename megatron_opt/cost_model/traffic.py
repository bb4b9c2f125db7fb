"""Communication of a step outside the optimizer: seconds and bytes by kind, and what is hidden under computation."""

from dataclasses import dataclass, field

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model


@dataclass
class Traffic:
    """Seconds, hidden seconds and bytes sent by each GPU in a step, by kind (tensor, pipeline, expert, …)."""

    seconds: dict[str, float] = field(default_factory=dict)
    hidden: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)

    @property
    def exposed(self) -> float:
        """Seconds that nothing hides."""
        return sum(self.seconds.values()) - sum(self.hidden.values())

    def add(self, kind: str, seconds: float, sent: float, hidden: float = 0.0) -> None:
        """One kind; hides at most all of it."""
        if seconds > 0:
            self.seconds[kind], self.sent[kind] = seconds, sent
            self.hidden[kind] = min(hidden, seconds)


def traffic(model: Model, layout: Layout, cluster: Cluster, forward_backward: float) -> Traffic:
    """Per step, for the fullest pipeline stage."""
    found = Traffic()
    width, tokens = layout.parameter_bytes, layout.local_tokens(model)
    activation = tokens * model.hidden * width
    layers, count = model.layers / layout.pp, layout.microbatches
    t, crowd = layout.tp, cluster.crowding(layout.world)
    overlap = cluster.overlap
    if t > 1:  # two all-reduces forward, two backward (or as many reduce-scatter and all-gather pairs)
        volume = 2 * (t - 1) / t * activation
        each = cluster.ring(volume, t, kind="all_reduce") * crowd
        hidden = 0.6 * overlap if layout.overlap_tp else 0.0
        total = 4 * layers * count
        found.add("tensor", each * total, volume * total, each * total * hidden)
    if layout.cp > 1:  # keys and values travel the ring, forward and twice backward
        keys = (
            model.groups * model.head_dim * 2 / model.hidden
            if not model.mla
            else (model.kv_lora + model.rope_dim) / model.hidden
        )
        volume = (layout.cp - 1) * activation * keys / t
        each = cluster.ring(volume, layout.cp, stride=t) * crowd
        found.add(
            "context", 3 * each * layers * count, 3 * volume * layers * count, 2.4 * each * layers * count * overlap
        )
    if layout.pp > 1:
        volume = activation / layout.sequence_shards
        each = cluster.ring(volume, 2, stride=max(1, layout.world // layout.pp))
        trips = 2 * layout.virtual * count
        interleaved = 0.5 * overlap if layout.virtual > 1 else 0.0
        found.add("pipeline", each * trips, volume * trips, each * trips * interleaved)
    if layout.ep > 1:  # dispatch and combine, forward and backward
        routed = tokens * model.topk * model.hidden * width / t
        volume = routed * (layout.ep - 1) / layout.ep
        each = cluster.transfer(volume, layout.ep, stride=1) * crowd
        expert_layers = len(model.expert_layers) / layout.pp
        found.add("expert", 4 * each * expert_layers * count, 4 * volume * expert_layers * count)
    _data(found, model, layout, cluster, forward_backward, crowd)
    return found


def _data(
    found: Traffic, model: Model, layout: Layout, cluster: Cluster, forward_backward: float, crowd: float
) -> None:
    """Gradients over data-parallel ranks, and parameters back where the distributed optimizer cuts them."""
    ranks = layout.data_parallel * layout.cp
    first, last = layout.stages(model)[0]
    dense = model.stage_parameters(first, last) / layout.tp
    experts = model.expert_parameters(first, last, model.experts // layout.ep) / layout.etp if model.experts else 0.0
    grad = 2 if layout.grad_reduce_bf16 else 4
    microbatch = forward_backward / layout.microbatches
    for kind, numel, size in (("data", dense, ranks), ("expert data", experts, layout.expert_data_parallel)):
        if size < 2 or not numel:
            continue
        ways = 1 if layout.distributed else 2
        reduced = ways * (size - 1) / size * numel * grad
        how = "reduce_scatter" if layout.distributed else "all_reduce"
        seconds = cluster.ring(reduced, size, stride=layout.tp, kind=how) * crowd
        hidden = 2 / 3 * microbatch * cluster.overlap if layout.overlap_grad_reduce else 0.0
        found.add(f"{kind} gradients", seconds, reduced, hidden)
        if layout.distributed:
            gathered = (size - 1) / size * numel * layout.parameter_bytes
            seconds = cluster.ring(gathered, size, stride=layout.tp, kind="all_gather") * crowd
            hidden = 1 / 3 * microbatch * cluster.overlap if layout.overlap_param_gather else 0.0
            found.add(f"{kind} parameters", seconds, gathered, hidden)
