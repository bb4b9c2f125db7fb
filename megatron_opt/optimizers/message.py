"""What ranks say to each other as named fields of fixed shapes, each in its own type."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNED = 8  # bytes at which each field of a message of bytes begins


@dataclass(frozen=True)
class Message:
    """Fields by name, (shape, dtype) each, in order: one column of elements, or of bytes where their types differ.

    Integers so travel as integers. A message of one type is one of that type, so that those of several ranks can be summed.
    """

    fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def dtype(self) -> torch.dtype:
        """Of the column."""
        dtypes = {dtype for _, dtype in self.fields.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.uint8

    def _lengths(self) -> list[int]:
        """Elements of the column by field, padding among them."""
        if self.dtype != torch.uint8:
            return [math.prod(shape) for shape, _ in self.fields.values()]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.fields.values()]
        return [-(-size // _ALIGNED) * _ALIGNED for size in sizes]

    def __len__(self) -> int:
        return sum(self._lengths())

    def pack(self, **values: Tensor) -> Tensor:
        """The message (n, 1) of these values; ValueError where names, shapes or types are others."""
        if set(values) != set(self.fields):
            raise ValueError(f"fields {sorted(values)} are given, {sorted(self.fields)} are wanted")
        columns = []
        for (name, (shape, dtype)), length in zip(self.fields.items(), self._lengths(), strict=True):
            value = values[name]
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(f"field {name} is {tuple(value.shape)} {value.dtype}, {shape} {dtype} is wanted")
            flat = value.contiguous().view(-1).view(self.dtype)
            columns.append(flat if len(flat) == length else torch.cat([flat, flat.new_zeros(length - len(flat))]))
        return torch.cat(columns).unsqueeze(1)

    def unpack(self, column: Tensor) -> dict[str, Tensor]:
        """The fields of a message (n, 1), views of it."""
        fields = {}
        parts = column.view(-1).split(self._lengths())
        for (name, (shape, dtype)), part in zip(self.fields.items(), parts, strict=True):
            fields[name] = part.view(dtype)[: math.prod(shape)].view(shape)
        return fields
