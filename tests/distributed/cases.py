"""A training run to be made by the pool of ranks, and the flags of the small models that the tests train."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMON = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --lr-warmup-iters 2 --min-lr 3e-4 "
    "--lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 32 --eval-interval 1000 --eval-iters 0 --log-interval 1000 --hidden-dropout 0 "
    "--attention-dropout 0 --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--no-create-attention-mask-in-dataloader --distributed-timeout-minutes 2 --hang-timeout 0 --init-method-std 0.1"
).split()

DENSE = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --untie-embeddings-and-output-weights".split()
TIED = "--num-layers 4 --hidden-size 32 --num-attention-heads 4".split()
GQA = [*DENSE, "--group-query-attention", "--num-query-groups", "2"]
GPT2 = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --position-embedding-type learned_absolute "
    "--normalization LayerNorm"
).split()
MOE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --untie-embeddings-and-output-weights --num-experts 4 "
    "--moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-router-load-balancing-type none "
    "--moe-token-dispatcher-type alltoall"
).split()

MTP = [*DENSE, "--num-layers", "2", "--mtp-num-layers", "1"]
SHARED_EXPERTS = [*MOE, "--moe-layer-freq", "2", "--moe-shared-expert-intermediate-size", "64"]
HYBRID = [*MOE, "--hybrid-layer-pattern", "*-*E"]  # attention, MLP and MoE layers of Megatron's HybridModel
OUTPUT_GATE = [*DENSE, "--num-layers", "2", "--attention-output-gate"]

MUON = "--optimizer muon --muon-fp32-matmul-prec high".split()
# SOAP divides by the gradient's size in every direction, so it scales rounding noise up where there is no gradient: in
# the null space of a vector's factor, and of a router's, with few tokens an expert. No two layouts agree on noise.
SOAP = "--optimizer soap --soap-factor-precision fp64 --soap-eps 1e-6 --soap-precondition-1d false".split()
SOAP_HIDDEN = ["--optimizer", "soap", "--optimizer-groups", str(Path(__file__).with_name("soap_hidden.yaml"))]
# one factor a matrix, of its shorter side: the other side may be cut
SOAP_ONE_SIDED = [*SOAP, "--soap-one-sided", "true"]
SOAP_STRIPS = [*SOAP_ONE_SIDED, "--soap-block-size", "16"]  # two strips or four of every matrix
SOAP_BLOCKS = [*SOAP, "--soap-block-size", "16"]  # 32 × 32 and 32 × 64: several blocks on either side
NORMUON = [*MUON, "--muon-normuon", "true"]
MUON_H = "--optimizer muon_h --muon-h-fp32-matmul-prec high".split()
SOAP_H = (
    "--optimizer soap_h --soap-h-factor-precision fp64 --soap-h-eps 1e-6 --soap-h-precondition-1d false "
    "--soap-h-block-size 16"
).split()
ADAM_H = "--optimizer adam_h".split()
ADAMW = "--optimizer adamw".split()
CONSTANT = "--lr-decay-style constant --min-lr 0".split()  # what schedule_free asks for

# Rules that came after the study's: in the tables over all rules one quick case each, all else slow
LATER = (
    "ademamix", "adopt", "dion", "dion2", "dion3", "kl_shampoo", "kl_soap", "prodigy", "schedule_free", "soap_muon"
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Parallel sizes as flags; `ranks` is the world size."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()

    @staticmethod
    def of(
        name: str,
        ranks: int,
        tp: int = 1,
        pp: int = 1,
        *,
        ep: int = 1,
        etp: int = 0,
        vpp: int = 0,
        sp: bool = False,
        distopt: bool = False,
        more: Sequence[str] = (),
    ) -> "Layout":
        flags = [f"--tensor-model-parallel-size={tp}", f"--pipeline-model-parallel-size={pp}"]
        flags += [f"--expert-model-parallel-size={ep}"] if ep > 1 else []
        flags += [f"--expert-tensor-parallel-size={etp}"] if etp else []
        flags += [f"--num-virtual-stages-per-pipeline-rank={vpp}"] if vpp else []
        flags += ["--sequence-parallel"] if sp else []
        flags += ["--use-distributed-optimizer"] if distopt else []
        return Layout(name, ranks, (*flags, *more))


ONE = Layout("one", 1)
TP2 = Layout.of("tp2", 2, tp=2)
PP2 = Layout.of("pp2", 2, pp=2)
VPP2 = Layout.of("pp2-vpp2", 2, pp=2, vpp=2)
DP2 = Layout.of("dp2", 2)
DP2_DIST = Layout.of("dp2-distopt", 2, distopt=True)
SP2 = Layout.of("tp2-sp", 2, tp=2, sp=True)
TP2_PP2 = Layout.of("tp2-pp2", 4, tp=2, pp=2)
TP2_DP2 = Layout.of("tp2-dp2", 4, tp=2)
TP2_DP2_DIST = Layout.of("tp2-dp2-distopt", 4, tp=2, distopt=True)
DP4_DIST = Layout.of("dp4-distopt", 4, distopt=True)
TP4 = Layout.of("tp4", 4, tp=4)
DP4 = Layout.of("dp4", 4)
PP2_DP2 = Layout.of("pp2-dp2", 4, pp=2)
PP2_DP2_DIST = Layout.of("pp2-dp2-distopt", 4, pp=2, distopt=True)
TWICE = "--num-distributed-optimizer-instances=2"
ACROSS, WITHIN = ((TWICE, f"--matrix-instances={owners}") for owners in ("across", "within"))
DP2X2 = Layout.of("dp2x2", 4, distopt=True, more=ACROSS)
DP2X2_WITHIN = Layout.of("dp2x2-within", 4, distopt=True, more=WITHIN)
EP2X2 = Layout.of("ep2x2", 4, ep=2, distopt=True, more=ACROSS)
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
EP2 = Layout.of("ep2", 2, ep=2)
EP2_DIST = Layout.of("ep2-distopt", 2, ep=2, distopt=True)


@dataclass(frozen=True)
class Case:
    """One run: `hook` names a function of `hooks.py` that is called with the case inside the ranks, before training."""

    name: str
    layout: Layout
    flags: tuple[str, ...]
    steps: int = 20
    hook: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    def argv(self, data: str) -> list[str]:
        fixed = ["--train-iters", str(self.steps), "--lr-decay-iters", "30", "--train-data-path", data]
        return [*COMMON, *fixed, *self.layout.flags, *self.flags]


def case(model: Sequence[str], optimizer: Sequence[str], layout: Layout, name: str = "", **more: Any) -> Case:
    """A case named by its layout unless told otherwise."""
    return Case(name or layout.name, layout, (*model, *optimizer), **more)
