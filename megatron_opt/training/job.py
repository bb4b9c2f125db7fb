"""The job itself: our model hooks, optimizer and monitoring put into Megatron-LM's pretrain()."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_opt.checkpointing import saving
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.training import console, data_flags, events, faults, foresight, record, signals
from megatron_opt.training.optimizer_flags import MEGATRON_OWN, curvature_kind, read_group_configs


def train(args: Any, look_at_model: Callable[[list[Any]], Any] | None = None) -> None:
    """Run Megatron-LM's pretrain() on validated flags; `look_at_model` gets the initialized model's chunks first.

    However it ends, the event log says so.
    """
    try:
        _train(args, look_at_model)
    except UserError as error:
        events.record("refused", reason=str(error))
        raise
    except Exception as error:
        events.record("error", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


def _train(args: Any, look_at_model: Callable[[list[Any]], Any] | None) -> None:
    import megatron.training.training as training
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_opt import patches, platform
    from megatron_opt.checkpointing import resuming
    from megatron_opt.distributed.meta_model import model_config
    from megatron_opt.training import batches, curvature, z_loss
    from megatron_opt.training.flags import checks
    from megatron_opt.training.monitoring import Diverged, Monitor

    checks.trainable(args)
    monitor = Monitor(args)
    if platform.on_cpu():
        patches.wrap(
            "megatron.training.training.initialize_megatron",
            "training/job.py",
            lambda initialize: functools.partial(initialize, allow_no_cuda=True),
        )
    own = args.optimizer in MEGATRON_OWN
    resuming.install(ours=not own)
    patches.wrap(
        "megatron.training.training.get_megatron_optimizer",
        "training/job.py",
        lambda make: functools.partial(_watched, monitor, make if own else make_optimizer),
    )
    monitor.install(training)
    data_flags.check(args)
    events.open_log(args.output_dir or args.save)
    signals.install(args)
    saving.install(args)
    faults.install(args)
    events.start(args)
    record.write(args)
    foresight.tell(args)
    if args.optimizer not in MEGATRON_OWN and (kind := curvature_kind(read_group_configs(args))):
        curvature.install(training, args, kind, monitor.clock)
    config = model_config(args)
    if not args.megatron_init:
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, functools.partial(_initialize, args)]
    if args.z_loss_coeff:
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, functools.partial(z_loss.install, args.z_loss_coeff)]
    if look_at_model is not None:
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, lambda chunks: look_at_model(chunks) or chunks]
    container = pretrain_cfg_container_from_args(args, config)
    try:
        training.pretrain(container, batches.build_datasets, ModelType.encoder_or_decoder, batches.forward_step)
    except Diverged:
        monitor.finish("diverged", "the loss is not finite")
    except SystemExit as leaving:  # Megatron's way to end early, on every rank
        if not leaving.code:
            monitor.finish("interrupted", **_why_early(args, monitor.iteration))
        raise
    else:
        monitor.finish("completed")


def _why_early(args: Any, iteration: int) -> dict[str, str | None]:
    """What has ended Megatron's loop before the last step: a signal, or a flag."""
    if name := signals.received():
        return {"reason": None, "signal": name}
    if not iteration and not args.exit_on_missing_checkpoint:
        raise UserError(
            "Megatron ended the run before its first step; the last lines of OUTPUT/logs/rank-0.txt say why."
        )
    if not iteration:
        return {"reason": "--exit-on-missing-checkpoint"}
    if args.exit_interval and iteration % args.exit_interval == 0:
        return {"reason": f"--exit-interval {args.exit_interval}"}
    if iteration in (args.phase_transition_iterations or ()):
        return {"reason": f"--phase-transition-iterations {iteration}"}
    return {"reason": f"--exit-duration-in-mins {args.exit_duration_in_mins}"}


def _initialize(args: Any, chunks: list[Any]) -> list[Any]:
    from megatron_opt.training.initialization import initialize

    initialize(chunks, chunks[0].config, args.seed, args.init_style)
    return chunks


def _watched(monitor: Any, make: Any, config: Any, model_chunks: Sequence[Any], **kwargs: Any) -> Any:
    from megatron_opt.distributed.build import model_matrices

    optimizer = make(config, model_chunks, **kwargs)
    monitor.matrices = model_matrices(model_chunks)
    monitor.watch(optimizer, model_chunks)
    return optimizer


def make_optimizer(config: Any, model_chunks: Sequence[Any], **ignored: Any) -> Any:
    """In place of Megatron's `get_megatron_optimizer`: our optimizer by the run's flags."""
    from megatron.core.utils import get_model_config
    from megatron.training import get_args

    from megatron_opt import patches
    from megatron_opt.distributed import planning
    from megatron_opt.distributed.build import build_optimizer
    from megatron_opt.distributed.qk_clip import QkClip
    from megatron_opt.optimizers.groups import describe
    from megatron_opt.training.width import width_ratio

    args = get_args()
    optimizer = build_optimizer(
        config,
        model_chunks,
        read_group_configs(args),
        EngineOptions.of(vars(args)),
        width_ratio=width_ratio(get_model_config(model_chunks[0])),
    )
    for post in optimizer.post_steps:
        if isinstance(post, QkClip):
            patches.wrap("megatron.training.training.clip_qk", "training/job.py", post.in_place_of_megatrons)
    if args.rank == 0:
        console.say(describe(optimizer.groups, args.weight_decay))
    if args.print_optimizer_plan:
        for shard_group, step in zip(optimizer.shard_groups, optimizer.matrix_steps, strict=True):
            if shard_group.rank == 0:
                plan = planning.ShardGroupPlan(
                    shard_group.name, step.placed.plan, planning.sent_in_a_step(shard_group, step)
                )
                with console.showing():
                    planning.show([plan], args.output_dir)
    return optimizer
