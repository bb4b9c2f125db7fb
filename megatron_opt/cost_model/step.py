"""One training step: seconds, FLOPs, bytes and memory per GPU, broken down."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_opt.cost_model import flags as flag_reader
from megatron_opt.cost_model.cluster import LAYER, Cluster
from megatron_opt.cost_model.layers import kinds, layer_shape, quantized_kinds
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.memory import Memory, memory
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.optimizer_time import OptimizerTime, shard_group_time
from megatron_opt.cost_model.plan import ShardGroupPlan, plans
from megatron_opt.cost_model.traffic import Traffic, traffic
from megatron_opt.errors import UserError

MOST_DEVICES = 1_000_000
CURVATURE_PASSES = {"gnb": 1.0, "hutchinson": 2.0}
"""forward and backward passes over a step's batches that one estimate of Sophia's curvature takes"""


@dataclass
class Step:
    """A predicted step; all times are seconds of the slowest GPU, averaged over steps unless they say otherwise."""

    model: Model
    layout: Layout
    cluster: Cluster
    optimizer_name: str
    forward_backward: float
    bubble: float
    traffic: Traffic
    optimizer: OptimizerTime
    memory: Memory
    plans: list[list[ShardGroupPlan]] = field(repr=False, default_factory=list)
    curvature_passes: float = 0.0
    """forward and backward passes that an estimate of curvature adds, once in `curvature_every` steps"""
    curvature_every: int = 1

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return self.base + self.curvature + self.optimizer.mean

    @property
    def curvature(self) -> float:
        """Estimates of curvature, averaged over steps."""
        return self.base * self.curvature_passes / self.curvature_every

    @property
    def base(self) -> float:
        """Everything but the optimizer."""
        return self.forward_backward + self.bubble + self.traffic.exposed

    @property
    def ordinary(self) -> float:
        """A step without refreshes and estimates of curvature."""
        return self.base + self.optimizer.ordinary

    @property
    def refresh_step(self) -> float:
        """A step with refreshes, and with an estimate of curvature."""
        return self.base * (1 + self.curvature_passes) + self.optimizer.worst

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.layout.tokens(self.model)

    @property
    def training_flops(self) -> float:
        """Model FLOPs of a step over all GPUs, recomputation not counted."""
        return self.model.step_flops_per_token * self.tokens

    @property
    def optimizer_flops(self) -> float:
        """FLOPs of the optimizer in a mean step over all GPUs."""
        stages = [
            sum(
                sum(c.mean_flops() for c in shard_group.costs.values())
                * shard_group.plan.instances
                * _copies(shard_group, self.layout)
                for shard_group in stage
            )
            for stage in self.plans
        ]
        return sum(stages) + self.training_flops * self.curvature_passes / self.curvature_every

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of each GPU."""
        return self.training_flops / self.seconds / self.layout.world

    @property
    def optimizer_share(self) -> float:
        """Optimizer's share of a mean step's time."""
        return (self.optimizer.mean + self.curvature) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all GPUs."""
        return self.tokens / self.seconds


def _copies(shard_group: ShardGroupPlan, layout: Layout) -> int:
    """Shard groups with this plan in one stage: one for dense parameters, one for each expert-parallel rank's experts."""
    return layout.ep if shard_group.name.startswith("experts") else 1


def predict(flags: Mapping[str, Any], cluster: Cluster, world: int, grouping: Any = None, exact: bool = True) -> Step:
    """The step that these flags take on `world` devices of the cluster; raises UserError for what cannot run.

    `exact` follows the engine's routes for the optimizer's traffic, which takes up to seconds.
    """
    check_world(cluster, world)
    model = Model.of(flags).priced()
    layout = Layout.of(flags, world, model)
    if layout.fp8 is not None:
        cluster.check_fp8(layout.fp8.recipe)
    group_configs = grouping if grouping is not None else flag_reader.grouping(flags)
    name, decay = str(flags.get("optimizer", "adamw")), str(flags.get("decay-mode", "decoupled"))
    work = optimizer_work(model, layout, cluster, group_configs, decay, exact)
    return predict_layout(model, layout, cluster, group_configs, name, decay, work)


def check_world(cluster: Cluster, world: int) -> None:
    """Refuse a number of devices that the cluster does not have."""
    if world < 1:
        raise UserError(f"{world} GPUs is no number of devices; give 1 or more.")
    if world > MOST_DEVICES:
        raise UserError(f"{world} GPUs are more than any cluster has; give at most {MOST_DEVICES:,}.")
    if cluster.devices and world > cluster.devices:
        raise UserError(f"the layout wants {world} devices, cluster {cluster.name} has {cluster.devices}; use fewer.")


@dataclass
class OptimizerWork:
    """What the optimizer does in a layout: it depends on TP, PP, EP and ranks, not on micro-batches."""

    shard_groups: list[list[ShardGroupPlan]]
    slowest: OptimizerTime
    states: list[float]  # bytes of the fullest rank of each stage


def optimizer_work(
    model: Model,
    layout: Layout,
    cluster: Cluster,
    group_configs: Any,
    decay_mode: str = "decoupled",
    exact: bool = False,
) -> OptimizerWork:
    """The optimizer's plan and the time of the slowest stage; `exact` follows the engine's routes."""
    shard_groups = plans(model, layout, group_configs, decay_mode, exact)
    timed = {
        id(stage): _merge([shard_group_time(shard_group, layout, cluster) for shard_group in stage], cluster)
        for stage in shard_groups
    }
    for key, stage in {id(stage): stage for stage in shard_groups}.items():
        waits = sum(
            cluster.reduction(shard_group.ranks) for shard_group in stage
        )  # norms by matrix, then of all that is trained
        if any(shard_group.ranks != layout.world for shard_group in stage):
            waits += cluster.reduction(layout.world)
        timed[key].exchange += waits
    slowest = max(timed.values(), key=lambda item: item.mean)
    return OptimizerWork(shard_groups, slowest, [timed[id(stage)].state_bytes for stage in shard_groups])


def predict_layout(
    model: Model,
    layout: Layout,
    cluster: Cluster,
    group_configs: Any,
    name: str,
    decay_mode: str = "decoupled",
    work: OptimizerWork | None = None,
) -> Step:
    """The step of a model in a layout that is known to fit it; `work` spares working out the optimizer's part again."""
    work = work or optimizer_work(model, layout, cluster, group_configs, decay_mode)
    forward_backward, bubble = pipeline_seconds(model, layout, cluster)
    return Step(
        model,
        layout,
        cluster,
        name,
        forward_backward,
        bubble,
        traffic(model, layout, cluster, forward_backward),
        work.slowest,
        memory(model, layout, cluster, work.shard_groups, work.states),
        work.shard_groups,
        *_curvature(work.shard_groups),
    )


def _curvature(shard_groups: list[list[ShardGroupPlan]]) -> tuple[float, int]:
    """Passes that an estimate takes, and steps from one to the next; a run makes one for all its groups (training/curvature.py)."""
    rules = [entry.optimizer.config for stage in shard_groups for group in stage for entry in group.elements]
    wanted = [one for one in rules if hasattr(one, "curvature_every")]
    if not wanted:
        return 0.0, 1
    return CURVATURE_PASSES[wanted[0].curvature], min(one.curvature_every for one in wanted)


def pipeline_seconds(model: Model, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the slowest stage over all micro-batches, and of filling and draining the pipeline.

    The slowest stage sets the pace; the first micro-batch passes through all others once: Σ − max, shared by virtual
    stages (arXiv 2104.04473, equation 2; with equal stages (PP − 1) / (micro-batches · virtual stages)).
    """
    stages = stage_seconds(model, layout, cluster)
    slowest = max(stages)
    return slowest * layout.microbatches, (sum(stages) - slowest) / layout.virtual


def _merge(parts: list[OptimizerTime], cluster: Cluster) -> OptimizerTime:
    """Dense parameters and experts are stepped one after the other."""
    total = OptimizerTime(host=cluster.overheads.step, asynchronous=not cluster.shared_cores)
    for part in parts:
        for kind, value in part.by_class.items():
            total.by_class[kind] = total.by_class.get(kind, 0.0) + value
        for what, value in part.sent.items():
            total.sent[what] = total.sent.get(what, 0.0) + value
        for key in (
            "element_wise",
            "host",
            "refresh",
            "exchange",
            "exchange_hidden",
            "offload",
            "offload_way",
            "host_bytes",
            "flops",
            "state_bytes",
        ):
            setattr(total, key, getattr(total, key) + getattr(part, key))
        total.refresh_every = max(total.refresh_every, part.refresh_every)
        total.staggered = total.staggered or part.staggered
        total.imbalance = max(total.imbalance, part.imbalance)
    return total


def layer_seconds(model: Model, layout: Layout, cluster: Cluster, expert: bool) -> float:
    """Forward and backward of one micro-batch through one layer of a kind, communication aside."""
    shape = layer_shape(model, expert)
    tokens, width = layout.local_tokens(model), layout.parameter_bytes
    dtype = "fp8" if layout.fp8 else "bf16" if width == 2 else "fp32"
    inner = layout.sequence_shards
    ffn = model.expert_ffn if expert else model.ffn
    met = tokens * model.topk * layout.ep / model.experts if expert else tokens  # tokens of one product
    attention = model.heads * model.head_dim / layout.tp
    side = min(met, model.hidden, max(attention, ffn / (layout.etp if expert else layout.tp)))
    rate = cluster.rate(LAYER, dtype, side) / (layout.fp8.product_time(cluster.transposes) if layout.fp8 else 1.0)
    forward = tokens * shape.flops / layout.tp / rate
    attend = tokens * model.attention_flops() / layout.tp / cluster.rate("attention", dtype, model.sequence)
    seconds = 3.0 * (forward + attend) + cluster.overheads.layer
    if not layout.flash:  # scores are written and read about eight times
        seconds += 8.0 * width * tokens * model.sequence * model.heads / layout.tp / cluster.bandwidth
    heads = (model.heads + model.groups) * model.head_dim
    through = 3.0 * ffn * (model.topk if expert else 1) / layout.tp
    passed = 10.0 * model.hidden / inner + 2.0 * heads / layout.tp + through
    seconds += 3.0 * width * tokens * passed / cluster.bandwidth
    if expert:
        seconds += 2.0 * width * tokens * permuted(model, layout) / cluster.bandwidth
    seconds += cast_seconds(model, layout, cluster, expert)
    if layout.recompute == "full":
        seconds += forward + attend
    elif layout.recompute == "selective":
        if "core_attn" in layout.modules:
            seconds += attend
        if "mla_up_proj" in layout.modules:
            seconds += tokens * shape.up_flops / layout.tp / rate
        if ("moe" if expert else "mlp") in layout.modules:
            seconds += tokens * shape.mlp_flops / layout.tp / rate
        again = (4.0 * model.hidden / inner if "layernorm" in layout.modules else 0.0) + (
            through if expert and "moe_act" in layout.modules else 0.0
        )
        seconds += width * tokens * again / cluster.bandwidth
    return seconds


def permuted(model: Model, layout: Layout) -> float:
    """Elements of a token that a dispatcher reads and writes to lay tokens in the order of their experts and back, one pass.

    `alltoall`: copies before the exchange, and sorted after it by the rank's experts; else copies after it, of what came
    (megatron/core/transformer/moe/token_dispatcher.py). FP8 copies each expert's tokens to a multiple of 16 or 32 rows, and what
    comes of them back (moe/experts.py), but for dispatchers that lay them so.
    """
    k = model.topk
    filled = 4.0 * k * layout.etp if layout.fp8 and not layout.fills_experts else 0.0
    if layout.dispatcher == "alltoall":
        sorted_again = 4.0 * k * layout.etp if model.experts > layout.ep else 0.0
        return (2.0 * (1 + k) + sorted_again + filled) * model.hidden / layout.tp
    came = layout.ep * (1 - (1 - 1 / layout.ep) ** k)  # ranks that a token meets, experts drawn evenly
    return (2.0 * (came + k) + filled) * model.hidden / layout.tp


def cast_seconds(model: Model, layout: Layout, cluster: Cluster, expert: bool) -> float:
    """Quantizing the inputs and gradients of a layer's products for one micro-batch, and its share of the weights', once a step.

    Under sequence parallelism a tensorwise scale of an input (two a layer) and of a gradient (two) is agreed over the TP ranks.
    """
    if layout.fp8 is None:
        return 0.0
    shape, tp = layer_shape(model, expert), layout.tp
    tokens = layout.local_tokens(model)
    agreed = 4.0 if layout.fp8.recipe == "tensorwise" and layout.sequence_parallel and tp > 1 else 0.0
    waits = agreed * cluster.ring(4.0, tp, kind="all_reduce")  # maxima of what is cut: TE's pytorch/module/_common.py
    elements = tokens * shape.weights.sides(tp, layout.sequence_shards)
    weights = shape.weights.local_elements(tp)
    if expert:
        elements += tokens * model.topk * shape.expert_weights.sides(layout.etp, 1) / tp * layout.etp
        weights += shape.expert_weights.local_elements(layout.etp) * model.experts / layout.ep
    moved = (elements + weights / layout.microbatches) * layout.fp8.cast_bytes(cluster.transposes)
    return moved / cluster.bandwidth + waits


def head_seconds(model: Model, layout: Layout, cluster: Cluster) -> float:
    """Output layer and loss of one micro-batch."""
    tokens, width = layout.local_tokens(model), layout.parameter_bytes
    rate = cluster.rate(LAYER, "bf16" if width == 2 else "fp32", min(tokens, model.hidden))
    products = 3.0 * tokens * model.output_flops() / layout.tp / rate
    return products + 24.0 * tokens * model.vocabulary / layout.tp / cluster.bandwidth  # fp32 logits, six passes


def stage_seconds(model: Model, layout: Layout, cluster: Cluster) -> list[float]:
    """Forward and backward of one micro-batch on each pipeline stage, communication aside."""
    slow = cluster.crowding(layout.world) / cluster.step_efficiency
    plain = replace(layout, fp8=None)
    by_stage: list[float] = []
    for first, last in layout.stages(model):
        seconds = (
            head_seconds(model, layout, cluster) if last == model.layers and len(by_stage) == layout.pp - 1 else 0.0
        )
        quantized = quantized_kinds(model, layout, first, last)
        for expert, (count, in_fp8) in enumerate(zip(kinds(model, first, last), quantized, strict=True)):
            for number, how in ((in_fp8, layout), (count - in_fp8, plain)):
                seconds += number * layer_seconds(model, how, cluster, bool(expert)) if number else 0.0
        by_stage.append(seconds * slow)
    return by_stage
