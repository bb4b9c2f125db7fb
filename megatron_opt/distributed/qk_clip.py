"""QK-clip: attention logits kept below a threshold by scaling the weights of queries and keys (MuonClip, arXiv 2507.20534).

S_h is head h's largest scaled logit over all microbatches of the step; after the optimizer's step, where S_h > τ, with γ = τ/S_h:

    W_q ← γ^α·W_q    W_k ← γ^(1−α)·W_k    latent attention: the query's rotary part by γ, the rotary key of all heads not at all

Query heads that share a key (GQA) are scaled alike, by the γ of the largest of them: the paper leaves it open, Megatron does so.
Biases of q and k are scaled with their weights.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.distributed.post_steps import Report
from megatron_opt.distributed.shard_group import ShardGroup, gather_objects
from megatron_opt.errors import UserError
from megatron_opt.kernels.host import current_device
from megatron_opt.layout.heads import HeadRows, head_rows
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.names import global_names
from megatron_opt.platform import attention_logits


def check(settings: Any) -> None:
    """Refuse flags, or a configuration, with which scaling q and k would do nothing or maxima would not be recorded."""
    asked = [flag for flag in ("qk_clip", "log_max_attention_logit") if getattr(settings, flag)]
    if not asked:
        return
    said = f"--{asked[0].replace('_', '-')}"
    if getattr(settings, "cuda_graph_impl", "none") != "none":
        raise UserError(
            f"{said} reads what attention records in every pass, which --cuda-graph-impl captures once; leave one out."
        )
    backend = getattr(settings, "attention_backend", None)
    if getattr(backend, "name", backend) == "flash":
        raise UserError(
            f"{said} needs the largest logits, which --attention-backend flash does not give; give fused or unfused."
        )
    if not settings.qk_clip:
        return
    if getattr(settings, "qk_l2_norm", False) or (settings.qk_layernorm and not settings.multi_latent_attention):
        norm = "--qk-layernorm" if settings.qk_layernorm else "--qk-l2-norm"
        raise UserError(
            f"--qk-clip scales the weights of q and k, and {norm} takes their length away again; give one of the two."
        )


@dataclass(frozen=True)
class Attention:
    """An attention of this rank: its global name, the module that records its maxima, rows of its heads."""

    name: str
    core: Any
    rows: tuple[HeadRows, ...]


@dataclass(frozen=True)
class Options:
    """Of the model's configuration; without a threshold the maxima are only logged."""

    threshold: float | None
    alpha: float
    heads: int
    groups: int

    @staticmethod
    def of(config: Any) -> "Options":
        """From a TransformerConfig."""
        latent = bool(getattr(config, "multi_latent_attention", False))
        groups = config.num_attention_heads if latent else config.num_query_groups or config.num_attention_heads
        threshold = float(config.qk_clip_threshold) if config.qk_clip else None
        return Options(threshold, float(config.qk_clip_alpha), config.num_attention_heads, int(groups))

    def power(self, part: str) -> float:
        """Of γ, by which a part is scaled."""
        return {"q": self.alpha, "k": 1.0 - self.alpha, "q_rope": 1.0}[part]


class QkClip:
    """A post-step: one all-reduce of (layers, heads) maxima over all ranks, then rows of this rank's main copies."""

    def __init__(
        self, attentions: Sequence[Attention], shard_groups: Sequence[ShardGroup], options: Options, tp_rank: int
    ) -> None:
        self.attentions, self.options, self.tp_rank = list(attentions), options, tp_rank
        names: set[str] = set()
        for part in gather_objects([a.name for a in attentions], None, dist.get_world_size()):
            names.update(part)
        self.layers = sorted(names, key=_natural)
        self.row_of = {name: index for index, name in enumerate(self.layers)}
        self.rects_of: dict[str, list[tuple[ParamShard, Any]]] = {}  # rectangles of this rank by matrix
        for shard_group in shard_groups:
            for param_shard in shard_group.param_shards:
                for rect in param_shard.rects:
                    self.rects_of.setdefault(rect.matrix, []).append((param_shard, rect))
        self.latest = 0.0  # the largest logit of the last step, what Megatron logs
        self._packed: Tensor | None = None
        self._since: Tensor | None = None  # largest by layer and head since the last report

    def begin(self) -> None:
        """Forget what evaluation, skipped steps and curvature have left."""
        for attention in self.attentions:
            setattr(attention.core, attention_logits.NAME, None)

    def prepare(self) -> None:
        """The maxima of every head of the model, on every rank, by one all-reduce."""
        packed = torch.full((len(self.layers), self.options.heads), -torch.inf, device=current_device())
        for attention in self.attentions:
            maxima = getattr(attention.core, attention_logits.NAME, None)
            if maxima is None:
                raise UserError(
                    f"the attention of {attention.name} has recorded no logits in this step, which --qk-clip and "
                    "--log-max-attention-logit need; leave them out with this attention."
                )
            first = self.tp_rank * len(maxima)
            # a reduction may drop a NaN, but no infinity
            packed[self.row_of[attention.name], first : first + len(maxima)] = maxima.float().nan_to_num(
                torch.inf, torch.inf, -torch.inf
            )
        if dist.get_world_size() > 1:
            dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        self._packed = packed.to("cpu", non_blocking=True)  # read after the wait for the norms, in the same stream

    def run(self, step: int) -> Collection[ParamShard]:
        """Scale the rows of heads whose largest logit is above the threshold; heads with one that is not finite are left alone."""
        assert self._packed is not None
        maxima, self._packed = self._packed, None
        self.latest = float(maxima.max())
        self._since = maxima if self._since is None else torch.maximum(self._since, maxima)
        if self.options.threshold is None:
            return ()
        largest = maxima.view(len(self.layers), self.options.groups, -1).amax(-1).tolist()  # by key
        changed: dict[int, ParamShard] = {}
        for attention in self.attentions:
            of_heads = largest[self.row_of[attention.name]]
            for rows in attention.rows:
                if self.options.threshold < of_heads[rows.group] < math.inf:
                    self._scale(rows, self.options.threshold / of_heads[rows.group], changed)
        return changed.values()

    def _scale(self, rows: HeadRows, gamma: float, changed: dict[int, ParamShard]) -> None:
        factor = gamma ** self.options.power(rows.part)
        for param_shard, rect in self.rects_of.get(rows.matrix, ()):
            first, stop = max(rows.start, rect.region.row0), min(rows.stop, rect.region.row1)
            if first < stop:
                here = rect.run(param_shard.main).view(rect.region.shape)
                here[first - rect.region.row0 : stop - rect.region.row0].mul_(factor)
                changed[id(param_shard)] = param_shard

    def in_place_of_megatrons(self, original: Any) -> Any:
        """Megatron's `clip_qk`, which its loop calls after the step: nothing is left to do, the largest logit to say."""
        return lambda model, log_max_only=False: self.latest

    def report(self) -> Report | None:
        """The largest logit of every layer since the last report, and the heads that were above the threshold."""
        if self._since is None:
            return None
        since, self._since, threshold = self._since, None, self.options.threshold
        largest = float(since.max())
        layer, head = divmod(int(since.argmax()), self.options.heads)
        line = f" attention logits: at most {largest:.4g} ({self.layers[layer]}, head {head})"
        by_layer = dict(zip(self.layers, since.amax(-1).tolist(), strict=True))
        entry: dict[str, Any] = {"max_logit": largest, "max_by_layer": by_layer}
        series = {"attention/max-logit": largest}
        if threshold is not None:
            above = since > threshold
            clipped = {name: row.nonzero().view(-1).tolist() for name, row in zip(self.layers, above, strict=True)}
            count = int(above.sum())
            line += f", {count} of {above.numel()} heads clipped to {threshold:g}"
            entry |= {"threshold": threshold, "heads": above.numel(), "clipped_heads": count}
            entry["clipped"] = {name: heads for name, heads in clipped.items() if heads}
            series |= {"attention/clipped-heads": float(count), "attention/qk-clip-threshold": threshold}
        return Report("attention", line, entry, series)


def make(
    chunks: Sequence[Any], shard_groups: Sequence[ShardGroup], keeps_norm: Collection[str], config: Any, per_head: bool
) -> QkClip | None:
    """For a model whose configuration asks for it; `keeps_norm`: matrices whose rules would undo a scaling."""
    from megatron.core import parallel_state as ps

    if not attention_logits.wanted(config):
        return None
    check(config)
    options, geometry = Options.of(config), Geometry.of(config, per_head)
    attentions = [one for chunk in chunks for one in _attentions(chunk, geometry)]
    trained = {name for shard_group in shard_groups for name in shard_group.infos}
    wanted = {rows.matrix for attention in attentions for rows in attention.rows}
    if options.threshold is not None:
        if frozen := sorted(wanted - trained):
            raise UserError(f"--qk-clip scales the weights of q and k, and {frozen[0]} is not trained; leave it out.")
        if kept := sorted(wanted & set(keeps_norm)):
            raise UserError(
                f"--qk-clip shrinks q and k, and the optimizer of {kept[0]} gives every weight its first norm back; train q "
                "and k by another (--optimizer-groups), or give --qk-layernorm instead."
            )
    made = QkClip(attentions, shard_groups, options, ps.get_tensor_model_parallel_rank())
    if not made.layers:
        raise UserError("--qk-clip and --log-max-attention-logit need a model with attention; leave them out.")
    return made


def _attentions(chunk: Any, geometry: Geometry) -> list[Attention]:
    """The attentions of an unwrapped model chunk, by the names of their parameters."""
    names = {id(param): name for name, param in global_names(chunk, 0)}
    attentions = []
    for module in chunk.modules():
        core = getattr(module, "core_attention", None)
        if core is None:
            continue
        own = {name: names[id(param)] for name, param in module.named_parameters() if id(param) in names}
        rows_by = next((n for n in ("linear_qkv.weight", "linear_kv_up_proj.weight") if n in own), None)
        if rows_by is None:
            raise UserError(
                f"--qk-clip and --log-max-attention-logit do not know the attention {type(module).__name__}; leave them out."
            )
        name = own[rows_by].removesuffix(f".{rows_by}")
        attentions.append(Attention(name, core, tuple(head_rows(name, own, geometry))))
    return attentions


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]
