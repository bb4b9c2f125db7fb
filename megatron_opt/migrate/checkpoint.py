"""`megatron-opt migrate checkpoint`: from a checkpoint trained with one optimizer, a warm start for another.

It is a training job that takes no step: Megatron loads the model, the source's moments are read into this job's shards,
the target's state is made from them, and Megatron saves. So any layout reads any layout (also under torchrun), and the
iteration and the place in the data are kept; the learning-rate schedule starts anew over what is left of the run.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.migrate import warm_start
from megatron_opt.optimizers.base import MatrixOptimizer
from megatron_opt.training import entry, failing


class _Done(BaseException):
    """The checkpoint is written; nothing is to be trained."""


@dataclass
class Moments:
    """m, v and the fp32 weights of every parameter shard of one shard group, flat."""

    m: list[Tensor]
    v: list[Tensor]
    weights: list[Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert under torchrun or alone; exit code 0 done, 2 bad input."""
    try:
        convert(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return entry.print_user_error("megatron-opt migrate checkpoint", error)
    return 0


def convert(argv: Sequence[str]) -> None:
    """`argv` are the flags of the run to come: its model, layout and optimizer, --load and --save."""
    entry.set_single_process_env()
    failing.listen()
    from megatron_opt import platform
    from megatron_opt.platform import transformer_engine

    platform.activate(transformer_engine.wanted(argv))
    from megatron_opt.training import arguments, job

    args = arguments.parse([*argv, "--no-load-optim", "--no-load-rng", "--matrix-mode", "owner"])
    _check(args)
    # main copies are all that a run with weights in FP8 takes; here these are bf16, as nothing is computed with them
    args.fp8_param_gather = args.reuse_grad_buf_for_mxfp8_param_ag = False
    source = _source(args)
    import megatron.training.training as training

    original = training.setup_model_and_optimizer
    rate_left: float | None = None

    def setup(*positional: Any, **named: Any) -> Any:
        nonlocal rate_left
        model, optimizer, scheduler = original(*positional, **named)
        rate_left = _rate_left(source, scheduler)
        _warm(args, source, model, optimizer)
        scheduler.num_steps = 0
        # the run that loads this has its own --matrix-mode; the state is stored for all
        training.save_checkpoint(args.iteration, model, optimizer, scheduler, args.num_floating_point_operations_so_far)
        raise _Done

    training.setup_model_and_optimizer = setup
    try:
        job.train(args)
    except _Done:
        if args.rank == 0:
            _tell(args, rate_left)
        torch.distributed.barrier()
        entry.destroy_process_group()
    finally:
        training.setup_model_and_optimizer = original


def _check(args: Any) -> None:
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    if not args.load or not args.save:
        raise UserError("give the checkpoint to read by --load and the folder to write by --save.")
    if Path(args.load).resolve() == Path(args.save).resolve():
        raise UserError(f"--load and --save are both {args.load}; write the warm start to another folder.")
    if args.optimizer in MEGATRON_OWN:
        raise UserError(f"--optimizer {args.optimizer} is Megatron's own; write for adamw, which trains the same.")
    if args.optimizer_cpu_offload:
        raise UserError(
            "--optimizer-cpu-offload: a warm start is written without it; leave it out, and give it to the run."
        )
    if args.ckpt_format != "torch_dist":
        raise UserError(f"--ckpt-format {args.ckpt_format} cannot be read by another layout; save as torch_dist.")


@dataclass
class Source:
    """A checkpoint folder, what it says of itself, and the names of its tensors."""

    folder: Path
    common: dict[str, Any]
    keys: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether its optimizer state was written by this project."""
        state = self.common.get("optimizer")
        return isinstance(state, dict) and "contents" in state

    @property
    def in_fp8(self) -> bool:
        """Whether its weights are the numbers of FP8, which main copies are not."""
        return bool(getattr(self.common.get("args"), "fp8_param_gather", False))

    @property
    def tokens(self) -> float:
        """Tokens over which one of its gradients is the mean."""
        args = self.common.get("args")
        return float(getattr(args, "global_batch_size", None) or 1) * float(getattr(args, "seq_length", None) or 1)


def _source(args: Any) -> Source:
    from megatron.core import dist_checkpointing

    from megatron_opt.checkpointing import folders, resuming

    folder = resuming.newest(args)
    if folder is None or not (Path(args.load) / folders.TRACKER).is_file():
        raise UserError(
            f"{args.load} holds no checkpoint ({folders.TRACKER} is missing); give the folder of --save of a run."
        )
    resuming.check_files(folder)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    keys = dict(dist_checkpointing.load_tensors_metadata(str(folder)))
    source = Source(folder, common, keys)
    if not source.ours and not any("exp_avg." in key for key in keys):
        reason = (
            "its Adam state is in shards of the distributed optimizer that only the same layout can read: "
            "save once with --dist-ckpt-optim-fully-reshardable"
            if any("gbuf" in key or "bucket" in key for key in keys)
            else "it has no optimizer state"
        )
        raise UserError(f"no warm start from {folder}: {reason}.")
    return source


def _warm(args: Any, source: Source, model: list[Any], optimizer: Any) -> None:
    """Fill the new optimizer's state and main copies from the source's."""
    optimizer.ensure_states()
    for group, update_rule in zip(optimizer.groups, optimizer.group_optimizers, strict=True):
        warm_start.check(group.optimizer, update_rule)
    before = {id(f): f.view.param.detach().clone() for f in optimizer.param_shards()}
    read_moments = (
        _from_ours(args, source, model, optimizer) if source.ours else _from_megatron(source, model, optimizer)
    )
    for index, moments in enumerate(read_moments):
        _fill(optimizer, index, moments, source.tokens)
    step = int(source.common["optimizer"]["step"]) if source.ours else int(args.iteration)
    optimizer.step_number = max(step, 1)
    for param_shard in optimizer.param_shards():
        param_shard.publish()
        if not source.in_fp8 and not torch.equal(before[id(param_shard)], param_shard.view.param.detach()):
            raise UserError(
                f"{param_shard.view.name}: weights and main copies disagree in {source.folder}; "
                "resume the source once and save again."
            )


def _from_megatron(source: Source, model: list[Any], optimizer: Any) -> list[Moments]:
    """Megatron's own Adam, saved by parameter: read each of this rank's parameters, then cut its parameter shards out."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.utils import unwrap_model

    sharded: dict[int, Any] = {}
    for chunk in unwrap_model(model):
        tree = chunk.sharded_state_dict(metadata=source.common.get("content_metadata"))
        tensors, _ = extract_matching_values(tree, lambda item: isinstance(item, (ShardedTensor, ShardedTensorFactory)))
        sharded.update({item.data.data_ptr(): item for item in nested_values(tensors) if item.data is not None})
    wanted: dict[str, Any] = {}
    room: dict[tuple[str, int], Tensor] = {}
    views = {id(f.view.param): f.view for f in optimizer.param_shards()}
    for number, view in views.items():
        item = sharded.get(view.param.data_ptr())
        if item is None:
            raise UserError(f"{view.name} is not in the model's checkpoint layout; its state cannot be read.")
        for kind in ("exp_avg", "exp_avg_sq", *(("fp32_param",) if view.param.dtype != torch.float32 else ())):
            prefix = _prefix(source, item.key, kind)
            room[kind, number] = torch.empty_like(view.param, dtype=torch.float32)
            wanted[f"{kind}.{view.name}.{number}"] = make_sharded_optimizer_tensor(item, room[kind, number], prefix)
    # a rank reads the parameters of its own shards only, so no rank need read a given one
    loaded = dist_checkpointing.load(wanted, str(source.folder), validate_access_integrity=False)
    whole = {key: loaded[f"{key[0]}.{views[key[1]].name}.{key[1]}"] for key in room}
    return [
        Moments([_cut(whole["exp_avg", id(f.view.param)], f) for f in shard_group.param_shards],
                [_cut(whole["exp_avg_sq", id(f.view.param)], f) for f in shard_group.param_shards],
                [_cut(whole["fp32_param", id(f.view.param)], f) if f.view.param.dtype != torch.float32 else f.main
                 for f in shard_group.param_shards])
        for shard_group in optimizer.shard_groups
    ]  # fmt: skip


def _prefix(source: Source, key: str, kind: str) -> str:
    """What stands before a parameter's name in the keys of one kind of state, such as `optimizer.state.exp_avg`."""
    words = {"fp32_param": ("fp32_param", "param")}.get(kind, (kind,))
    for word in words:
        for name in source.keys:
            if name.endswith(f"{word}.{key}") and name.removesuffix(f".{key}").rsplit(".", 1)[-1] == word:
                return name.removesuffix(f".{key}")
    raise UserError(
        f"{source.folder} has no {kind} of {key}: it was written by another model or another optimizer than Adam."
    )


def _cut(tensor: Tensor, param_shard: Any) -> Tensor:
    return tensor.reshape(-1)[param_shard.start : param_shard.stop].float().contiguous()


def _from_ours(args: Any, source: Source, model: list[Any], optimizer: Any) -> list[Moments]:
    """Any optimizer of this project: its state into an optimizer of its own flags, and the moments from that."""
    from megatron.core import dist_checkpointing

    from megatron_opt.distributed.build import build_optimizer
    from megatron_opt.distributed.state import contents
    from megatron_opt.training.optimizer_flags import read_group_configs

    saved = source.common.get("args")
    if saved is None or not hasattr(saved, "given_flags"):
        raise UserError(
            f"{source.folder} does not say with which flags it was trained; no warm start from it is possible."
        )
    weights = [[f.main.clone() for f in shard_group.param_shards] for shard_group in optimizer.shard_groups]
    old = build_optimizer(
        optimizer.config,
        model,
        read_group_configs(saved),
        EngineOptions(matrix_mode="owner", split_heads=saved.split_heads, decay_mode=saved.decay_mode),
    )
    if contents(old) != source.common["optimizer"]["contents"]:
        raise UserError(
            f"{source.folder} was written by other parameter groups than its flags give; resume it once and save."
        )
    for group, update_rule in zip(old.groups, old.group_optimizers, strict=True):
        warm_start.check(group.optimizer, update_rule, source=True)
    state = old.sharded_state_dict(None, is_loading=True)
    tensors = dist_checkpointing.load({"tensors": state["tensors"]}, str(source.folder))["tensors"]
    old.load_state_dict({**state, "step": source.common["optimizer"]["step"], "tensors": tensors})
    moments = []
    for index, shard_group in enumerate(old.shard_groups):
        same = all(
            torch.equal(f.main, w) or f.view.param.dtype != torch.float32
            for f, w in zip(shard_group.param_shards, weights[index], strict=True)
        )
        if not same:
            raise UserError(f"{source.folder}: the model's weights changed while its state was read; report this.")
        m, v = ([torch.zeros_like(f.main) for f in shard_group.param_shards] for _ in range(2))
        _read(old, index, m, v, source.tokens)
        moments.append(Moments(m, v, [f.main.clone() for f in shard_group.param_shards]))
    return moments


def _read(old: Any, index: int, m: list[Tensor], v: list[Tensor], tokens: float) -> None:
    """Moments of one shard group, back at the parameter shards that hold the shards."""
    shard_group, matrices = old.shard_groups[index], old.matrix_steps[index]
    for group, runs in old.element_steps[index].slices.items():
        for run in runs:
            mean, square = warm_start.moments_of_elements(old.group_optimizers[group], _decoded(run.state), tokens)
            run.of(m).copy_(mean)
            run.of(v).copy_(square)
    means: dict[Any, Tensor] = {}
    squares: dict[Any, Tensor] = {}
    for key, state in matrices.states.items():
        info = matrices.infos[key[0]]
        mean, square = warm_start.moments_of_matrix(matrices.optimizers[key[0]], info, state, tokens)
        shape = matrices.mine[key].buffer_shape
        means[key], squares[key] = mean.reshape(shape).contiguous(), square.reshape(shape).contiguous()
    for flats, buffers, what in ((m, means, "first moments"), (v, squares, "second moments")):
        for names, route in zip(matrices.placed.buckets, matrices.placed.routes, strict=True):
            wanted = set(names)
            some = {key: buffer for key, buffer in buffers.items() if key[0] in wanted}
            shard_group.exchange.scatter(route, some, flats, what, torch.float32).finish()


def _decoded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit state as the values that it stands for."""
    from megatron_opt.distributed import packed_state

    decoded = {}
    for key, tensor in state.items():
        if codes := packed_state.find(state, key):
            decoded[key] = codes.decode().view_as(tensor)
        elif not packed_state.is_scale(state, key):
            decoded[key] = tensor
    return decoded


def _fill(optimizer: Any, index: int, moments: Moments, tokens: float) -> None:
    """State of one shard group from its moments, and its fp32 main copies."""
    shard_group, matrices = optimizer.shard_groups[index], optimizer.matrix_steps[index]
    for param_shard, weight in zip(shard_group.param_shards, moments.weights, strict=True):
        if param_shard.view.param.dtype != torch.float32:
            param_shard.main.copy_(weight)
    for group, runs in optimizer.element_steps[index].slices.items():
        for run in runs:
            values = _decoded(run.state)
            mean, square = run.of(moments.m), run.of(moments.v)
            warm_start.fill_elements(optimizer.group_optimizers[group], values, mean, square, tokens)
            _encode(run.state, values)
    m, v = (matrices.gather(flats) for flats in (moments.m, moments.v))
    for key, state in matrices.states.items():
        info = matrices.infos[key[0]]
        update_rule: MatrixOptimizer = matrices.optimizers[key[0]]
        mean, square = m[key].reshape(info.shape), v[key].reshape(info.shape)
        warm_start.fill_matrix(update_rule, info, state, mean, square, tokens)


def _encode(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    from megatron_opt.distributed import packed_state

    for key, value in values.items():
        if codes := packed_state.find(state, key):
            codes.encode(value.view(-1))


def _rate_left(source: Source, scheduler: Any) -> float | None:
    """The learning rate at the switch over its peak; None where the checkpoint does not say."""
    state, twin = source.common.get("opt_param_scheduler"), copy.copy(scheduler)
    if not isinstance(state, dict) or not state.get("max_lr") or state.get("lr_decay_style") == "WSD":
        return None
    for key in ("max_lr", "min_lr", "num_steps", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style"):
        setattr(twin, key, state[key])
    return float(twin.get_lr({})) / float(state["max_lr"])


def _tell(args: Any, rate_left: float | None) -> None:
    """How to go on from the warm start."""
    left = max(0, (args.train_iters or 0) - args.iteration)
    share = "" if rate_left is None else f" of {warm_start.RATE_SHARE * rate_left:.2f} times its tuned rate"
    schedule = f"--lr-warmup-iters {warm_start.rewarm_steps(left)}" + (f" --lr-decay-iters {left}" if left else "")
    print(
        f"{args.save}: iteration {args.iteration} for --optimizer {args.optimizer}; go on with --load {args.save} "
        f"--override-opt_param-scheduler {schedule} and a new --lr{share}: the schedule counts from here.",
        flush=True,
    )


if __name__ == "__main__":
    entry.run(main)
