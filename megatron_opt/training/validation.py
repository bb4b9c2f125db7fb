"""One fixed validation set: every evaluation of every run reads the same samples, from the first on.

Megatron shuffles the validation set by the run's seed and lets each evaluation take the next slice, so that a final loss
depends on seed, evaluation interval and restarts. Here the order comes from a constant seed, and an evaluation is always its
first N samples: `--eval-samples N`, else `--eval-iters` × the evaluation's batch, at most the whole; `--full-validation` is
the whole. The last batch is filled up with samples whose loss is masked, so that N need not be a multiple of the batch.
"""

import dataclasses
import hashlib
from typing import Any

import torch

from megatron_opt.errors import UserError
from megatron_opt.training import console

_SEED = 1234
_HASHED = 4096  # samples that the digest covers at most


def add_arguments(group: Any) -> None:
    """The flag that says how much is evaluated whatever the batch size."""
    group.add_argument(
        "--eval-samples",
        type=int,
        metavar="N",
        help="sequences of the validation set that each evaluation reads: always the same ones, whatever the batch size "
        "(default: --eval-iters times the batch; --full-validation: all)",
    )


class Fixed:
    """The first `count` samples of a dataset, again and again, each round filled up to `length` with masked ones."""

    def __init__(self, dataset: Any, count: int, length: int, rounds: int) -> None:
        self.dataset, self.count, self.length, self.rounds = dataset, count, length, rounds

    def __len__(self) -> int:
        return self.length * self.rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = index % self.length
        if position < self.count:
            return self.dataset[position]
        sample = dict(self.dataset[0])
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def build(make: Any, config: Any, sizes: list[int | None], args: Any) -> list[Any]:
    """Train, validation and test sets: the first as Megatron builds it, the others fixed.

    `make(config, sizes)` is Megatron's builder; `args.eval_iters` becomes the number of batches of an evaluation.
    """
    batch = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
    wanted = _wanted(args, batch)
    apart = config.blend_per_split
    train_config = config if apart is None else dataclasses.replace(config, blend_per_split=[apart[0], None, None])
    eval_config = dataclasses.replace(config, random_seed=_SEED)
    if apart is not None:
        eval_config = dataclasses.replace(eval_config, blend_per_split=[None, *map(_alone, apart[1:])])
    elif not config.mock:
        train_config = dataclasses.replace(config)
        eval_config.blend = _alone(config.blend)
        train_config.split_matrix = [config.split_matrix[0], None, None]
        eval_config.split_matrix = [None, *config.split_matrix[1:]]
    train = make(train_config, [sizes[0], 0, 0])[0] if sizes[0] != 0 else None
    if wanted == 0:
        return [train, None, None]
    weighted = [_weighted(config, index) for index in (1, 2)]
    if wanted is None and any(weighted):
        raise UserError("--full-validation reads each validation set once, so weights mean nothing: leave them out.")
    amounts = [wanted if config.mock or heavy else None for heavy in weighted]
    _, valid, test = make(eval_config, [0, *amounts])
    told = _identify(valid, test, wanted, batch, args)
    args.validation_identity = told["valid"]
    _say(told["valid"], batch, args, "others" if weighted[0] else "more or fewer of them")
    args.eval_iters = -(-told["valid"]["samples"] // batch)
    args.consumed_valid_samples = 0  # each evaluation starts at the start, after a restart too
    length, rounds = args.eval_iters * batch, 1
    each = 2 if getattr(args, "ema_decay", 0.0) else 1  # of the weights, then of their average
    if args.dataloader_type == "single":
        interval = args.eval_interval or args.train_iters or 1
        rounds = (args.train_iters or 1) // interval + 2
    fixed = [train]
    for name, dataset, times in (("valid", valid, rounds * each), ("test", test, each)):
        count = told[name]["samples"] if told[name] else 0
        fixed.append(Fixed(dataset, min(count, length), length, times) if dataset is not None and count else None)
    return fixed


def _say(valid: dict[str, Any], batch: int, args: Any, unlike: str) -> None:
    """Which sample an evaluation reads, where its size was left to the batch."""
    if args.rank or valid["whole"] or getattr(args, "eval_samples", None) is not None:
        return
    console.note(
        f"every evaluation reads the first {valid['samples']} of {valid['of_samples']} validation samples, --eval-iters "
        f"{args.eval_iters} times the batch of {batch}: runs with another batch read {unlike}, unless they "
        f"share --eval-samples {valid['samples']}."
    )


def _wanted(args: Any, batch: int) -> int | None:
    """Samples of an evaluation; None for all."""
    if getattr(args, "whole_validation", False) or args.full_validation:
        return None
    given = getattr(args, "eval_samples", None)
    return given if given is not None else (args.eval_iters or 0) * batch


def _alone(blend: Any) -> Any:
    """One dataset's weight means nothing, and Megatron takes it for a blend."""
    return (blend[0], None) if blend and len(blend[0]) == 1 else blend


def _weighted(config: Any, index: int) -> bool:
    blend = config.blend if config.blend_per_split is None else config.blend_per_split[index]
    return bool(blend) and blend[1] is not None and len(blend[0]) > 1


def _identify(valid: Any, test: Any, wanted: int | None, batch: int, args: Any) -> dict[str, Any]:
    """Of rank 0, told to all: what each set is."""
    box: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        box[0] = {"valid": identity(valid, wanted, args.seq_length)}
        iters = -(-box[0]["valid"]["samples"] // batch) if box[0]["valid"] else 0
        box[0]["test"] = identity(test, iters * batch, args.seq_length)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    if not box[0]["valid"]:
        raise UserError(
            "there is no validation data to evaluate on: give --valid-data-path (or a share of --split to it), or train "
            "without evaluation by --eval-iters 0."
        )
    return dict(box[0])


def identity(dataset: Any, wanted: int | None, sequence: int) -> dict[str, Any] | None:
    """How many samples and tokens an evaluation reads, of how many, and the digest of their tokens."""
    if dataset is None or len(dataset) == 0:
        return None
    count = len(dataset) if wanted is None else min(wanted, len(dataset))
    digest = hashlib.sha256(f"{count} {sequence}".encode())
    for index in range(min(count, _HASHED)):
        digest.update(dataset[index]["labels"].numpy().astype("int64").tobytes())
    return {
        "samples": count,
        "tokens": count * sequence,
        "of_samples": len(dataset),
        "whole": count == len(dataset),
        "digest": digest.hexdigest()[:16],
    }
