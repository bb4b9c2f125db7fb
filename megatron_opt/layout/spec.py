"""A model by its flags: every parameter's name, whole shape and cut side, and the counts that laws and costs read.

Plain Python, without torch and Megatron. A test holds it equal to Megatron's own models over a matrix of flags, in names,
shapes, cut sides and order; a structural flag that it does not know is refused (`flags.REFUSED`).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.layout.flags import expert_layers, hybrid_pattern, refuse_unknown
from megatron_opt.layout.kinds import Geometry, find_kind
from megatron_opt.layout.parameter import Parameter

DEFAULT_VOCABULARY = 32000


Shape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a language model; `expert_layers` are the layers with experts, `pattern` a hybrid model's layers."""

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
    output_gate: bool = False
    qk_norm: bool = False
    shared_gate: bool = False
    local: bool = False  # Megatron's local layers cut what Transformer Engine's replicate
    mtp: int = 0  # depths of multi-token prediction
    mtp_shared: bool = False  # one layer for all depths
    pattern: str = ""
    mtp_pattern: str = ""
    segments: tuple[int, ...] = ()  # layers of each pipeline piece, where a pattern says
    ssm_heads: int = 0
    ssm_head_dim: int = 0
    ssm_groups: int = 0
    ssm_state: int = 0

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "ModelSpec":
        """From Megatron's flags, hyphens in names; unset ones as Megatron sets them. Raises UserError for unknown ones."""
        refuse_unknown(flags)
        get = flags.get
        whole, pattern, mtp_pattern, depths = hybrid_pattern(str(get("hybrid-layer-pattern") or ""))
        if pattern and get("qk-layernorm"):
            raise UserError("--qk-layernorm does nothing in the layers of --hybrid-layer-pattern; leave it out.")
        layers = len(pattern) or int(get("num-layers") or 0)
        missing = [f"--{k}" for k in ("hidden-size", "num-attention-heads") if not get(k)]
        missing += [] if layers else ["--num-layers"]
        if missing:
            raise UserError(f"{', '.join(missing)} missing; give them, or a whole model by --preset.")
        hidden, heads = int(get("hidden-size") or 0), int(get("num-attention-heads") or 0)
        gated = bool(get("swiglu") or get("quick-geglu"))
        ffn = get("ffn-hidden-size") or (int(4 * hidden * 2 / 3 / 64) * 64 if get("swiglu") else 4 * hidden)
        grouped = get("group-query-attention") and get("num-query-groups")
        if not get("kv-channels") and hidden % heads:
            raise UserError(
                f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}; give --kv-channels."
            )
        experts = get("num-experts") or 0
        multiple = (get("make-vocab-size-divisible-by") or 128) * (get("tensor-model-parallel-size") or 1)
        vocabulary = get("padded-vocab-size") or -(-(get("vocab-size") or DEFAULT_VOCABULARY) // multiple) * multiple
        learned = get("position-embedding-type", "learned_absolute") == "learned_absolute"
        sequence = int(get("seq-length") or 0)
        mla = bool(get("multi-latent-attention"))
        ssm_head_dim = (get("mamba-head-dim") or 64) if pattern else 0
        if pattern:
            with_experts = frozenset(index for index, symbol in enumerate(pattern) if symbol == "E")
        else:
            with_experts = expert_layers(flags, layers) if experts else frozenset()
        return cls(
            layers=layers,
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            groups=grouped or heads,
            head_dim=get("kv-channels") or hidden // heads,
            vocabulary=vocabulary,
            sequence=sequence,
            gated=gated,
            tied=not get("untie-embeddings-and-output-weights"),
            bias=not get("disable-bias-linear"),
            qkv_bias=bool(get("add-qkv-bias")),
            norm_bias=get("normalization", "LayerNorm") != "RMSNorm",
            learned_positions=(get("max-position-embeddings") or sequence) if learned else 0,
            experts=experts,
            topk=(get("moe-router-topk") or 2) if experts else 0,
            expert_ffn=get("moe-ffn-hidden-size") or ffn,
            shared_ffn=get("moe-shared-expert-intermediate-size") or 0,
            expert_layers=with_experts,
            mla=mla,
            q_lora=(get("q-lora-rank") or 0) if mla else 0,
            kv_lora=(get("kv-lora-rank") or 32) if mla else 0,
            qk_dim=(get("qk-head-dim") or 128) if mla else 0,
            rope_dim=(get("qk-pos-emb-head-dim") or 64) if mla else 0,
            v_dim=(get("v-head-dim") or 128) if mla else 0,
            per_head=bool(get("split-heads")),
            output_gate=bool(get("attention-output-gate")),
            qk_norm=bool(get("qk-layernorm")),
            shared_gate=bool(get("moe-shared-expert-gate")),
            local=get("transformer-impl") == "local",
            mtp=depths if pattern else int(get("mtp-num-layers") or 0),
            mtp_shared=bool(get("mtp-use-repeated-layer")),
            pattern=pattern,
            mtp_pattern=mtp_pattern,
            segments=tuple(map(len, whole.split("|"))) if "|" in whole else (),
            ssm_heads=(get("mamba-num-heads") or 2 * hidden // ssm_head_dim) if ssm_head_dim else 0,
            ssm_head_dim=ssm_head_dim,
            ssm_groups=(get("mamba-num-groups") or 8) if ssm_head_dim else 0,
            ssm_state=(get("mamba-state-dim") or 128) if ssm_head_dim else 0,
        )

    @property
    def geometry(self) -> Geometry:
        """What splits fused parameters into logical matrices."""
        return Geometry(
            num_heads=self.heads,
            num_groups=self.groups,
            head_dim=self.head_dim,
            gated_mlp=self.gated,
            output_gate=self.output_gate,
            per_head=self.per_head,
            qk_head_dim=self.qk_dim,
            v_head_dim=self.v_dim,
            kv_lora_rank=self.kv_lora,
            q_lora_rank=self.q_lora,
            rope_dim=self.rope_dim,
            ssm_inner=self.ssm_heads * self.ssm_head_dim,
            ssm_state=self.ssm_groups * self.ssm_state,
            ssm_heads=self.ssm_heads,
        )

    # Parameters of one module, in the order in which Megatron registers them, which its gradient buffers follow

    def _norm(self, name: str, width: int) -> list[Shape]:
        return [(f"{name}.{part}", (width,)) for part in (("weight", "bias") if self.norm_bias else ("weight",))]

    def _linear(self, name: str, rows: int, columns: int, bias: bool) -> list[Shape]:
        return [(f"{name}.weight", (rows, columns)), *([(f"{name}.bias", (rows,))] if bias else [])]

    def _attention(self) -> list[Shape]:
        h, d, linear = self.hidden, self.head_dim, self._linear
        if not self.mla:
            rows = (self.heads * (2 if self.output_gate else 1) + 2 * self.groups) * d
            norms = [s for name in ("q", "k") for s in self._norm(f"{name}_layernorm", d)] if self.qk_norm else []
            return [
                *linear("linear_proj", h, self.heads * d, self.bias),
                *linear("linear_qkv", rows, h, self.bias or self.qkv_bias),
                *norms,
            ]
        query = self.heads * (self.qk_dim + self.rope_dim)
        q_norm, kv_norm = self._norm("q_layernorm", self.q_lora), self._norm("kv_layernorm", self.kv_lora)
        return [
            *linear("linear_proj", h, self.heads * self.v_dim, self.bias),
            *(
                [
                    *linear("linear_q_down_proj", self.q_lora, h, False),
                    *linear("linear_q_up_proj", query, self.q_lora, False),
                ]
                if self.q_lora
                else linear("linear_q_proj", query, h, False)
            ),
            *linear("linear_kv_down_proj", self.kv_lora + self.rope_dim, h, False),
            *linear("linear_kv_up_proj", self.heads * (self.qk_dim + self.v_dim), self.kv_lora, False),
            *(q_norm if self.q_lora and self.qk_norm else []),
            *(kv_norm if self.qk_norm else []),
        ]

    def _mlp(self, ffn: int, bias: bool) -> list[Shape]:
        up = (2 if self.gated else 1) * ffn
        return [
            *self._linear("linear_fc1", up, self.hidden, bias),
            *self._linear("linear_fc2", self.hidden, ffn, bias),
        ]

    def _mamba(self) -> list[Shape]:
        g = self.geometry
        conv = g.ssm_inner + 2 * g.ssm_state
        return [
            ("conv1d_weight", (conv, 1, 4)),
            ("conv1d_bias", (conv,)),
            ("dt_bias", (g.ssm_heads,)),
            ("A_log", (g.ssm_heads,)),
            ("D", (g.ssm_heads,)),
            *self._linear("in_proj", 2 * g.ssm_inner + 2 * g.ssm_state + g.ssm_heads, self.hidden, False),
            ("norm.weight", (g.ssm_inner,)),
            *self._linear("out_proj", self.hidden, g.ssm_inner, False),
        ]

    def _moe(self, experts: Sequence[int]) -> Iterator[tuple[Shape, int | None]]:
        yield ("router.weight", (self.experts, self.hidden)), None
        if self.bias:
            yield ("router.bias", (self.experts,)), None
        for expert in experts:
            for name, shape in self._mlp(self.expert_ffn, self.bias):
                yield (f"experts.{expert}.{name}", shape), expert
        if self.shared_ffn:
            if self.shared_gate:
                yield ("shared_experts.gate_weight", (1, self.hidden)), None
            for name, shape in self._mlp(self.shared_ffn, False):
                yield (f"shared_experts.{name}", shape), None

    def _layer_shapes(self, symbol: str, experts: Sequence[int]) -> Iterator[tuple[Shape, int | None]]:
        """Of a layer: `*` attention, `-` MLP, `E` experts, `M` Mamba, or two of them in one as in GPT."""
        shapes: list[Shape] = []
        if "M" in symbol:
            shapes += [(f"mixer.{name}", shape) for name, shape in self._mamba()] + self._norm("norm", self.hidden)
        if "*" in symbol:
            shapes += self._norm("input_layernorm", self.hidden)
            shapes += [(f"self_attention.{name}", shape) for name, shape in self._attention()]
        if "-" in symbol or "E" in symbol:
            shapes += self._norm("pre_mlp_layernorm", self.hidden)
        if "-" in symbol:
            shapes += [(f"mlp.{name}", shape) for name, shape in self._mlp(self.ffn, self.bias)]
        yield from ((shape, None) for shape in shapes)
        if "E" in symbol:
            yield from (((f"mlp.{name}", shape), expert) for (name, shape), expert in self._moe(experts))

    def symbol(self, layer: int) -> str:
        """What a decoder layer is made of."""
        if self.pattern:
            return self.pattern[layer]
        return "*E" if layer in self.expert_layers else "*-"

    def _declared(self, base: str, layer: int, entries: Any) -> Iterator[Parameter]:
        for (name, shape), expert in entries:
            full = f"{base}.{name}" if base else name
            kind = find_kind(full)
            if kind is None:
                raise LookupError(full)
            cut = None if kind.maybe_whole and not self.local else kind.cut
            yield Parameter(full, shape, cut, layer, expert)

    def layer(self, layer: int, experts: Sequence[int] | None = None) -> list[Parameter]:
        """Of one decoder layer, with all experts or those given."""
        which = range(self.experts) if experts is None else experts
        shapes = self._layer_shapes(self.symbol(layer), which)
        return list(self._declared(f"decoder.layers.{layer}", layer, shapes))

    def mtp_layers(self, experts: Sequence[int] | None = None) -> list[Parameter]:
        """Of the layers that predict tokens after the next."""
        which = range(self.experts) if experts is None else experts
        parameters: list[Parameter] = []
        for depth in range(min(self.mtp, 1) if self.mtp_shared else self.mtp):
            base = f"mtp.layers.{depth}"
            head = [
                *self._norm("enorm", self.hidden),
                *self._norm("hnorm", self.hidden),
                *self._linear("eh_proj", self.hidden, 2 * self.hidden, False),
            ]
            parameters += self._declared(base, self.layers, ((shape, None) for shape in head))
            if self.pattern:
                for index, symbol in enumerate(self.mtp_pattern):
                    inner = self._layer_shapes(symbol, which)
                    parameters += self._declared(f"{base}.mtp_model_layer.layers.{index}", self.layers, inner)
            else:
                inner = self._layer_shapes(self.symbol(self.layers - 1), which)
                parameters += self._declared(f"{base}.mtp_model_layer", self.layers, inner)
            norm = self._norm("final_layernorm", self.hidden)
            parameters += self._declared(base, self.layers, ((shape, None) for shape in norm))
        return parameters

    def _embedding(self, layer: int, copy: bool) -> list[Parameter]:
        h = self.hidden
        parameters = [Parameter("embedding.word_embeddings.weight", (self.vocabulary, h), 0, layer, copy=copy)]
        if self.learned_positions:
            name = "embedding.position_embeddings.weight"
            parameters.append(Parameter(name, (self.learned_positions, h), None, layer))
        return parameters

    def parameters(
        self, first: int, last: int, experts: Sequence[int] | None = None, copy: bool = False
    ) -> list[Parameter]:
        """Of layers [first, last) and of what lies before and after them; `copy`: with what the last stage repeats."""
        several = copy and not (first == 0 and last == self.layers)
        shared = several and (self.tied or self.mtp > 0)
        listed = self._embedding(-1, shared) if first == 0 else []
        ends = last == self.layers
        if ends and shared and self.mtp and first > 0:
            listed += self._embedding(self.layers, True)
        for layer in range(first, last):
            listed += self.layer(layer, experts)
        if ends:
            norm = "decoder.final_norm" if self.pattern else "decoder.final_layernorm"
            listed += self._declared("", self.layers, ((shape, None) for shape in self._norm(norm, self.hidden)))
            listed += self.mtp_layers(experts)
            if not self.tied or (
                shared and first > 0 and self.mtp
            ):  # with MTP Megatron allocates it, and uses the copy
                name = "output_layer.weight"
                listed.append(Parameter(name, (self.vocabulary, self.hidden), 0, self.layers))
            elif shared and first > 0:
                listed += self._embedding(self.layers, True)[:1]
        return listed

    def stages(self, pp: int, virtual: int = 1) -> list[list[list[Parameter]]]:
        """Parameters of every pipeline stage, chunk by chunk; layers are spread evenly unless a pattern says otherwise."""
        pieces = pp * virtual
        counts = self.segments or (self.layers // pieces,) * pieces
        if sum(counts) != self.layers or len(counts) != pieces:
            raise UserError(f"{self.layers} layers cannot be spread evenly over {pp} stages of {virtual} chunks.")
        edges = [sum(counts[:piece]) for piece in range(pieces + 1)]
        made = [self.parameters(edges[i], edges[i + 1], copy=pieces > 1) for i in range(pieces)]
        return [[made[chunk * pp + stage] for chunk in range(virtual)] for stage in range(pp)]

    # Counts

    @functools.cached_property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(p.numel for p in self.parameters(0, self.layers))

    def stage_parameters(self, first: int, last: int) -> int:
        """Parameters of a stage without its experts."""
        return sum(p.numel for p in self.parameters(first, last, range(0)))

    def expert_parameters(self, first: int, last: int, count: int) -> int:
        """Parameters of `count` experts in every expert layer of a stage."""
        one = sum(math.prod(shape) for _, shape in self._mlp(self.expert_ffn, self.bias))
        met = sum("E" in self.symbol(layer) for layer in range(first, last))
        if last == self.layers:
            met += sum(
                p.expert == 0 and p.name.endswith("fc2.weight") for p in self.mtp_layers(range(min(1, self.experts)))
            )
        return one * count * met

    @functools.cached_property
    def hidden_parameters(self) -> int:
        """N of the scaling laws: elements of the matrices between embedding and output layer, all experts counted.

        Norms, biases and vectors are left out, as in arXiv 2509.02046, so that N = layers·(3·h·ffn + 4·h²) for Llama.
        """
        return self._hidden(self.parameters(0, self.layers))

    @functools.cached_property
    def active_hidden_parameters(self) -> int:
        """The part of N that a token meets: `topk` experts of every expert layer."""
        return self._hidden(self.parameters(0, self.layers, range(self.topk)))

    @staticmethod
    def _hidden(parameters: Sequence[Parameter]) -> int:
        kinds = ((p, find_kind(p.name)) for p in parameters)
        return sum(p.numel for p, kind in kinds if kind is not None and kind.kind in ("hidden", "router"))

    @functools.cached_property
    def active_parameters(self) -> int:
        """Parameters that a token meets, embeddings included."""
        return self.total_parameters - self.expert_parameters(0, self.layers, self.experts - self.topk)
