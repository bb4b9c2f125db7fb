"""The one table from our names to Hugging Face's, and the tensors carried over by it, by value, in both directions.

Our side of a row names logical matrices as `layout/` declares them (`….linear_qkv.weight.q`, `….linear_fc1.weight.gate`),
so that fused and interleaved tensors are taken apart and put together by the model's one description.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import find_kind, splits_of
from megatron_opt.layout.parameter import Parameter
from megatron_opt.layout.spec import ModelSpec

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Row:
    """A tensor of Hugging Face's and our logical matrices, one above the other, that it holds; `transposed` as in Conv1D.

    `{layer}` and `{expert}` stand for numbers.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def _rows(theirs: str, ours: str, *pairs: tuple[str, str], ends: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    return [Row(f"{theirs}{t}.{end}", (f"{ours}{o.format(end=end)}",)) for t, o in pairs for end in ends]


_LAYER, _OURS = "model.layers.{layer}.", "decoder.layers.{layer}."
_ATTENTION = [
    *_rows(
        _LAYER + "self_attn.", _OURS + "self_attention.",
        ("q_proj", "linear_qkv.{end}.q"), ("k_proj", "linear_qkv.{end}.k"), ("v_proj", "linear_qkv.{end}.v"),
        ("o_proj", "linear_proj.{end}"),
    ),
    *_rows(
        _LAYER, _OURS, ("input_layernorm", "input_layernorm.{end}"),
        ("post_attention_layernorm", "pre_mlp_layernorm.{end}"), ends=("weight",),
    ),
    Row("model.embed_tokens.weight", ("embedding.word_embeddings.weight",)),
    Row("model.norm.weight", ("decoder.final_layernorm.weight",)),
    Row("lm_head.weight", ("output_layer.weight",)),
]  # fmt: skip
LLAMA = [
    *_ATTENTION,
    *_rows(
        _LAYER + "mlp.", _OURS + "mlp.",
        ("gate_proj", "linear_fc1.{end}.gate"), ("up_proj", "linear_fc1.{end}.up"), ("down_proj", "linear_fc2.{end}"),
    ),
]  # fmt: skip
MIXTRAL = [
    *_ATTENTION,
    Row(_LAYER + "block_sparse_moe.gate.weight", (_OURS + "mlp.router.weight",)),
    *_rows(
        _LAYER + "block_sparse_moe.experts.{expert}.", _OURS + "mlp.experts.{expert}.",
        ("w1", "linear_fc1.{end}.gate"), ("w3", "linear_fc1.{end}.up"), ("w2", "linear_fc2.{end}"), ends=("weight",),
    ),
]  # fmt: skip
_BLOCK = "transformer.h.{layer}."


def _conv1d(theirs: str, *ours: str) -> list[Row]:
    return [
        Row(f"{_BLOCK}{theirs}.{end}", tuple(_OURS + name.format(end=end) for name in ours), end == "weight")
        for end in ("weight", "bias")
    ]


GPT2 = [
    Row("transformer.wte.weight", ("embedding.word_embeddings.weight",)),
    Row("transformer.wpe.weight", ("embedding.position_embeddings.weight",)),
    *_conv1d("attn.c_attn", *(f"self_attention.linear_qkv.{{end}}.{part}" for part in "qkv")),
    *_conv1d("attn.c_proj", "self_attention.linear_proj.{end}"),
    *_conv1d("mlp.c_fc", "mlp.linear_fc1.{end}"),
    *_conv1d("mlp.c_proj", "mlp.linear_fc2.{end}"),
    *_rows(_BLOCK, _OURS, ("ln_1", "input_layernorm.{end}"), ("ln_2", "pre_mlp_layernorm.{end}")),
    *_rows("transformer.", "decoder.", ("ln_f", "final_layernorm.{end}")),
    Row("lm_head.weight", ("output_layer.weight",)),
]


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the whole model."""
    return spec.parameters(0, spec.layers)


def logical(parameter: Parameter, spec: ModelSpec) -> dict[str, list[tuple[int, int, int]]]:
    """Logical matrices of a whole parameter: name → (start, stop, row), rows of the parameter from `row` of the matrix on."""
    kind = find_kind(parameter.name)
    if kind is None:
        raise LookupError(parameter.name)
    rows_of: dict[str, list[tuple[int, int, int]]] = {}
    for part in splits_of(kind, parameter.name, spec.geometry, parameter.shape[0]):
        name = f"{parameter.name}.{part.suffix}" if part.suffix else parameter.name
        rows_of.setdefault(name, []).append((part.start, part.stop, part.row))
    return {name: sorted(spans, key=lambda span: span[2]) for name, spans in rows_of.items()}


def expanded(rows: list[Row], spec: ModelSpec) -> Iterator[Row]:
    """The rows of this model: layer and expert numbers put in, rows of which it has no part left out.

    Raises UserError where a matrix of the model has no row.
    """
    known = {name for parameter in parameters(spec) for name in logical(parameter, spec)}
    left = set(known)
    for row in rows:
        layers = range(spec.layers) if "{layer}" in row.theirs else range(1)
        experts = range(spec.experts) if "{expert}" in row.theirs else range(1)
        for layer in layers:
            for expert in experts:
                ours = tuple(name.format(layer=layer, expert=expert) for name in row.ours)
                if known.issuperset(ours):
                    left.difference_update(ours)
                    yield Row(row.theirs.format(layer=layer, expert=expert), ours, row.transposed)
    if left:
        raise UserError(f"{len(left)} matrices have no name there ({', '.join(sorted(left)[:3])}).")


def to_theirs(
    rows: list[Row], spec: ModelSpec, weights: Callable[[str], Tensor], vocabulary: int
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors one by one; `weights` gives a whole parameter, of whose vocabulary the first ids are kept."""
    layers_of = {
        name: (parameter, spans) for parameter in parameters(spec) for name, spans in logical(parameter, spec).items()
    }
    for row in expanded(rows, spec):
        pieces = []
        for name in row.ours:
            parameter, spans = layers_of[name]
            whole = weights(parameter.name)
            pieces += [whole[start:stop] for start, stop, _ in spans]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if row.ours[0] in VOCABULARY:
            tensor = tensor[:vocabulary]
        yield row.theirs, (tensor.t() if row.transposed else tensor).clone(memory_format=torch.contiguous_format)


def to_ours(
    rows: list[Row], spec: ModelSpec, theirs: Callable[[str], Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Our whole parameters one by one. Ids that pad the vocabulary get the mean row: each is a token of mean logit.

    Raises UserError for a shape that the configuration does not give.
    """
    sources = {name: (row, at) for row in expanded(rows, spec) for at, name in enumerate(row.ours)}
    every = {name: spans for parameter in parameters(spec) for name, spans in logical(parameter, spec).items()}
    heights = {name: sum(stop - start for start, stop, _ in spans) for name, spans in every.items()}
    for parameter in parameters(spec):
        whole = torch.empty(parameter.shape, dtype=dtype)
        for name, spans in logical(parameter, spec).items():
            row, at = sources[name]
            tensor = theirs(row.theirs)
            tensor = tensor.t() if row.transposed and tensor.ndim == 2 else tensor
            height = sum(heights[one] for one in row.ours)
            if parameter.name in VOCABULARY and tensor.ndim == 2 and 0 < len(tensor) < height:
                mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(height - len(tensor), -1)])
            wanted = (height, *parameter.shape[1:])
            if tuple(tensor.shape) != wanted:
                raise UserError(
                    f"{row.theirs} has the shape {tuple(tensor.shape)}, its config.json gives {wanted}; "
                    "the two are of different models."
                )
            offset = sum(heights[one] for one in row.ours[:at])
            for start, stop, begin in spans:
                whole[start:stop].copy_(tensor[offset + begin : offset + begin + stop - start])
        yield parameter.name, whole
