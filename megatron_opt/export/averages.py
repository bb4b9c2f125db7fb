"""The moving average of weights in a checkpoint (--ema-decay), as whole parameters: put together from logical matrices."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.weight_average import KEY
from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import split_param

_PREFIX = f"optimizer.state.{KEY}."
CHOICES, BOTH = ("raw", KEY), "both"


def add_argument(parser: Any, both: bool = False) -> None:
    """`--weights` of the commands that read a checkpoint's model; `both`: they may be told to read one after the other."""
    parser.add_argument(
        "--weights",
        choices=(*CHOICES, BOTH) if both else CHOICES,
        default="raw",
        help="the weights, or their moving average (a run with --ema-decay)"
        + ("; both: beside each other" if both else ""),
    )


class Averages:
    """Parameters by canonical name."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        """Raises UserError where the checkpoint has no average."""
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata
        averages: dict[str, Any] = {
            key: torch.empty(item.size, dtype=item.properties.dtype)
            for key, item in stored.items()
            if isinstance(item, TensorStorageMetadata) and key.startswith(_PREFIX)
        }
        if not averages:
            raise UserError(f"--weights {KEY}: the checkpoint {folder} is of a run without --ema-decay; leave it out.")
        load(averages, storage_reader=reader, no_dist=True)
        self.geometry = geometry
        self._matrices = {key.removeprefix(_PREFIX): value for key, value in averages.items()}

    def __call__(self, name: str, weights: Tensor, rank: int = 0, ranks: int = 1, side: int | None = None) -> Tensor:
        """In the shape and type of the weights, of which a rank has its shard; these themselves where they were not trained."""
        shape = tuple(weights.shape)
        _, mappings, _, columns = split_param(
            name, shape, self.geometry, tp_rank=rank, tp_size=ranks, partition_dim=side
        )
        if mappings[0].matrix not in self._matrices:
            return weights
        rows = [
            self._matrices[one.matrix][one.row : one.row + one.rows, one.col : one.col + columns]
            for one in sorted(mappings, key=lambda one: one.local_row)
        ]
        return torch.cat(rows).view(shape).to(weights.dtype)
