"""A model as its flags describe it: parameters by pipeline stage, logical matrices, FLOPs of a step."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_opt.cost_model.flags import required
from megatron_opt.distributed.matrices import Geometry, split_param
from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import MatrixInfo

DEFAULT_VOCABULARY = 32000


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model: its global name, whole shape, the side tensor parallelism cuts, its layer."""

    name: str
    shape: tuple[int, ...]
    cut: int | None
    layer: int  # -1: before the first layer, `layers`: after the last
    expert: int | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """Shapes of a transformer language model; `expert_layers` are the layers with experts."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    sequence: int
    gated: bool = False
    tied: bool = True
    bias: bool = True
    qkv_bias: bool = False
    norm_bias: bool = True
    learned_positions: int = 0
    experts: int = 0
    topk: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    expert_layers: frozenset[int] = frozenset()
    mla: bool = False
    q_lora: int = 0
    kv_lora: int = 0
    qk_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    per_head: bool = False

    @staticmethod
    def of(flags: Mapping[str, Any]) -> "Model":
        """From Megatron's flags; unset ones as Megatron sets them."""
        required(flags, ("num-layers", "hidden-size", "num-attention-heads", "seq-length"))
        layers, hidden, heads = (flags[key] for key in ("num-layers", "hidden-size", "num-attention-heads"))
        gated = bool(flags.get("swiglu"))
        ffn = flags.get("ffn-hidden-size") or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
        grouped = flags.get("group-query-attention") and flags.get("num-query-groups")
        if not flags.get("kv-channels") and hidden % heads:
            raise UserError(
                f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}; give --kv-channels."
            )
        experts = flags.get("num-experts") or 0
        multiple = (flags.get("make-vocab-size-divisible-by") or 128) * (flags.get("tensor-model-parallel-size") or 1)
        vocabulary = (
            flags.get("padded-vocab-size") or -(-(flags.get("vocab-size") or DEFAULT_VOCABULARY) // multiple) * multiple
        )
        positions = flags.get("position-embedding-type", "learned_absolute") == "learned_absolute"
        bias = not flags.get("disable-bias-linear")
        mla = bool(flags.get("multi-latent-attention"))
        return Model(
            layers,
            hidden,
            ffn,
            heads,
            grouped or heads,
            flags.get("kv-channels") or hidden // heads,
            vocabulary,
            flags["seq-length"],
            gated,
            not flags.get("untie-embeddings-and-output-weights"),
            bias,
            bool(flags.get("add-qkv-bias")),
            flags.get("normalization", "LayerNorm") != "RMSNorm",
            (flags.get("max-position-embeddings") or flags["seq-length"]) if positions else 0,
            experts,
            (flags.get("moe-router-topk") or 2) if experts else 0,
            flags.get("moe-ffn-hidden-size") or ffn,
            flags.get("moe-shared-expert-intermediate-size") or 0,
            _expert_layers(flags, layers) if experts else frozenset(),
            mla,
            flags.get("q-lora-rank") or 0,
            (flags.get("kv-lora-rank") or 512) if mla else 0,
            (flags.get("qk-head-dim") or 128) if mla else 0,
            (flags.get("qk-pos-emb-head-dim") or 64) if mla else 0,
            (flags.get("v-head-dim") or 128) if mla else 0,
            bool(flags.get("split-heads")),
        )

    @property
    def geometry(self) -> Geometry:
        """What cuts fused parameters into logical matrices."""
        return Geometry(
            num_heads=self.heads,
            num_groups=self.groups,
            head_dim=self.head_dim,
            gated_mlp=self.gated,
            per_head=self.per_head,
            qk_head_dim=self.qk_dim,
            v_head_dim=self.v_dim,
            kv_lora_rank=self.kv_lora,
            q_lora_rank=self.q_lora,
            rope_dim=self.rope_dim,
        )

    def _attention(self) -> list[tuple[str, tuple[int, ...], int | None]]:
        """In the order in which Megatron registers them, which its gradient buffers follow."""
        h, d = self.hidden, self.head_dim
        if not self.mla:
            rows = (self.heads + 2 * self.groups) * d
            found: list[tuple[str, tuple[int, ...], int | None]] = [("linear_proj.weight", (h, self.heads * d), 1)]
            found += [("linear_proj.bias", (h,), None)] if self.bias else []
            found.append(("linear_qkv.weight", (rows, h), 0))
            return found + ([("linear_qkv.bias", (rows,), 0)] if self.bias or self.qkv_bias else [])
        query = self.heads * (self.qk_dim + self.rope_dim)
        found = [("linear_q_proj.weight", (query, h), 0)]
        if self.q_lora:
            found = [
                ("linear_q_down_proj.weight", (self.q_lora, h), None),
                ("linear_q_up_proj.weight", (query, self.q_lora), 0),
                ("q_layernorm.weight", (self.q_lora,), None),
            ]
        return [
            ("linear_proj.weight", (h, self.heads * self.v_dim), 1),
            *found,
            ("linear_kv_down_proj.weight", (self.kv_lora + self.rope_dim, h), None),
            ("linear_kv_up_proj.weight", (self.heads * (self.qk_dim + self.v_dim), self.kv_lora), 0),
            ("kv_layernorm.weight", (self.kv_lora,), None),
        ]

    def _mlp(self, prefix: str, ffn: int) -> list[tuple[str, tuple[int, ...], int | None]]:
        up = (2 if self.gated else 1) * ffn
        found: list[tuple[str, tuple[int, ...], int | None]] = []
        for name, rows, columns, cut in (("linear_fc1", up, self.hidden, 0), ("linear_fc2", self.hidden, ffn, 1)):
            found.append((f"{prefix}{name}.weight", (rows, columns), cut))
            found += [(f"{prefix}{name}.bias", (rows,), 0 if cut == 0 else None)] if self.bias else []
        return found

    def _layer(self, layer: int, experts: range) -> Iterator[Parameter]:
        base = f"decoder.layers.{layer}"
        norms = ("weight", "bias") if self.norm_bias else ("weight",)
        for part in norms:
            yield Parameter(f"{base}.input_layernorm.{part}", (self.hidden,), None, layer)
        for name, shape, cut in self._attention():
            yield Parameter(f"{base}.self_attention.{name}", shape, cut, layer)
        for part in norms:
            yield Parameter(f"{base}.pre_mlp_layernorm.{part}", (self.hidden,), None, layer)
        if layer not in self.expert_layers:
            for name, shape, cut in self._mlp("", self.ffn):
                yield Parameter(f"{base}.mlp.{name}", shape, cut, layer)
            return
        yield Parameter(f"{base}.mlp.router.weight", (self.experts, self.hidden), None, layer)
        if self.shared_ffn:
            for name, shape, cut in self._mlp("shared_experts.", self.shared_ffn):
                yield Parameter(f"{base}.mlp.{name}", shape, cut, layer)
        for expert in experts:
            for name, shape, cut in self._mlp(f"experts.{expert}.", self.expert_ffn):
                yield Parameter(f"{base}.mlp.{name}", shape, cut, layer, expert)

    def parameters(self, first: int, last: int, experts: range | None = None, copy: bool = False) -> list[Parameter]:
        """Of layers [first, last) and of what lies before and after them; `copy`: the last stage's tied embedding."""
        found = []
        h, v = self.hidden, self.vocabulary
        if first == 0:
            found.append(Parameter("embedding.word_embeddings.weight", (v, h), 0, -1))
            if self.learned_positions:
                found.append(Parameter("embedding.position_embeddings.weight", (self.learned_positions, h), None, -1))
        for layer in range(first, last):
            found += self._layer(layer, range(self.experts) if experts is None else experts)
        if last == self.layers:
            found.append(Parameter("decoder.final_layernorm.weight", (h,), None, self.layers))
            if self.norm_bias:
                found.append(Parameter("decoder.final_layernorm.bias", (h,), None, self.layers))
            if not self.tied:
                found.append(Parameter("output_layer.weight", (v, h), 0, self.layers))
            elif copy and first > 0:
                found.append(Parameter("embedding.word_embeddings.weight", (v, h), 0, self.layers))
        return found

    def infos(self, parameter: Parameter) -> list[MatrixInfo]:
        """The logical matrices in a parameter."""
        pattern = _infos(replace(parameter, name=_pattern(parameter), layer=0, expert=None), self.geometry)
        if pattern and pattern[0].name.startswith(_pattern(parameter)):
            cut = len(_pattern(parameter))
            return [replace(info, name=parameter.name + info.name[cut:]) for info in pattern]
        return pattern

    @functools.cached_property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return self.stage_parameters(0, self.layers) + self.expert_parameters(0, self.layers, self.experts)

    def stage_parameters(self, first: int, last: int) -> int:
        """Parameters of a stage without its experts."""
        return sum(p.numel for p in self.parameters(first, last, range(0)))

    def expert_parameters(self, first: int, last: int, count: int) -> int:
        """Parameters of `count` experts in every expert layer of a stage."""
        one = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape, _ in self._mlp("", self.expert_ffn))
        return one * count * len(self.expert_layers & set(range(first, last)))

    @functools.cached_property
    def hidden_parameters(self) -> int:
        """Parameters without embeddings and output layer: the N of the study's laws."""
        outer = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.learned_positions * self.hidden
        return self.total_parameters - outer

    @functools.cached_property
    def active_parameters(self) -> int:
        """Parameters that a token meets, embeddings included."""
        return self.total_parameters - self.expert_parameters(0, self.layers, self.experts - self.topk)

    # FLOPs of one token's forward pass; a multiplication and an addition are two

    def attention_flops(self) -> float:
        """Scores and values of one layer, causal: half of the square."""
        keys, values = (self.qk_dim + self.rope_dim, self.v_dim) if self.mla else (self.head_dim, self.head_dim)
        return float(self.sequence * self.heads * (keys + values))

    def layer_flops(self, layer: int) -> float:
        """Products with weights in one layer."""
        weights = sum(p.numel for p in self._layer(layer, range(self.topk)) if len(p.shape) == 2)
        return 2.0 * weights

    def output_flops(self) -> float:
        """The output layer."""
        return 2.0 * self.vocabulary * self.hidden

    @functools.cached_property
    def step_flops_per_token(self) -> float:
        """Forward and backward of one token: three times the forward's products."""
        layers = sum(self.layer_flops(layer) + self.attention_flops() for layer in range(self.layers))
        return 3.0 * (layers + self.output_flops())


def _pattern(parameter: Parameter) -> str:
    """The name with layer and expert 0: all layers of a kind have the same shapes."""
    name = parameter.name
    if parameter.layer >= 0 and name.startswith(f"decoder.layers.{parameter.layer}."):
        name = "decoder.layers.0." + name.split(".", 3)[3]
    if parameter.expert is not None:
        name = name.replace(f".experts.{parameter.expert}.", ".experts.0.")
    return name


@functools.lru_cache(maxsize=512)
def _infos(parameter: Parameter, geometry: Geometry) -> list[MatrixInfo]:
    infos, _, _, _ = split_param(parameter.name, parameter.shape, geometry, tp_rank=0, tp_size=1, partition_dim=None)
    return infos


def _expert_layers(flags: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Megatron's --moe-layer-freq: every n-th layer, or a list such as ([0]*1+[1]*26)."""
    every = flags.get("moe-layer-freq") or 1
    if isinstance(every, int):
        chosen = frozenset(range(0, layers, every))
    else:
        chosen = frozenset(index for index, one in enumerate(_pattern_list(str(every), layers)) if one)
    return chosen - frozenset(range(flags.get("moe-first-dense-layers") or 0))


def _pattern_list(text: str, layers: int) -> list[int]:
    """[0]*3+[1]*58 without eval."""
    found: list[int] = []
    for term in text.strip("()").replace(" ", "").split("+"):
        inside, _, times = term.strip("()").partition("*")
        try:
            found += [int(item) for item in inside.strip("[]").split(",")] * int(times or 1)
        except ValueError:
            raise UserError(f"--moe-layer-freq {text!r} is not a number nor like [0]*1+[1]*26.") from None
    if len(found) != layers:
        raise UserError(f"--moe-layer-freq {text!r} names {len(found)} layers, the model has {layers}.")
    return found
