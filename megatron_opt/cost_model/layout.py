"""How a model is laid over ranks, and which ranks share what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.pipeline import REMEDY, parse_layout, split_of
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.layout.fp8 import Fp8


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and the flags that decide memory and traffic; `world` ranks in all."""

    world: int
    tp: int = 1
    pp: int = 1
    virtual: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    dtype: str = "fp32"
    sequence_parallel: bool = False
    distributed: bool = False
    instances: int = 1  # of the distributed optimizer, each of which cuts over its own data-parallel ranks
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_tp: bool = False
    grad_reduce_bf16: bool = False
    recompute: str = "none"  # none, selective, full
    flash: bool = True
    fused_accumulation: bool = True  # backward adds to the gradient buffer itself
    fp8: Fp8 | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    split: tuple[int, ...] = ()  # layers of each virtual stage in the model's order; empty: even
    modules: tuple[str, ...] = ()  # what selective recomputation recomputes beside the scores of unfused attention
    dispatcher: str = "alltoall"  # of tokens to experts; `flex` sends a token to each node once
    fills_experts: bool = False  # and lays each expert's tokens in as many rows as FP8 products want
    node_limit: int = 0  # groups of experts that a token may go to, of `groups`; 0: any
    expert_groups: int = 0
    overlap_ep: bool = False
    fp8_activation: bool = False  # what the MLP's activation reads is kept in fp8

    @property
    def communication_bytes(self) -> int:
        """Bytes of an element that travels to or from its owner."""
        return int(self.engine.communication_dtype.itemsize)

    @staticmethod
    def of(flags: Mapping[str, Any], world: int, model: Model) -> "Layout":
        """From Megatron's flags; refuses what does not divide."""
        number = lambda key, default=1: int(flags.get(key) or default)  # noqa: E731
        pp = number("pipeline-model-parallel-size")
        virtual = number("num-virtual-stages-per-pipeline-rank")
        if per_stage := flags.get("num-layers-per-virtual-pipeline-stage"):
            virtual = max(1, model.layers // pp // int(per_stage))
        if flags.get("pipeline-model-parallel-layout") and virtual == 1:
            virtual = max(1, len(parse_layout(str(flags["pipeline-model-parallel-layout"]))) // pp)
        tp = number("tensor-model-parallel-size")
        if flags.get("bf16") and flags.get("fp16"):
            raise UserError("--bf16 and --fp16 do not go together; give one of them.")
        granularity = flags.get("recompute-granularity") or (
            "selective" if flags.get("recompute-activations") else "none"
        )
        layout = Layout(
            world=world,
            tp=tp,
            pp=pp,
            virtual=virtual,
            cp=number("context-parallel-size"),
            ep=number("expert-model-parallel-size"),
            etp=number("expert-tensor-parallel-size", tp),
            micro_batch=number("micro-batch-size"),
            global_batch=number("global-batch-size", 0),
            dtype="bf16" if flags.get("bf16") else "fp16" if flags.get("fp16") else "fp32",
            sequence_parallel=bool(flags.get("sequence-parallel")) and tp > 1,
            distributed=bool(flags.get("use-distributed-optimizer")),
            instances=number("num-distributed-optimizer-instances"),
            overlap_grad_reduce=bool(flags.get("overlap-grad-reduce")),
            overlap_param_gather=bool(flags.get("overlap-param-gather")),
            overlap_tp=bool(flags.get("tp-comm-overlap")),
            grad_reduce_bf16=bool(flags.get("grad-reduce-in-bf16")),
            recompute=granularity,
            flash=flags.get("transformer-impl") != "local",
            fused_accumulation=not flags.get("no-gradient-accumulation-fusion"),
            fp8=Fp8.of(flags),
            engine=EngineOptions.of({key.replace("-", "_"): value for key, value in flags.items()}),
            split=split_of(flags, model.layers, pp, virtual),
            modules=_modules(flags) if granularity == "selective" else (),
            dispatcher=str(flags.get("moe-token-dispatcher-type") or "alltoall"),
            fills_experts=str(flags.get("moe-flex-dispatcher-backend")) in ("hybridep", "ncclep"),
            node_limit=number("moe-router-group-topk", 0),
            expert_groups=number("moe-router-num-groups", 0),
            overlap_ep=bool(flags.get("overlap-moe-expert-parallel-comm")),
            fp8_activation=bool(flags.get("activation-func-fp8-input-store")),
        )
        if not layout.global_batch:
            layout = Layout(**{**vars(layout), "global_batch": layout.micro_batch * layout.data_parallel})
        layout.check(model)
        return layout

    @property
    def data_parallel(self) -> int:
        """Ranks with equal dense parameters and different data (context parallelism aside)."""
        return max(1, self.world // (self.tp * self.pp * self.cp))

    @property
    def dense_ranks(self) -> int:
        """Ranks that share one stage's dense parameters: the shard group of its optimizer."""
        return self.tp * self.cp * self.data_parallel

    @property
    def expert_data_parallel(self) -> int:
        """Ranks with equal experts and different data."""
        return max(1, self.dense_ranks // (self.ep * self.etp))

    @property
    def expert_ranks(self) -> int:
        """Ranks that share one expert-parallel rank's experts."""
        return self.etp * self.expert_data_parallel

    @property
    def microbatches(self) -> int:
        """Micro-batches a step on each data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.data_parallel)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one parameter in the model."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that share what lies between the sharded products of a layer."""
        return self.tp if self.sequence_parallel else 1

    @property
    def product_bytes(self) -> int:
        """Bytes of an element of a product's input that backward keeps: in FP8 the numbers by column."""
        return 1 if self.fp8 is not None else self.parameter_bytes

    def local_tokens(self, model: Model) -> float:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch * model.sequence / self.cp

    def in_flight(self, stage: int) -> float:
        """Micro-batches whose activations a stage keeps at once (1F1B, interleaved with virtual stages)."""
        if self.pp == 1:
            return 1.0
        interleaved = 1 + (self.pp - 1) / (self.pp * self.virtual) if self.virtual > 1 else 1.0
        return min(self.microbatches, self.pp - stage) * interleaved

    def tokens(self, model: Model) -> int:
        """Tokens a step over all ranks."""
        return self.global_batch * model.sequence

    def stages(self, model: Model) -> list[tuple[int, int]]:
        """[first, last) layers of each pipeline stage; virtual stages are summed as if they were neighbours."""
        if self.split:
            edges = list(accumulate((sum(self.split[rank :: self.pp]) for rank in range(self.pp)), initial=0))
        else:
            edges = [model.layers * stage // self.pp for stage in range(self.pp + 1)]
        return list(pairwise(edges))

    def problem(self, model: Model) -> str | None:
        """Why this layout cannot run, in a clause; None where it can."""
        sizes = self.tp * self.pp * self.cp
        if self.world < sizes or self.world % sizes:
            return f"{self.world} ranks are not divisible by TP {self.tp} × PP {self.pp} × CP {self.cp} = {sizes}"
        if model.heads % self.tp:
            return f"{model.heads} attention heads are not divisible by TP {self.tp}"
        if model.heads % model.groups:
            return f"{model.heads} attention heads are not divisible by {model.groups} query groups"
        if model.topk > model.experts:
            return f"a token cannot go to {model.topk} of {model.experts} experts"
        if model.groups % self.tp and self.tp % model.groups:
            return f"{model.groups} query groups and TP {self.tp} do not divide one another"
        if model.ffn % self.tp:
            return f"FFN width {model.ffn} is not divisible by TP {self.tp}"
        if not self.split and model.layers % (self.pp * self.virtual):
            return f"{model.layers} layers are not divisible by PP {self.pp} × {self.virtual} virtual stages; {REMEDY}"
        if self.split and not all(sum(self.split[rank :: self.pp]) for rank in range(self.pp)):
            return f"a stage of PP {self.pp} has no layer"
        if self.virtual > 1 and self.pp < 2:
            return "virtual stages need a pipeline"
        if self.ep > 1 and not model.experts:
            return f"EP {self.ep} needs a model with experts"
        if model.experts and (model.experts % self.ep or self.dense_ranks % (self.ep * self.etp)):
            return (
                f"{model.experts} experts on {self.dense_ranks} ranks a stage do not fit EP {self.ep} × ETP {self.etp}"
            )
        if self.instances > 1 and not self.distributed:
            return f"{self.instances} instances of the distributed optimizer need --use-distributed-optimizer"
        cut = {f"CP {self.cp} × DP {self.data_parallel}": self.cp * self.data_parallel}
        cut |= {f"the experts' DP {self.expert_data_parallel}": self.expert_data_parallel} if model.experts else {}
        for what, ranks in cut.items():
            if ranks % self.instances:
                return f"{what} is not divisible by --num-distributed-optimizer-instances {self.instances}"
        if self.global_batch % (self.micro_batch * self.data_parallel) or not self.microbatches:
            return (
                f"global batch {self.global_batch} is not a multiple of micro-batch {self.micro_batch} × "
                f"DP {self.data_parallel}"
            )
        if self.sequence_parallel and model.sequence % self.tp:
            return f"sequence {model.sequence} is not divisible by TP {self.tp}"
        if self.overlap_ep and (problem := self._overlap_problem()):
            return problem
        if self.cp > 1 and model.sequence % (2 * self.cp):
            return f"sequence {model.sequence} is not divisible by twice CP {self.cp}"
        return None

    def _overlap_problem(self) -> str | None:
        """Why Megatron refuses --overlap-moe-expert-parallel-comm here."""
        if self.ep == 1:
            return "--overlap-moe-expert-parallel-comm needs expert parallelism"
        if self.pp > 1 and self.virtual == 1:
            return "--overlap-moe-expert-parallel-comm needs virtual stages in a pipeline"
        if self.recompute == "full" or "moe" in self.modules:
            return "--overlap-moe-expert-parallel-comm refuses recomputation of the MoE layer"
        return None

    def check(self, model: Model) -> None:
        """Raise UserError for a layout that cannot run."""
        if problem := self.problem(model):
            raise UserError(
                f"the layout cannot run: {problem}; change --gpus, --global-batch-size or a size of the layout "
                "(--tensor-model-parallel-size and its like)."
            )

    def name(self) -> str:
        """Short form, such as TP2·PP4·DP8."""
        parts = [("TP", self.tp), ("CP", self.cp), ("PP", self.pp), ("VPP", self.virtual), ("EP", self.ep)]
        words = [f"{word}{size}" for word, size in parts if size > 1]
        instances = f" in {self.instances} instances" if self.instances > 1 else ""
        return "·".join([*words, f"DP{self.data_parallel}"]) + instances


MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


def _modules(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """Megatron's --recompute-modules."""
    modules = tuple(str(flags.get("recompute-modules") or "core_attn").split())
    if unknown := sorted(set(modules) - set(MODULES)):
        raise UserError(f"--recompute-modules has no {unknown[0]!r}; it has {', '.join(MODULES)}.")
    return modules
