"""The optimizer's plan for a cluster that one does not have: shapes and a layout in, parts, FLOPs and bytes by rank out.

The same packing and the same routes as in a run, from what every rank of one pipeline stage would hold; nothing is
allocated and no process group is needed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_opt.distributed.exchange import wires
from megatron_opt.distributed.fragments import Rect, rectangles
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.matrices import Geometry, ParamView, split_param
from megatron_opt.distributed.ownership import BALANCED, Plan, make_buckets, pack, plan_table
from megatron_opt.distributed.parts import Cell, Part, cells_of
from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.groups import GroupRule, assign


@dataclass(frozen=True)
class Parameter:
    """A whole Megatron parameter: its shape, the side that tensor parallelism cuts, and its expert, if it has one."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    expert: int | None = None

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape on one of `shards` tensor-parallel ranks."""
        if self.dim is None:
            return self.shape
        if self.shape[self.dim] % shards:
            raise UserError(
                f"{self.name} has {self.shape[self.dim]} rows or columns, which {shards} ranks cannot share."
            )
        return tuple(side // shards if i == self.dim else side for i, side in enumerate(self.shape))


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; `dp` counts data- and context-parallel ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1
    distributed: bool = False  # Megatron's distributed optimizer
    bucket_size: int | None = None  # of its gradient buffers, in elements


@dataclass
class DomainPlan:
    """One domain: the packing, and bytes that each rank sends in a step, by what they are for."""

    name: str
    plan: Plan
    sent: dict[str, list[float]]

    def sent_by_rank(self) -> dict[int, float]:
        """All that a rank sends in a step."""
        return {rank: sum(values[rank] for values in self.sent.values()) for rank in range(len(self.plan.load))}


def gpt_parameters(config: Any, padded_vocab: int, *, tied: bool, learned_positions: int = 0) -> list[Parameter]:
    """Parameters of a GPT in the order in which Megatron registers them; `config` is a TransformerConfig or its likeness."""
    if getattr(config, "multi_latent_attention", False):
        raise UserError("plans without a process group know GPT models with ordinary attention; this one has MLA.")
    h, norm = config.hidden_size, ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)
    bias, d = config.add_bias_linear, config.kv_channels
    groups = config.num_query_groups or config.num_attention_heads
    gated = 2 if getattr(config, "attention_output_gate", False) else 1
    qkv = (gated * config.num_attention_heads + 2 * groups) * d

    def linear(name: str, rows: int, cols: int, dim: int, expert: int | None = None) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (rows, cols), dim, expert)
        if bias:
            yield Parameter(f"{name}.bias", (rows,), 0 if dim == 0 else None, expert)

    def mlp(name: str, width: int, expert: int | None = None) -> Iterator[Parameter]:
        yield from linear(f"{name}.linear_fc1", width * (2 if config.gated_linear_unit else 1), h, 0, expert)
        yield from linear(f"{name}.linear_fc2", h, width, 1, expert)

    found = [Parameter("embedding.word_embeddings.weight", (padded_vocab, h), 0)]
    if learned_positions:
        found.append(Parameter("embedding.position_embeddings.weight", (learned_positions, h)))
    for number in range(config.num_layers):
        layer = f"decoder.layers.{number}"
        found += [Parameter(f"{layer}.input_layernorm.{part}", (h,)) for part in norm]
        found += linear(f"{layer}.self_attention.linear_proj", h, config.num_attention_heads * d, 1)
        found += linear(f"{layer}.self_attention.linear_qkv", qkv, h, 0)
        found += [Parameter(f"{layer}.pre_mlp_layernorm.{part}", (h,)) for part in norm]
        if config.num_moe_experts:
            found.append(Parameter(f"{layer}.mlp.router.weight", (config.num_moe_experts, h)))
            for expert in range(config.num_moe_experts):
                found += mlp(f"{layer}.mlp.experts.{expert}", config.moe_ffn_hidden_size, expert)
        else:
            found += mlp(f"{layer}.mlp", config.ffn_hidden_size)
    found += [Parameter(f"decoder.final_layernorm.{part}", (h,)) for part in norm]
    return found if tied else [*found, Parameter("output_layer.weight", (padded_vocab, h), 0)]


def stage_chunks(parameters: Sequence[Parameter], layout: Layout, stage: int, tied: bool) -> list[list[Parameter]]:
    """Parameters of one pipeline stage, chunk by chunk; layers are spread evenly over stages and their chunks."""
    layers = 1 + max(int(p.name.split(".")[2]) for p in parameters if p.name.startswith("decoder.layers."))
    pieces = layout.pp * layout.virtual
    if layers % pieces:
        raise UserError(f"{layers} layers cannot be spread evenly over {layout.pp} stages of {layout.virtual} chunks.")
    each, chunks = layers // pieces, []
    for chunk in range(layout.virtual):
        piece = chunk * layout.pp + stage
        mine = []
        for p in parameters:
            if p.name.startswith("decoder.layers."):
                inside = piece * each <= int(p.name.split(".")[2]) < (piece + 1) * each
            elif p.name.startswith("embedding."):
                inside = piece == 0
            else:
                inside = piece == pieces - 1
            if inside:
                mine.append(p)
        if tied and pieces > 1 and piece == pieces - 1:  # the last stage's copy
            mine.append(next(p for p in parameters if p.name == "embedding.word_embeddings.weight"))
        chunks.append(mine)
    return chunks


def _intervals(numels: Sequence[int], split: Sequence[bool], ranks: int, layout: Layout) -> list[list[tuple[int, int]]]:
    """By data-parallel rank and parameter: what Megatron's reduce-scatter leaves there."""
    if not layout.distributed:
        return [[(0, numel) for numel in numels]] * ranks
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    params = [torch.nn.Parameter(torch.empty(numel, device="meta"), requires_grad=False) for numel in numels]
    for param, own in zip(params, split, strict=True):
        param.shared_embedding = own  # type: ignore[attr-defined]
    ddp = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    laid = DistributedOptimizer._compute_per_buffer_param_layout(params, layout.bucket_size, ranks, ddp)
    found = []
    for rank in range(ranks):
        mine = []
        for param in params:
            first, last, bucket = laid.param_index_map[param]
            low, high = laid.bucket_indices[bucket]
            shard = (high - low) // ranks
            start, stop = max(first, low + rank * shard), min(last, low + (rank + 1) * shard)
            mine.append((start - first, stop - first) if start < stop else (0, 0))
        found.append(mine)
    return found


# A place and the ranks that hold it.
Held = dict[str, list[tuple[Rect, list[int]]]]


def _holdings(
    chunks: Sequence[Sequence[Parameter]], layout: Layout, geometry: Geometry, expert: int | None, tied: bool
) -> tuple[Held, dict[str, MatrixInfo], int]:
    """Who holds what in a domain; ranks count tensor-parallel first, as Megatron's do."""
    is_expert = expert is not None
    tp = layout.etp if is_expert else layout.tp
    replicas = layout.dp * layout.tp // (layout.ep * layout.etp) if is_expert else layout.dp
    found: dict[str, dict[tuple[Any, ...], tuple[Rect, list[int]]]] = {}
    infos: dict[str, MatrixInfo] = {}
    for chunk in chunks:
        count = 1 + max((p.expert for p in chunk if p.expert is not None), default=0)
        mine = [p for p in chunk if (None if p.expert is None else p.expert * layout.ep // count) == expert]
        numels = [torch.Size(p.local_shape(tp)).numel() for p in mine]
        # Megatron gives the tied embedding a bucket of its own wherever a stage shares it with another
        shared = [tied and layout.pp > 1 and p.name == "embedding.word_embeddings.weight" for p in mine]
        intervals = _intervals(numels, shared, replicas, layout)
        for rank in range(tp):
            views = []
            for p in mine:
                shape = p.local_shape(tp)
                made, pieces, rows, cols = split_param(
                    p.name, shape, geometry, tp_rank=rank, tp_size=tp, partition_dim=p.dim if tp > 1 else None
                )
                infos.update({info.name: info for info in made})
                views.append(ParamView(p.name, torch.empty(0), rows, cols, pieces, is_expert, p.dim is None or tp == 1))
            groups: dict[tuple[int, tuple[int, int]], list[int]] = {}
            for replica in range(replicas):
                for index, interval in enumerate(intervals[replica]):
                    if interval[0] < interval[1]:
                        groups.setdefault((index, interval), []).append(replica * tp + rank)
            for (index, (start, stop)), holders in groups.items():
                for rect in rectangles(views[index], start, stop):
                    entry = found.setdefault(rect.matrix, {}).setdefault(rect.place, (rect, []))
                    entry[1].extend(holders)
    held = {name: [(rect, sorted(ranks)) for rect, ranks in places.values()] for name, places in found.items()}
    return held, infos, tp * replicas


def _sent(
    held: Held,
    plan: Plan,
    rules: dict[str, Any],
    infos: dict[str, MatrixInfo],
    buckets: Sequence[Sequence[str]],
    wire: int,
) -> dict[str, list[float]]:
    """Bytes that each rank sends in a step, as the run's counters name them."""
    ranks = len(plan.load)
    kinds = ("gradients to owners", "updates to shards", "between slices")
    sent = {kind: [0.0] * ranks for kind in kinds}
    parts: dict[str, list[Part]] = {}
    for part in plan.parts:
        parts.setdefault(part.matrix, []).append(part)
    for name, mine in parts.items():
        for rect, holders in held[name]:
            among = set(holders)
            for part in mine:
                r0, r1, c0, c1 = part.bounds
                rows = min(r1, rect.row1) - max(r0, rect.row0)
                cols = min(c1, rect.col1) - max(c0, rect.col0)
                if rows <= 0 or cols <= 0:
                    continue
                count, own = rows * cols * wire, part.rank in among
                if not own:
                    sent["gradients to owners"][holders[part.rank % len(holders)]] += count
                sent["updates to shards"][part.rank] += count * (len(holders) - own)
    cells: dict[str, list[Cell]] = {}
    for cell in cells_of(plan.parts):
        cells.setdefault(cell.key[0], []).append(cell)
    for bucket in buckets:
        cut = [cell for name in bucket for cell in cells[name] if len(cell.parts) > 1]
        legs = [rules[cell.key[0]].legs(cell.info(infos[cell.key[0]]), cell.edges) for cell in cut]
        for turn, dtype in enumerate(wires(legs)):
            for cell, several in zip(cut, legs, strict=True):
                for index, part in enumerate(cell.parts) if turn < len(several) else ():
                    sent["between slices"][part.rank] += several[turn].sent(index) * dtype.itemsize
    return sent


def sent_in_a_step(domain: Any, step: Any) -> dict[str, list[float]]:
    """The same of a run's domain and its matrix step."""
    held: dict[str, dict[tuple[Any, ...], tuple[Rect, list[int]]]] = {}
    for rank, rects in enumerate(domain.holdings):
        for _, rect in rects:
            if rect.matrix in step.infos:
                held.setdefault(rect.matrix, {}).setdefault(rect.place, (rect, []))[1].append(rank)
    width = torch.empty(0, dtype=domain.exchange.wire).element_size()
    places = {name: list(each.values()) for name, each in held.items()}
    return _sent(places, step.placed.plan, step.rules, step.infos, step.placed.buckets, width)


def plan_model(
    parameters: Sequence[Parameter],
    config: Any,
    layout: Layout,
    rules: Sequence[GroupRule],
    *,
    tied: bool = False,
    stages: Sequence[int] | None = None,
    mode: str = "auto",
    most: float = BALANCED,
    bucket_bytes: float = 64 * 2**20,
    wire: torch.dtype = torch.float32,
    per_head: bool = False,
) -> list[DomainPlan]:
    """Plans of the domains of the given pipeline stages (all by default), in the order in which a run makes them."""
    geometry = Geometry.of(config, per_head)
    whole: dict[str, MatrixInfo] = {}
    for p in parameters:
        made, *_ = split_param(p.name, p.shape, geometry, tp_rank=0, tp_size=1, partition_dim=None)
        whole.update({info.name: info for info in made})
    groups = assign([whole[name] for name in sorted(whole)], rules)
    built = [registry.build(group.optimizer, dict(group.options)) for group in groups]
    rule_of = {info.name: rule for group, rule in zip(groups, built, strict=True) for info in group.infos}
    width = torch.empty(0, dtype=wire).element_size()
    found = []
    for stage in range(layout.pp) if stages is None else stages:
        chunks = stage_chunks(parameters, layout, stage, tied)
        experts: list[int | None] = [None, *(range(layout.ep) if config.num_moe_experts else [])]
        for expert in experts:
            held, infos, ranks = _holdings(chunks, layout, geometry, expert, tied)
            taken = {name: infos[name] for name in sorted(infos) if isinstance(rule_of[name], MatrixOptimizer)}
            jobs = [Job.of(info, rule_of[name]) for name, info in taken.items()]
            plan = pack(jobs, ranks, mode, most)
            buckets = make_buckets(plan.parts, ranks, bucket_bytes, width)
            name = f"stage {stage}" if expert is None else f"experts of stage {stage}, expert rank {expert}"
            found.append(DomainPlan(name, plan, _sent(held, plan, rule_of, taken, buckets, width)))
    return found


def from_args(
    args: Any, world: int, rules: Sequence[GroupRule], stages: Sequence[int] | None = None
) -> list[DomainPlan]:
    """Plans for Megatron flags as `world` ranks would make them."""
    tp, pp, ep = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size
    if world % (tp * pp):
        raise UserError(f"{world} ranks are not divisible by tensor parallelism {tp} × pipeline parallelism {pp}.")
    dp = world // (tp * pp)
    config = SimpleNamespace(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels or args.hidden_size // args.num_attention_heads,
        normalization=args.normalization,
        add_bias_linear=args.add_bias_linear,
        gated_linear_unit=args.swiglu,
        num_moe_experts=args.num_experts,
        multi_latent_attention=args.multi_latent_attention,
        attention_output_gate=getattr(args, "attention_output_gate", False),
    )
    tied = not args.untie_embeddings_and_output_weights
    learned = args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0
    layout = Layout(
        tp,
        pp,
        dp,
        ep,
        getattr(args, "expert_tensor_parallel_size", None) or tp,
        virtual=getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
        distributed=args.use_distributed_optimizer,
        bucket_size=max(40_000_000, 1_000_000 * dp) if args.overlap_grad_reduce and pp == 1 else None,
    )
    if not config.num_moe_experts:
        layout = replace(layout, etp=1)
    parameters = gpt_parameters(config, args.padded_vocab_size, tied=tied, learned_positions=learned)
    return plan_model(
        parameters,
        config,
        layout,
        rules,
        tied=tied,
        stages=stages,
        mode=args.matrix_mode,
        most=args.matrix_balance,
        bucket_bytes=args.exchange_bucket_mb * 2**20,
        wire={"fp32": torch.float32, "bf16": torch.bfloat16}[args.exchange_dtype],
        per_head=args.split_heads,
    )


def show(plans: Sequence[DomainPlan], folder: str | None = None) -> None:
    """Print tables, and leave `optimizer_plan.DOMAIN.json` with owner and slices of every matrix in a folder."""
    for found in plans:
        sent = found.sent_by_rank()
        print(plan_table(found.plan, sent, title=f"optimizer plan, {found.name}"), flush=True)
        if not folder:
            continue
        plan = found.plan
        content = {
            "domain": found.name,
            "digest": plan.digest(),
            "flops": plan.flops,
            "state_bytes": plan.state_bytes,
            "load": plan.load,
            "imbalance": plan.imbalance(),
            "sent_bytes": found.sent,
            "parts": [[p.matrix, p.rank, *p.bounds] for p in plan.parts],  # rows, columns
        }
        path = Path(folder) / f"optimizer_plan.{found.name.replace(' ', '_').replace(',', '')}.json"
        write_atomic(path, json.dumps(content))
