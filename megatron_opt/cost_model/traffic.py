"""Communication of a step outside the optimizer: seconds and bytes by kind, and what is hidden under computation."""

from dataclasses import dataclass, field

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layers import held_elements, kinds, quantized_elements, quantized_kinds
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
    sent = Traffic()
    width, tokens = layout.parameter_bytes, layout.local_tokens(model)
    activation = tokens * model.hidden * width
    fullest = max(layout.stages(model), key=lambda stage: stage[1] - stage[0])
    layers, count = fullest[1] - fullest[0], layout.microbatches
    again = 1.5 if layout.recompute == "full" else 1.0  # the forward pass's messages are sent once more
    t, crowd = layout.tp, cluster.crowding(layout.world)
    overlap = cluster.overlap
    if t > 1:  # two all-reduces forward, two backward (or as many reduce-scatter and all-gather pairs)
        volume = 2 * (t - 1) / t * activation
        each = cluster.ring(volume, t, kind="all_reduce") * crowd
        hidden = 0.6 * overlap if layout.overlap_tp else 0.0
        total = 4 * layers * count * again
        if layout.sequence_parallel and layout.fp8 is not None:  # of each pair the all-gather carries FP8 numbers
            total *= 1 - sum(quantized_kinds(model, layout, *fullest)) / layers / 4
        sent.add("tensor", each * total, volume * total, each * total * hidden)
    if layout.cp > 1:  # keys and values travel the ring, forward and twice backward
        keys = (
            model.groups * model.head_dim * 2 / model.hidden
            if not model.mla
            else (model.kv_lora + model.rope_dim) / model.hidden
        )
        volume = (layout.cp - 1) * activation * keys / t
        each = cluster.ring(volume, layout.cp, stride=t) * crowd
        total = (3 + 2 * (again - 1)) * layers * count
        sent.add("context", each * total, volume * total, 0.8 * each * total * overlap)
    if layout.pp > 1:
        volume = activation / layout.sequence_shards
        each = cluster.ring(volume, 2, stride=max(1, layout.world // layout.pp))
        trips = 2 * layout.virtual * count
        interleaved = 0.5 * overlap if layout.virtual > 1 else 0.0
        sent.add("pipeline", each * trips, volume * trips, each * trips * interleaved)
    if layout.ep > 1:
        again = max(again, 1.5 if "moe" in layout.modules else 1.0)
        total = 4 * max(kinds(model, *stage)[1] for stage in layout.stages(model)) * count * again
        each, volume = expert_transfer(model, layout, cluster)
        hidden = min(0.8 * overlap * each * crowd * total, 0.8 * forward_backward) if layout.overlap_ep else 0.0
        sent.add("expert", each * crowd * total, volume * total, hidden)
    _data(sent, model, layout, cluster, forward_backward, crowd)
    return sent


def expert_transfer(model: Model, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds and bytes of one dispatch (or combine) of a micro-batch's tokens to the ranks of their experts.

    `alltoall` sends a token to every one of its experts. `flex` (DeepEP, arXiv 2412.19437, section 3.2.2) sends it to
    every node once and spreads it there; a router limited to groups of experts, which lie on nodes, bounds the nodes.
    Dispatch in fp8 halves nothing here: Megatron sends bf16 unless told otherwise.
    """
    token = model.hidden * layout.parameter_bytes
    tokens = layout.local_tokens(model) / layout.tp
    routed = tokens * model.topk * token * (layout.ep - 1) / layout.ep
    inside = min(max(1, cluster.gpus_per_node // layout.etp), layout.ep)
    nodes = layout.ep / inside
    if layout.dispatcher != "flex" or nodes <= 1:
        return cluster.transfer(routed, layout.ep, stride=layout.etp), routed
    met = nodes * (1 - (1 - 1 / nodes) ** model.topk)  # nodes that a token meets, experts drawn evenly
    if layout.node_limit and layout.expert_groups:
        met = min(met, max(1.0, layout.node_limit * nodes / layout.expert_groups), nodes)
    far = tokens * token * met * (nodes - 1) / nodes
    near = tokens * model.topk * token * (inside - 1) / inside
    seconds = max(near / cluster.node.bandwidth, far / cluster.network.bandwidth)
    return seconds + cluster.network.latency * (1 + nodes / 32), far + near


def _data(sent: Traffic, model: Model, layout: Layout, cluster: Cluster, forward_backward: float, crowd: float) -> None:
    """Gradients over data-parallel ranks, and parameters back where the distributed optimizer cuts them."""
    ranks = layout.data_parallel * layout.cp
    elements = [held_elements(model, layout.tp, layout.etp, layout.ep, *stage) for stage in layout.stages(model)]
    stage = max(range(layout.pp), key=lambda index: sum(elements[index]))
    (dense, experts), quantized = elements[stage], quantized_elements(model, layout, *layout.stages(model)[stage])
    narrower = layout.parameter_bytes - (layout.fp8.gathered_bytes if layout.fp8 else layout.parameter_bytes)
    grad = 2 if layout.grad_reduce_bf16 else 4
    microbatch = forward_backward / layout.microbatches
    for kind, numel, in_fp8, size in (
        ("data", dense, quantized[0], ranks),
        ("expert data", experts, quantized[1], layout.expert_data_parallel),
    ):
        if size < 2 or not numel:
            continue
        ways = 1 if layout.distributed else 2
        size //= layout.instances  # ranks that the distributed optimizer cuts over
        reduced = ways * (size - 1) / size * numel * grad
        how = "reduce_scatter" if layout.distributed else "all_reduce"
        seconds = cluster.ring(reduced, size, stride=layout.tp, kind=how) * crowd
        hidden = 2 / 3 * microbatch * cluster.overlap if layout.overlap_grad_reduce else 0.0
        sent.add(f"{kind} gradients", seconds, reduced, hidden)
        if layout.instances > 1:  # each shard is all-reduced over its copies
            shared = 2 * (layout.instances - 1) / layout.instances * numel / size * grad
            across = cluster.ring(shared, layout.instances, stride=layout.tp * size, kind="all_reduce") * crowd
            sent.add(f"{kind} gradients between instances", across, shared, max(0.0, hidden - seconds))
        if layout.distributed:
            gathered = (size - 1) / size * (numel * layout.parameter_bytes - in_fp8 * narrower)
            seconds = cluster.ring(gathered, size, stride=layout.tp, kind="all_gather") * crowd
            hidden = 1 / 3 * microbatch * cluster.overlap if layout.overlap_param_gather else 0.0
            sent.add(f"{kind} parameters", seconds, gathered, hidden)
