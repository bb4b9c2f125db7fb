"""Averages of weights in a checkpoint as whole parameters, put together from logical matrices: --ema-decay's, schedule-free's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.weight_average import KEY
from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import split_param
from megatron_opt.optimizers.schedule_free import ScheduleFree

_STATE = "optimizer.state."
_LEAD, _MAIN = ScheduleFree.lead_key, "fp32_param"
CHOICES, BOTH = ("raw", KEY), "both"


def add_argument(parser: Any, both: bool = False) -> None:
    """`--weights` of the commands that read a checkpoint's model; `both`: they may be told to read one after the other."""
    parser.add_argument(
        "--weights",
        choices=(*CHOICES, BOTH) if both else CHOICES,
        help="raw: the weights that gradients are taken at; ema: their moving average (a run with --ema-decay)"
        + ("; both: beside each other" if both else "")
        + "; by default what the run evaluates: schedule-free's average, else the weights",
    )


class Averages:
    """Parameters by canonical name."""

    def __init__(self, folder: Path, geometry: Geometry, stored: dict[str, Any], key: str = KEY) -> None:
        """`stored`: the checkpoint's tensors; `key`: of the average, or of what the weights lead it by.

        Raises UserError where the checkpoint has no average.
        """
        from torch.distributed.checkpoint import FileSystemReader, load

        wanted = (key, _MAIN) if key == _LEAD else (key,)
        averages: dict[str, Any] = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in stored.items()
            if name.startswith(tuple(f"{_STATE}{each}." for each in wanted))
        }
        if not averages:
            raise UserError(f"--weights {KEY}: the checkpoint {folder} is of a run without --ema-decay; leave it out.")
        load(averages, storage_reader=FileSystemReader(folder), no_dist=True)
        self.geometry, self.leads = geometry, key == _LEAD
        self._matrices, self._mains = (
            {
                name.removeprefix(f"{_STATE}{each}."): x
                for name, x in averages.items()
                if name.startswith(f"{_STATE}{each}.")
            }
            for each in (key, _MAIN)
        )

    def __call__(self, name: str, weights: Tensor, rank: int = 0, ranks: int = 1, side: int | None = None) -> Tensor:
        """In the shape and type of the weights, of which a rank has its shard; these themselves where they were not trained."""
        shape = tuple(weights.shape)
        _, mappings, _, columns = split_param(
            name, shape, self.geometry, tp_rank=rank, tp_size=ranks, partition_dim=side
        )
        mappings = sorted(mappings, key=lambda one: one.local_row)

        def whole(matrices: dict[str, Tensor]) -> Tensor:
            rows = [matrices[one.matrix][one.row : one.row + one.rows, one.col : one.col + columns] for one in mappings]
            return torch.cat(rows).view(shape)

        if mappings[0].matrix not in self._matrices:
            return weights
        average = whole(self._matrices)
        if self.leads:
            average = (whole(self._mains) if mappings[0].matrix in self._mains else weights) - average
        return average.to(weights.dtype)


def _tensors(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: item for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def find(folder: Path, geometry: Any, weights: str | None) -> Averages | None:
    """What `--weights` names; None for the weights themselves. `geometry` is called where it is needed."""
    if weights not in (KEY, None):
        return None
    stored = _tensors(folder)
    if weights == KEY:
        return Averages(folder, geometry(), stored)
    if any(name.startswith(f"{_STATE}{_LEAD}.") for name in stored):
        return Averages(folder, geometry(), stored, str(_LEAD))
    return None
