"""Logical matrices of a torch model: kinds by name, rows by declaration; nothing is guessed from a shape."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import FusedSplit
from megatron_opt.layout.matrices import RegionMapping
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import KINDS

# Names that are in use: Hugging Face's, torchtitan's, nanoGPT's, timm's. Pattern (of the whole name) -> kind, role
NAMES = (
    (r"(?:.*\.)?(?:lm_head|embed_out|unembed(?:ding)?|output_layer|classifier|score)\.weight", "output", "output"),
    (r"(?:model\.|transformer\.)?(?:output|head)\.weight", "output", "output"),
    (r"(?:.*\.)?(?:wpe|pos_emb\w*|position_emb\w*|embed_positions|relative_attention_bias)(?:\.weight)?",
     "embedding", "position"),
    (r"(?:.*\.)?token_type_embeddings?\.weight", "embedding", "tokentype"),
    (r"(?:.*\.)?(?:wte|\w*emb|embed\w*|\w+_embed|\w*embeddings?)(?:\.weight)?", "embedding", "word"),
    (r"(?:.*\.)?router(?:\.gate)?\.weight", "router", "router"),
    (r"(?:.*\.)?(?:mlp|block_sparse_moe)\.gate\.weight", "router", "router"),
)  # fmt: skip
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

Split = str | Mapping[str, int | tuple[int, int]]


def canonical_names(named: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Names without what DDP, torch.compile and checkpoint wrappers put into them."""
    unwrapped = [(_WRAPPERS.sub("", name), param) for name, param in named]
    if unwrapped and all(name.startswith("module.") for name, _ in unwrapped):
        unwrapped = [(name.removeprefix("module."), param) for name, param in unwrapped]
    return unwrapped


@dataclass(frozen=True)
class Declared:
    """A parameter's logical matrices: its global (rows, columns), what its rows are, and whether the user said so."""

    name: str
    shape: tuple[int, ...]
    stacked: bool  # all leading sides count rows, else all trailing ones columns
    parts: list[FusedSplit]
    infos: list[MatrixInfo]
    guessed: bool = False  # more than two sides and no word how they make a matrix

    def matrix(self, part: FusedSplit) -> str:
        return f"{self.name}.{part.suffix}" if part.suffix else self.name

    def mappings(self, axes: Sequence[Tensor]) -> tuple[list[RegionMapping], int, int]:
        """Region mappings, rows and columns of a local tensor, of which `axes` has the global indices of each side, ascending."""
        rows, cols = _grid(self.shape, axes, self.stacked)
        if not len(rows) or not len(cols):
            return [], 0, 0
        col = int(cols[0])
        if int(cols[-1]) - col != len(cols) - 1:
            raise UserError(
                f"{self.name}: its shards are not rectangles of the matrix {list(self.infos[0].shape)}; shard another side, "
                "or declare its matrices otherwise (split)."
            )
        which = torch.searchsorted(torch.tensor([part.start for part in self.parts]), rows, right=True) - 1
        ends = ((rows[1:] != rows[:-1] + 1) | (which[1:] != which[:-1])).nonzero().view(-1) + 1
        edges = [0, *ends.tolist(), len(rows)]
        mappings = []
        for first, last in zip(edges, edges[1:]):
            part = self.parts[int(which[first])]
            row = part.row + int(rows[first]) - part.start
            mappings.append(RegionMapping(self.matrix(part), first, last - first, row, col))
        return mappings, len(rows), len(cols)


def _grid(shape: Sequence[int], axes: Sequence[Tensor], stacked: bool) -> tuple[Tensor, Tensor]:
    """Global numbers of the rows and columns of a local tensor."""
    if len(shape) < 2:
        return (axes[0] if axes else torch.zeros(1, dtype=torch.long)), torch.zeros(1, dtype=torch.long)
    cut = len(shape) - 1 if stacked else 1
    return _ravel(shape[:cut], axes[:cut]), _ravel(shape[cut:], axes[cut:])


def _ravel(shape: Sequence[int], axes: Sequence[Tensor]) -> Tensor:
    numbers = axes[0]
    for size, axis in zip(shape[1:], axes[1:], strict=True):
        numbers = (numbers[:, None] * size + axis[None, :]).reshape(-1)
    return numbers


class Declarer:
    """Turns names and shapes into declarations by the user's patterns, the model's modules and the table of names.

    `kinds`: pattern -> kind. `split`: pattern -> `{suffix: rows}` or `{suffix: (rows, heads)}`, in the order of the rows,
    `"stack"` (the leading sides number matrices) or `"flatten"` (the trailing ones make one side). Patterns are searched
    in names, the first that matches is taken, and one that matches nothing is refused.
    """

    def __init__(
        self, kinds: Mapping[str, str] | None, split: Mapping[str, Split] | None, embeddings: Iterable[Any] = ()
    ) -> None:
        self.kinds, self.split = _Patterns("kinds", kinds), _Patterns("split", split)
        self.embeddings = {id(param) for param in embeddings}
        for kind in (kinds or {}).values():
            if kind not in KINDS:
                raise UserError(f"kinds: there is no kind {kind!r}; there are {', '.join(KINDS)}.")

    def declare(self, name: str, param: Any) -> Declared:
        """A parameter's declaration; UserError for a split that does not fit it."""
        shape = tuple(param.shape)
        split = self.split.find(name)
        kind, role = self._kind(name, param, shape)
        leading = math.prod(shape[:-2])
        stacked = len(shape) > 2 and (split == "stack" or (split is None and leading == 1))
        rows = shape[0] if shape else 1
        cols = math.prod(shape[1:])
        if stacked:
            rows, cols = leading * shape[-2], shape[-1]
        parts = [FusedSplit("", 0, rows, 0)]
        if split == "stack" and leading > 1:
            height = shape[-2]
            parts = [FusedSplit(str(at), at * height, (at + 1) * height, 0) for at in range(leading)]
        elif isinstance(split, Mapping):
            parts = _in_order(name, split, rows)
        elif split not in (None, "stack", "flatten"):
            raise UserError(f"split: {name} has {split!r}; give a mapping of suffix to rows, 'stack' or 'flatten'.")
        infos = []
        for part in parts:
            height = part.stop - part.start
            full = f"{name}.{part.suffix}" if part.suffix else name
            of_part = role or (part.suffix if isinstance(split, Mapping) else "")
            infos.append(MatrixInfo(full, (height, cols) if len(shape) > 1 else (height,), kind, of_part, part.heads))
        return Declared(name, shape, stacked, parts, infos, len(shape) > 2 and not stacked and split is None)

    def _kind(self, name: str, param: Any, shape: tuple[int, ...]) -> tuple[str, str]:
        if (said := self.kinds.find(name)) is not None:
            return said, "word" if said == "embedding" else ""
        for pattern, kind, role in NAMES if len(shape) > 1 else ():
            if re.fullmatch(pattern, name):
                return kind, role
        if id(param) in self.embeddings:
            return "embedding", "word"
        if len(shape) > 1:
            return "hidden", ""
        return ("bias" if "bias" in name.rsplit(".", 1)[-1] else "norm"), ""

    def finish(self) -> None:
        """Refuse patterns that have matched no name."""
        self.kinds.check_used()
        self.split.check_used()


def _in_order(name: str, split: Mapping[str, int | tuple[int, int]], rows: int) -> list[FusedSplit]:
    parts, start = [], 0
    for suffix, value in split.items():
        height, heads = value if isinstance(value, tuple) else (value, 1)
        if not suffix or height < 1 or heads < 1 or height % heads:
            raise UserError(f"split: {name} has {suffix!r}: {value!r}; give a name and a positive number of rows.")
        parts.append(FusedSplit(suffix, start, start + height, 0, heads))
        start += height
    if start != rows:
        raise UserError(f"split: {name} has {rows} rows, and {dict(split)} makes {start}; let them sum to the rows.")
    return parts


class _Patterns:
    """The first of several patterns that is found in a name, and which have been used."""

    def __init__(self, what: str, table: Mapping[str, Any] | None) -> None:
        self.what, self.used = what, set[str]()
        try:
            self.table: list[tuple[str, Callable[[str], Any], Any]] = [
                (pattern, re.compile(pattern).search, value) for pattern, value in (table or {}).items()
            ]
        except re.error as error:
            raise UserError(f"{what}: {error.pattern!r} is not a regular expression: {error}; mend it.") from error

    def find(self, name: str) -> Any:
        for pattern, search, value in self.table:
            if search(name):
                self.used.add(pattern)
                return value
        return None

    def check_used(self) -> None:
        for pattern, _, _ in self.table:
            if pattern not in self.used:
                raise UserError(f"{self.what}: {pattern!r} takes no parameter; mend or remove it.")


def embeddings_of(model: nn.Module) -> list[Any]:
    """Weights of the model's embedding tables."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
