"""A checkpoint of ours, of any layout, as its flags and its whole parameters by canonical name.

torch_dist stores whole tensors under names without layers' numbers (one tensor for all layers, one for all experts);
Transformer Engine's names of fused norms are Megatron's names there. `layout/names.py` gives the canonical ones.
"""

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt import quiet
from megatron_opt.checkpointing import folders, resuming, trusted
from megatron_opt.errors import UserError
from megatron_opt.export import averages
from megatron_opt.layout.names import canonical_name


class Checkpoint:
    """Flags (`args`) and parameters of the checkpoint `folder`."""

    def __init__(self, source: Path, trust: bool = False, weights: str | None = None):
        """`source`: a run's --save folder (its newest) or one iter_N in it; `weights`: raw, ema for their average, or
        None for what the run evaluates.

        Raises UserError for a damaged or hostile one.
        """
        from megatron_opt import platform

        platform.activate()
        from megatron.core import dist_checkpointing

        self.folder = _folder(source)
        _check(self.folder, trust)
        resuming.check_files(self.folder)
        try:
            common = dist_checkpointing.load_common_state_dict(str(self.folder))
        except Exception as error:
            raise UserError(f"the checkpoint {self.folder} is damaged: {error}") from error
        args = common.get("args")
        if args is None or not hasattr(args, "num_layers"):
            raise UserError(f"the checkpoint {self.folder} records no flags, so that its model is not known.")
        self.args: Any = args
        self.iteration = int(common.get("iteration") or 0)
        self.averages = averages.find(self.folder, self._geometry, weights)
        self.content_metadata: dict[str, Any] | None = common.get("content_metadata")

    def _geometry(self) -> Any:
        from megatron_opt.export.families import spec_of

        return spec_of(self.args).geometry

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return _tensors(self.folder)

    def __call__(self, name: str) -> Tensor:
        """The whole parameter of a canonical name."""
        weights = self._weights(name)
        return weights if self.averages is None else self.averages(name, weights)

    def _weights(self, name: str) -> Tensor:
        expert = re.search(r"\.experts\.(\d+)\.", name)
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        stacked = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", plain)
        if name in self._tensors:
            return self._tensors[name]
        indices = [int(expert[1])] if expert else []
        if plain not in self._tensors:
            plain, indices = stacked, ([int(layer[1])] if layer else []) + indices
        if plain not in self._tensors:
            raise UserError(f"the checkpoint {self.folder} has no {name}; its flags describe another model.")
        return self._tensors[plain][tuple(indices)] if indices else self._tensors[plain]

    @property
    def dtype(self) -> torch.dtype:
        """Of its embedding."""
        return self("embedding.word_embeddings.weight").dtype


def _folder(source: Path) -> Path:
    if (source / ".metadata").is_file() or (source / "metadata.json").is_file():
        return source
    iterations = folders.iterations(source)
    if re.fullmatch(r"[0-9]+", text := folders.tracked(source) or ""):
        wanted = int(text)
        if wanted in iterations or not iterations:
            iterations = [wanted]
    if not iterations or not (source / folders.name_of(iterations[0])).is_dir():
        raise UserError(f"{source} holds no checkpoint; give a run's --save folder, or one iter_N in it.")
    return source / folders.name_of(iterations[0])


def _check(folder: Path, trust: bool) -> None:
    """Whole by its digests, and harmless to read."""
    if trust:
        return
    iteration = re.fullmatch(r"iter_(\d+)", folder.name)
    try:
        files = folders.manifest(folder.parent, int(iteration[1])) if iteration else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be checked: its {folders.MANIFEST} is unreadable ({error})."
        ) from None
    if files is not None and (trouble := folders.damage(folder, files)):
        raise UserError(f"the checkpoint {folder} is damaged: {trouble}; take an earlier one.")
    if refused := trusted.refusal(folder):
        raise UserError(f"the checkpoint {folder} is not read: {refused} (--trust-checkpoint reads it all the same).")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The model's tensors, by canonical names with neither layers' nor experts' numbers where they are stacked."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder)
    wanted: dict[str, Any] = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
        and key.startswith(("embedding.", "decoder.", "output_layer.", "mtp."))
    }
    try:
        with quiet.quieted():
            load(wanted, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise UserError(f"the checkpoint {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return {canonical_name(key).replace(".experts.experts.", ".experts."): value for key, value in wanted.items()}
