"""What a run is judged by: losses and gradient norms at full precision, weights and state by logical name."""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.state import whole_regions

Block = tuple[str, int, int, int, int, Tensor]  # matrix, rows [r0, r1), columns [c0, c1), values


class Record:
    """Listens to Megatron's train_step and to the making of the optimizer."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.optimizer: Any = None
        self.after_step: list[Any] = []  # called with this record after every step
        self.once_made: list[Any] = []  # called with this record when the optimizer is made
        self.at_end: list[Any] = []  # called with this record after the run
        self.extra: dict[str, Any] = {}

    def watch(self, training: Any, job: Any) -> None:
        make, step = job.make_optimizer, training.train_step

        def making(*args: Any, **kwargs: Any) -> Any:
            self.optimizer = make(*args, **kwargs)
            for callback in self.once_made:
                callback(self)
            return self.optimizer

        def stepping(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            if found[0]:
                self.losses.append(float(found[0]["lm loss"].double()))
            self.grad_norms.append(float(found[5]))
            for callback in self.after_step:
                callback(self)
            return found

        job.make_optimizer, training.train_step = making, stepping

    def partial(self) -> dict[str, Any]:
        return {"losses": self.losses, "grad_norms": self.grad_norms, **self.extra}

    def finish(self) -> dict[str, Any]:
        for callback in self.at_end:
            callback(self)
        found = self.partial()
        if hasattr(self.optimizer, "shard_groups"):
            found |= {"weights": weights(self.optimizer), "state": states(self.optimizer)}
            found["sent"] = [dict(shard_group.exchange.traffic.sent) for shard_group in self.optimizer.shard_groups]
        return found


def weights(optimizer: Any) -> list[Block]:
    """This rank's rectangles of the fp32 weights."""
    return [
        (r.matrix, *r.region, r.run(param_shard.main).detach().clone().view(r.region.shape))
        for shard_group in optimizer.shard_groups
        for param_shard in shard_group.param_shards
        for r in param_shard.rects
    ]


def states(optimizer: Any) -> dict[str, list[Block]]:
    """This rank's blocks of every kind of state; tensors that do not have the matrix's shape are whole blocks."""
    found: dict[str, list[Block]] = {}
    for element in optimizer.element_steps:
        for pieces in element.slices.values():
            for piece in pieces:
                r = piece.rect
                for key, tensor in piece.state.items():
                    if tensor.numel() != r.numel:  # one number for each 2048 codes
                        _add(found, key, f"{r.matrix} {r.region.row0} {r.region.col0}", tensor.detach().clone())
                        continue
                    block = tensor.detach().clone().view(r.region.shape)
                    found.setdefault(key, []).append((r.matrix, *r.region, block))
    for step in optimizer.matrix_steps:
        for key, name, tensor, shape, rect, _ in whole_regions(step):
            if rect is None or shape is None:
                _add(found, key, name, tensor.detach().clone())
                continue
            block = tensor.detach().clone().reshape(rect.region.shape)
            found.setdefault(key, []).append((name, *rect.region, block))
    return found


def _add(found: dict[str, list[Block]], key: str, name: str, tensor: Tensor) -> None:
    flat = tensor.reshape(1, -1)
    found.setdefault(key, []).append((name, 0, 1, 0, flat.shape[1], flat))


def whole(blocks: list[Block]) -> dict[str, Tensor]:
    """Whole matrices from the blocks of all ranks; replicas must agree bit for bit, no element may be missing."""
    sides: dict[str, tuple[int, int]] = {}
    for name, _, r1, _, c1, _ in blocks:
        rows, cols = sides.get(name, (0, 0))
        sides[name] = max(rows, r1), max(cols, c1)
    values = {name: torch.zeros(side, dtype=torch.float64) for name, side in sides.items()}
    seen = {name: torch.zeros(side, dtype=torch.bool) for name, side in sides.items()}
    for name, r0, r1, c0, c1, block in blocks:
        target, known = values[name][r0:r1, c0:c1], seen[name][r0:r1, c0:c1]
        wide = block.double()
        if not torch.equal(torch.where(known, target, wide), wide):
            raise AssertionError(
                f"replicas of {name} differ by {(torch.where(known, target, wide) - wide).abs().max()}"
            )
        target.copy_(wide)
        known.fill_(True)
    missing = [name for name, mask in seen.items() if not mask.all()]
    if missing:
        raise AssertionError(f"elements of {missing[:3]} are on no rank")
    return values
