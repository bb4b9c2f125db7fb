"""What a case may do inside its ranks before training: each takes (case, record, argv, folder)."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed import recording
from tests.distributed.cases import Case
from tests.distributed.fp8_hooks import held_bytes, quantizers, ranges, weights  # noqa: F401


def checkpoint(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """Options: `save` and `load` name checkpoints of this pool; `stop` ends a run of many steps early."""
    home = folder.parent / "checkpoints"
    argv = [*argv, "--ckpt-format", "torch_dist"]
    if "save" in case.options:
        argv += ["--save", str(home / case.options["save"])]
        argv += ["--save-interval", str(case.options.get("interval", case.steps))]
    if "load" in case.options:
        argv += ["--load", str(home / case.options["load"])]
        _record_loaded(record)
    if "stop" in case.options:
        argv += ["--exit-interval", str(case.options["stop"])]
    return argv


def one_rank_refuses(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """As `checkpoint`, and Megatron's check of what the ranks have, which rank 0 makes alone, finds a fault."""
    from megatron.core.dist_checkpointing import validation

    validation._validate_sharding_for_key = lambda shards: [f"{shards[0][1].key} is there twice"]
    return checkpoint(case, record, argv, folder)


def _record_loaded(record: recording.Record) -> None:
    """Weights and state as they are right after loading."""
    from megatron.training import training

    train = training.train

    def training_with(*args: Any, **kwargs: Any) -> Any:
        if hasattr(record.optimizer, "shard_groups"):
            record.extra["loaded_weights"] = recording.weights(record.optimizer)
            record.extra["loaded_state"] = recording.states(record.optimizer)
            record.extra["loaded_step"] = record.optimizer.step_number
        return train(*args, **kwargs)

    training.train = training_with


def nccl(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Check NCCL's rules on this rank, and record what it calls on each group."""
    from tests.distributed import nccl_rules

    rules = nccl_rules.install(nccl_rules.everything_is_a_gpus)
    record.at_end.append(lambda record: record.extra.update(calls=rules.finish()))


def plan(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """Record what the run's own plan, its file and its counters say of this rank."""
    output = folder / f"plan-{case.name}"

    def compare(record: recording.Record) -> None:
        from megatron_opt.distributed import planning

        files = {
            shard_group.name: shard_group.name.replace(" ", "_").replace(",", "")
            for shard_group in record.optimizer.shard_groups
        }
        record.extra["domains"] = [
            {
                "name": shard_group.name,
                "rank": shard_group.rank,
                "known": {
                    what: v[shard_group.rank % len(v)] for what, v in planning.sent_in_a_step(shard_group, step).items()
                },
                "sent": dict(shard_group.exchange.traffic.sent),
                "digest": step.placed.plan.digest(),
                "parts": [(p.matrix, p.rank, *p.bounds) for p in step.placed.plan.parts],
                "file": json.loads((output / f"optimizer_plan.{files[shard_group.name]}.json").read_text()),
            }
            for shard_group, step in zip(record.optimizer.shard_groups, record.optimizer.matrix_steps, strict=True)
        ]

    record.at_end.append(compare)
    return [*argv, "--print-optimizer-plan", "--output-dir", str(output)]


def poison(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Options: rank `rank` alone finds `value` in the gradient of `matrix` at step `step`."""
    options = case.options

    def prepare(record: recording.Record) -> None:
        import torch.distributed as dist

        optimizer, step = record.optimizer, record.optimizer.step

        def poisoned() -> Any:
            if optimizer.step_number + 1 == options["step"]:
                for param_shard in optimizer.param_shards():
                    for rect in param_shard.rects:
                        if rect.matrix == options["matrix"]:
                            grad = param_shard.view.param.main_grad.view(-1)[param_shard.start : param_shard.stop]
                            held = grad[rect.offset : rect.offset + rect.numel]
                            if options["value"] == "zero":
                                held.zero_()
                            elif dist.get_rank() == options["rank"]:
                                held[0] = float(options["value"])
            return step()

        optimizer.step = poisoned

    record.once_made.append(prepare)
    record.at_end.append(lambda record: record.extra.update(skipped=dict(record.optimizer.health.skipped)))


def freeze(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Options: parameters whose name contains `frozen` are not trained, or all whose name does not contain `kept`."""
    from megatron_opt.layout.matrices import global_names
    from megatron_opt.training import job

    initialize = job._initialize

    def initialized(args: Any, chunks: list[Any]) -> list[Any]:
        chunks = initialize(args, chunks)
        for chunk in chunks:
            for name, param in global_names(chunk, 0):
                kept = case.options.get("kept")
                param.requires_grad = case.options["frozen"] not in name if kept is None else kept in name
        return chunks

    job._initialize = initialized


def skew(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """The last rank is started with another flag, `--matrix-mode sharded`."""
    import os

    return [*argv, "--matrix-mode", "sharded" if int(os.environ["RANK"]) == case.ranks - 1 else "owner"]


def undeclared(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """The last stage has a layer that nobody has declared."""
    import os

    from megatron_opt.distributed import build
    from megatron_opt.errors import UserError

    def declare(*args: Any, **kwargs: Any) -> Any:
        raise UserError("no line declares the layer `odd`")

    if int(os.environ["RANK"]) == case.ranks - 1:
        build.declare = declare


def finite_differences(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Record by parameter how far z⊙(Hz) is from z⊙(∇L(w + εz) − ∇L(w − εz))/2ε, relative to its norm, and the norm."""
    import torch

    from megatron_opt.training import curvature, hutchinson
    from megatron_opt.training.batches import REPLAY

    original = curvature.estimate_hutchinson
    epsilon = 2e-3

    def compared(args: Any, forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, schedule: Any) -> None:
        kept = {stage: list(batches) for stage, batches in REPLAY._kept.items()}
        original(args, forward_step, data_iterator, model, optimizer, schedule)
        params = dict(model[0].module.named_parameters())
        names = {name.removeprefix("module."): param for name, param in params.items()}
        found = {name: param.main_grad.clone() for name, param in names.items()}
        z = {name: hutchinson.signs(args.seed, optimizer.step_number, name, param) for name, param in names.items()}
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, param in names.items():
                    param.add_(z[name], alpha=sign * epsilon)
            REPLAY._kept = {stage: list(batches) for stage, batches in kept.items()}
            curvature._pass(args, forward_step, data_iterator, model, optimizer, schedule)
            sides.append({name: param.main_grad.clone() for name, param in names.items()})
            with torch.no_grad():
                for name, param in names.items():
                    param.sub_(z[name], alpha=sign * epsilon)
        record.extra["finite_differences"] = {
            name: (
                float((z[name] * (sides[0][name] - sides[1][name]) / (2 * epsilon) - value).norm() / value.norm()),
                float(value.norm()),
            )
            for name, value in found.items()
        }

    curvature.estimate_hutchinson = compared


def work(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Record the FLOPs of the steps after the first (in which bases begin), and the bytes of state beside the plan's."""

    def prepare(record: recording.Record) -> None:
        from torch import ops
        from torch.utils.flop_counter import FlopCounterMode

        os.environ["MEGATRON_OPT_KERNELS"] = "reference"  # native kernels count as the plan's own formulas

        optimizer, step = record.optimizer, record.optimizer.step
        in_place = {
            ops.aten.addmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * b[1],
            ops.aten.baddbmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2],
        }
        record.extra["flops"] = 0

        def counted() -> Any:
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                found = step()
            if optimizer.step_number > 1:
                record.extra["flops"] += counter.get_total_flops()
            return found

        optimizer.step = counted

    def compare(record: recording.Record) -> None:
        steps, shard_groups = record.optimizer.matrix_steps, record.optimizer.shard_groups
        record.extra["held"] = [
            sum(t.numel() * t.element_size() for s in (*m.states.values(), *m.shared.values()) for t in s.values())
            for m in steps
        ]
        plans = [
            (step.placed.plan, d.rank % len(step.placed.plan.load)) for step, d in zip(steps, shard_groups, strict=True)
        ]
        record.extra["planned"] = [plan.state_bytes[rank] for plan, rank in plans]
        record.extra["planned_flops"] = [plan.flops[rank] for plan, rank in plans]

    record.once_made.append(prepare)
    record.at_end.append(compare)


def die(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """As `checkpoint`; the last rank is killed inside the optimizer's step `step`, between two exchanges."""

    def prepare(record: recording.Record) -> None:
        import os
        import signal

        import torch
        import torch.distributed as dist

        from megatron_opt.distributed.matrix_step import MatrixStep

        compute = MatrixStep._compute

        def computing(self: Any, names: Any, buffers: Any, scale: Any, skip: Any, number: int) -> Any:
            if number == case.options["step"] and dist.get_rank() == case.ranks - 1:
                target = folder / f"{case.name}.{dist.get_rank()}.pt"  # what the pool waits for
                torch.save({"killed": True, **record.partial()}, f"{target}.part")
                os.replace(f"{target}.part", target)
                os.kill(os.getpid(), signal.SIGKILL)
            return compute(self, names, buffers, scale, skip, number)

        MatrixStep._compute = computing  # type: ignore[method-assign]

    record.once_made.append(prepare)
    return checkpoint(case, record, argv, folder)


def images(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Record how many parameter shards the kernel wrote to the model, and whether every parameter is its main copy, rounded."""

    def compare(record: recording.Record) -> None:
        found = [
            (
                record.optimizer.publishes(param_shard),
                bool((param_shard.model_copy() == param_shard.main.bfloat16()).all()),
            )
            for param_shard in record.optimizer.param_shards()
        ]
        record.extra["images"] = found

    record.after_step.append(compare)


def mock_data(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """Megatron's made-up data, whose few different tokens leave gradients of low rank."""
    at = argv.index("--train-data-path")
    return [*argv[:at], *argv[at + 2 :], "--mock-data"]


def offload(case: Case, record: recording.Record, argv: list[str], folder: Path) -> None:
    """Record what of the state rests in host memory, what came and went, and what the batches hold."""

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def home(states: Any) -> int:
        return sum(size(getattr(state, "home", {}).values()) for state in states)

    def compare(record: recording.Record) -> None:
        optimizer = record.optimizer
        matrices = [[*m.states.values(), *m.shared.values()] for m in optimizer.matrix_steps]
        elements = [[p.state for ps in e.slices.values() for p in ps] for e in optimizer.element_steps]
        tensors = [t for states in (*matrices, *elements) for state in states for t in state.values()]
        batches = [home(batch) for m in optimizer.matrix_steps for batch in m._batches()]
        for e in optimizer.element_steps:
            for group, several in e.batches.items():
                named = [[p.state for p in e.slices.get(group, ()) if p.matrix in names] for names in several]
                batches += [0, *map(home, named)]  # one list of batches after the other: no pair of two
        record.extra["offload"] = {
            "moved": dict(optimizer.host.moved),
            "most": optimizer.host.most,
            "resting": home(state for states in (*matrices, *elements) for state in states),
            "of matrices": home(state for states in matrices for state in states),
            "planned": sum(
                m.placed.plan.offloaded * m.placed.plan.state_bytes[m.shard_group.rank % len(m.placed.plan.load)]
                for m in optimizer.matrix_steps
            ),
            "state": size(t for t in tensors if t.numel() > 1),
            "numbers": size(t for t in tensors if t.numel() == 1),
            "largest": max(map(size, ([t] for t in tensors))),
            "batches": batches,
        }

    record.at_end.append(compare)


def logits(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """Record the largest logit of each head of each step, worked out in float64 from what goes into the attentions, and
    the first step's weights before post-steps. Option `microbatches`: of a last step's batch of so many, the logits once more
    with the weights after it.
    """
    import torch

    found: list[dict[str, Any]] = [{}]
    calls: list[Any] = []

    def attend(name: str, module: Any) -> None:
        def look(core: Any, args: Any, kwargs: Any) -> None:
            if not core.training:
                return
            query, key = (
                kwargs.get(word, args[n] if n < len(args) else None) for n, word in enumerate(("query", "key"))
            )
            q, k = query.detach().double(), key.detach().double().repeat_interleave(query.shape[2] // key.shape[2], 2)
            scores = torch.einsum("sbhd,tbhd->bhst", q, k) * (core.softmax_scale or query.shape[-1] ** -0.5)
            ahead = torch.ones(len(q), len(k)).triu(1) > 0
            largest = scores.masked_fill(ahead, -torch.inf).amax((0, 2, 3))
            past = found[-1].get(name)
            found[-1][name] = largest if past is None else torch.maximum(past, largest)

        module.core_attention.register_forward_pre_hook(look, with_kwargs=True)

    def prepare(record: recording.Record) -> None:
        for number, chunk in enumerate(record.optimizer.model_chunks):
            chunk.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for name, module in chunk.named_modules():
                if hasattr(module, "core_attention"):
                    attend(f"{number}.{name}", module)
        (first, *_) = record.optimizer.post_steps
        scale = first.run

        def scaled(step: int) -> Any:
            if step == 1:
                record.extra["before"] = recording.weights(record.optimizer)
            return scale(step)

        first.run = scaled

    def again(record: recording.Record) -> None:
        record.extra["logits"] = found[: case.steps]
        (chunk,) = record.optimizer.model_chunks
        found.append({})
        for args, kwargs in calls[-case.options["microbatches"] :]:
            chunk(*args, **kwargs)
        record.extra["logits_after"] = found[-1]

    record.once_made.append(prepare)
    record.after_step.append(lambda record: found.append({}))
    if "microbatches" in case.options:
        record.at_end.append(again)
    else:
        record.at_end.append(lambda record: record.extra.update(logits=found[: case.steps]))
    return [*argv, "--log-interval", "1", "--output-dir", str(folder / f"output-{case.name}")]


def average(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """As `checkpoint`; record the average of weights at the end and as loaded, and one kept by hand in float64."""
    by_hand: list[Any] = []

    def kept() -> list[Any]:
        return [
            (r.matrix, *r.region, r.run(param_shard.state["ema"]).detach().clone().view(r.region.shape))
            for param_shard in record.optimizer.param_shards()
            for r in param_shard.rects
        ]

    def follow(record: recording.Record) -> None:
        decay = record.optimizer.average.decay
        now = [(*block[:5], block[5].double()) for block in recording.weights(record.optimizer)]
        if record.optimizer.step_number == 1:
            by_hand[:] = now
        elif by_hand:
            by_hand[:] = [(*a[:5], decay * a[5] + (1 - decay) * w[5]) for a, w in zip(by_hand, now, strict=True)]

    def loaded(record: recording.Record) -> None:
        from megatron.training import training

        train = training.train

        def training_with(*args: Any, **kwargs: Any) -> Any:
            record.extra["loaded_average"] = kept()
            return train(*args, **kwargs)

        training.train = training_with

    if "--ema-decay" in case.flags:
        record.after_step.append(follow)
        record.once_made.append(loaded)
        record.at_end.append(lambda record: record.extra.update(average=kept(), by_hand=by_hand))
    argv = checkpoint(case, record, argv, folder)
    return [*argv, "--log-interval", "1", "--output-dir", str(folder / f"average-{case.name}")]


def evaluated(case: Case, record: recording.Record, argv: list[str], folder: Path) -> list[str]:
    """As `average`; record what the last evaluation saw, whether the model had it, and numbers of the rules at the end."""

    def watch(record: recording.Record) -> None:
        in_place = record.optimizer.evaluation.in_place

        @contextlib.contextmanager
        def watched(*functions: Any) -> Iterator[None]:
            with in_place(*functions):
                record.extra["evaluated"] = recording.weights(record.optimizer)
                record.extra["published"] = all(
                    copy is None or bool((copy == p.main.to(copy.dtype)).all())
                    for p in record.optimizer.param_shards()
                    for copy in [p.model_copy()]
                )
                yield

        record.optimizer.evaluation.in_place = watched

    def numbers(record: recording.Record) -> None:
        from megatron_opt.distributed.state import numbers_of

        record.extra["numbers"] = numbers_of(record.optimizer.group_optimizers)

    record.once_made.append(watch)
    record.at_end.append(numbers)
    return average(case, record, argv, folder)
