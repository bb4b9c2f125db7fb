"""What a run leaves behind: metrics.jsonl while it trains, results.json at its end, every series in TensorBoard and W&B.

It adds to Megatron's loop: rates that are true under a batch schedule and on CPU, the split of a step's time, norms of
weights and updates by parameter group. All quantities are of the whole run, over restarts.
"""

import contextlib
import json
import math
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opt import run_files
from megatron_opt.checkpointing import run_state
from megatron_opt.errors import UserError, full
from megatron_opt.files import write_atomic
from megatron_opt.kernels.host import current_device
from megatron_opt.training import console, events, fp8_ranges, record, sinks, stragglers
from megatron_opt.training.clock import Clock
from megatron_opt.training.progress import Progress


class Diverged(Exception):
    """The loss has not been finite for a whole log interval; the run ends with that as its result."""


class Monitor:
    """Follows one run; `install` puts it around Megatron's logging and evaluation."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.clock = Clock()
        self.own_time = stragglers.OwnTime()
        self.stragglers = stragglers.Watch(args.straggler_factor, args.straggler_window)
        self.ranges = fp8_ranges.Ranges() if args.log_fp8_ranges else None
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.optimizer: Any = None
        self.matrices: Sequence[Any] = ()
        self.progress = Progress()
        self._restored: dict[str, Any] | None = None  # progress as the checkpoint has it
        run_state.provide("progress", lambda: self.progress.as_row(), self._restore)
        self.losses: dict[str, float] = {}
        self.iteration = 0
        self._started = time.time()
        self._wall_before = 0.0
        self._since = time.perf_counter()
        self._since_iteration = 0
        self._since_samples = 0
        self._evaluated: tuple[str, int, Any] | None = None
        self._table: console.Table | None = None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_logging_rank(self) -> bool:
        """The last rank has the loss, as for Megatron's own log."""
        return self.args.rank == self.args.world_size - 1

    # Megatron's hooks

    def install(self, training: Any) -> None:
        """Wrap Megatron's train, training_log, evaluate, log printer and forward-backward function."""
        log, evaluate_all, evaluate = training.training_log, training.evaluate_and_print_results, training.evaluate
        printer, schedule, train = training.print_rank_last, training.get_forward_backward_func, training.train
        sinks.install(training, self.args)

        def training_log(loss_dict: Any, total: Any, lr: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            if iteration % self.args.log_interval == 0:  # else Megatron adds a process's first step to its next line
                kwargs["is_first_iteration"] = False
            flag = log(loss_dict, total, lr, iteration, *args, **kwargs)
            grad_norm = args[3] if len(args) > 3 else kwargs.get("grad_norm")
            self.on_step(iteration, loss_dict, lr, grad_norm)
            return flag

        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._split = "test" if "test set" in prefix else "valid"
            self._at = args[3] if len(args) > 3 else kwargs["iteration"]
            return evaluate_all(prefix, *args, **kwargs)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began, self.clock.running = time.perf_counter(), False
            try:
                return evaluate(*args, **kwargs)
            finally:
                self.clock.running = True
                self._since += time.perf_counter() - began  # evaluation is not training time

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            if self._evaluated and self._evaluated[:2] == (self._split, self._at):
                return self._evaluated[2]  # the same weights on the same samples, as at the end of a run
            with self._evaluation_weights():
                losses = timed(*args, **kwargs)
            self._evaluated = (self._split, self._at, losses) if losses and not losses[2] else None
            self._take_losses(self._split, losses)
            average = getattr(self.optimizer, "average", None)
            if average is not None and average.begun and self._evaluated:
                with average.in_place(self.optimizer.publish, self.optimizer.settle_copies):
                    self._take_losses(f"{self._split}{run_files.AVERAGED}", timed(*args, **kwargs))
            return losses

        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            return self.clock.timed("forward_backward", self._counted(schedule(*args, **kwargs)))

        def begun(*args: Any, **kwargs: Any) -> Any:
            self.begin(self.args.iteration)
            return train(*args, **kwargs)

        if not torch.cuda.is_available() and self.args.straggler_factor:
            self.own_time.install(training)
        training.training_log, training.evaluate, training.train = training_log, evaluated, begun
        training.evaluate_and_print_results = evaluate_and_print_results
        training.print_rank_last = lambda text: printer(self._true_throughput(training, text))
        training.get_forward_backward_func = get_forward_backward_func

    def _evaluation_weights(self) -> Any:
        """For a while, the weights that the run's rules would have evaluated."""
        weights = getattr(self.optimizer, "evaluation", None)
        return (
            contextlib.nullcontext()
            if weights is None
            else weights.in_place(self.optimizer.publish, self.optimizer.settle_copies)
        )

    def _restore(self, values: dict[str, Any]) -> None:
        self._restored = values

    def begin(self, iteration: int) -> None:
        """Training goes on from `iteration`: what the run has behind it is read from its log."""
        self.iteration = self._since_iteration = iteration
        self._since, self._since_samples = time.perf_counter(), self.args.consumed_train_samples
        if self.folder:
            path = self.folder / run_files.METRICS
            if self.is_logging_rank:
                rows = run_files.forget_after(path, iteration)
            else:
                rows = [row for row in run_files.metrics(path) if row["iteration"] <= iteration]
            self.progress = Progress.of_rows(run_files.training(rows))
            for split in (f"{of}{weights}" for of in ("valid", "test") for weights in ("", run_files.AVERAGED)):
                if evaluations := run_files.evaluations(rows, split):
                    self.losses[split] = evaluations[-1]["loss"]
        if self._restored is not None and self._restored.get("steps", 0) >= self.progress.steps:
            self.progress = Progress.of_rows([{"loss": None, "run": self._restored}])
        self._wall_before = self.progress.wall
        self._table = console.Table(self.args.train_iters, console.peak_flops(self.args))
        record.write(self.args, getattr(self.optimizer, "groups", None))
        if self.is_logging_rank and (writer := sinks.writer()) is not None and writer.wandb is not None:
            writer.wandb.config.update(
                {"validation": getattr(self.args, "validation_identity", None)}, allow_val_change=True
            )

    def _counted(self, passes: Any) -> Any:
        """Forward and backward passes, counted in a step that will be logged where --log-fp8-ranges asks for it."""
        ranges = self.ranges
        if ranges is None:
            return passes

        def counted(*args: Any, **kwargs: Any) -> Any:
            ranges.counting = self._logs_next and not kwargs.get("forward_only", False)
            try:
                return passes(*args, **kwargs)
            finally:
                ranges.counting = False

        return counted

    @property
    def _logs_next(self) -> bool:
        following = self.iteration + 1
        return following % self.args.log_interval == 0 or following == self.args.train_iters

    def watch(self, optimizer: Any, chunks: Sequence[Any]) -> None:
        """Time the optimizer and the communication around it; ask it for norms when they will be logged."""
        self.optimizer = optimizer
        if self.ranges is not None:
            self.ranges.install(chunks)
        step = self.clock.timed("optimizer", optimizer.step)

        def stepped() -> Any:
            if hasattr(optimizer, "want_stats"):
                optimizer.want_stats = self._logs_next
            return step()

        optimizer.step = stepped
        for chunk in chunks:
            chunk.finish_grad_sync = self.clock.timed("communication", chunk.finish_grad_sync)
            chunk.start_param_sync = self.clock.timed("communication", chunk.start_param_sync)
        from megatron_opt.distributed.exchange import AsyncTransfer

        AsyncTransfer.finish = self.clock.timed("communication", AsyncTransfer.finish)  # type: ignore[method-assign]

    # Events

    def on_step(self, iteration: int, losses: Any, lr: float | None, grad_norm: float | None) -> None:
        """After every step, on every rank; writes at the log interval."""
        args, progress = self.args, self.progress
        self.iteration = iteration
        loss = float(losses["lm loss"]) if losses and "lm loss" in losses else None
        progress.take_loss(loss, None if grad_norm is None else float(grad_norm))
        if iteration % args.log_interval and iteration != args.train_iters:
            return
        now = time.perf_counter()
        steps, elapsed = max(iteration - self._since_iteration, 1), now - self._since
        samples = args.consumed_train_samples - self._since_samples  # batches may grow within the interval
        self._since, self._since_iteration, self._since_samples = now, iteration, args.consumed_train_samples
        sums, seconds = self.clock.take(), elapsed / steps
        flops, tokens_per_s = self._flops(samples), samples * args.seq_length / elapsed
        progress.take_time(steps, elapsed, samples * args.seq_length, flops, sums)
        progress.wall = self._wall_before + time.time() - self._started
        progress.bad = progress.bad + 1 if loss is not None and not math.isfinite(loss) else 0
        spans = {name: value / steps for name, value in sums.items()}
        entry = {
            "kind": "train",
            "iteration": iteration,
            "time": round(time.time(), 3),
            "tokens": args.consumed_train_samples * args.seq_length,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_time": seconds,
            "tokens_per_s": tokens_per_s,
            "split": {name: round(value, 6) for name, value in spans.items()},
            "run": progress.as_row(),
        }
        stats = getattr(self.optimizer, "stats", None)
        if stats:
            entry["groups"] = stats
        reports = [report for post in getattr(self.optimizer, "post_steps", ()) if (report := post.report())]
        if self.ranges is not None and (of_fp8 := self.ranges.report()):
            reports.append(of_fp8)
        entry |= {report.key: report.entry for report in reports}
        self._append(entry)
        if self.is_logging_rank:
            assert self._table is not None
            row = (iteration, loss, lr, grad_norm, seconds, tokens_per_s, flops / elapsed)
            console.say(self._table.row(*row, args.world_size, _peak_memory()))
            if "curvature" in spans:
                share = spans["curvature"] / seconds
                console.say(f" curvature: {spans['curvature'] * 1e3:.1f} ms a step, {share:.1%} of it")
            for report in reports:
                console.say(report.line)
        self._series(iteration, tokens_per_s, seconds, spans, stats, reports)
        own = self.own_time.take()
        if torch.cuda.is_available():  # the host does not wait where the device does
            own = sum(sums.get(n, 0.0) for n in ("forward_backward", "optimizer")) - sums.get("communication", 0.0)
        self._compare(iteration, steps, loss is not None and not math.isfinite(loss), own)

    def _compare(self, iteration: int, steps: int, bad: bool, own: float) -> None:
        """Of all ranks: whether the loss is still finite, and who is slow."""
        from megatron.core import mpu

        stage = float(mpu.get_pipeline_model_parallel_rank())
        in_a_row = float(self.progress.bad if bad else 0)
        mine = torch.tensor([in_a_row, own, stage], dtype=torch.float64, device=current_device())
        rows = [mine]
        if dist.get_world_size() > 1:
            rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, mine)
        bads, owns, stages = torch.stack(rows).T.tolist()
        slow = self.stragglers.see(steps, owns, stages)
        if self.args.rank in slow:
            stragglers.report(iteration, self.args.rank, slow[self.args.rank])
        if max(bads) > 2:
            raise Diverged

    def _take_losses(self, split: str, evaluated: Any) -> None:
        losses = evaluated[0] if evaluated else None
        if losses and "lm loss" in losses:
            self.on_eval(split, self._at, float(losses["lm loss"]))

    def on_eval(self, split: str, iteration: int, loss: float) -> None:
        """After an evaluation, on the ranks that have the loss."""
        self.losses[split] = loss
        if not self.is_logging_rank:
            return
        tokens = self.args.consumed_train_samples * self.args.seq_length
        row = {"kind": "eval", "iteration": iteration, "time": round(time.time(), 3), "tokens": tokens, "loss": loss}
        self._append({**row, "split": split})
        of, averaged = split.removesuffix(run_files.AVERAGED), split.endswith(run_files.AVERAGED)
        name = {"valid": "validation", "test": "test"}[of]
        if averaged:
            name += " of the average"
            if (writer := sinks.writer()) is not None:
                writer.add_scalar(f"lm loss {name}", loss, iteration)
        console.say(f"{name + ' at ' + str(iteration):>15}  {loss:>8.4f}  perplexity {math.exp(min(20.0, loss)):.2f}")

    def _append(self, entry: dict[str, Any]) -> None:
        if self.folder and self.is_logging_rank:
            try:
                with open(self.folder / run_files.METRICS, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                if full(error) is None:
                    raise
                raise UserError(
                    f"--output-dir {self.folder}: {run_files.METRICS} cannot be written ({error.strerror}); make room and "
                    "start the same command again."
                ) from error

    def _series(
        self, iteration: int, tokens_per_s: float, seconds: float, spans: dict[str, float], stats: Any, reports: Any
    ) -> None:
        writer = sinks.writer() if self.is_logging_rank else None
        if writer is None:
            return
        writer.add_scalar("tokens-per-second", tokens_per_s, iteration)
        for name, value in {"total": seconds, **spans}.items():
            writer.add_scalar(f"step-time/{name.replace('_', '-')}", value, iteration)
        for group, norms in (stats or {}).items():
            for name, value in norms.items():
                writer.add_scalar(f"{name.replace('_', '-')}/{group}", value, iteration)
        for name, value in (item for report in reports for item in report.series.items()):
            writer.add_scalar(name, value, iteration)

    def _flops(self, samples: int) -> float:
        import megatron.training.training as training

        return float(training.num_floating_point_operations(self.args, samples))

    def _true_throughput(self, training: Any, text: str) -> str:
        """Megatron rounds TFLOP/s to one decimal, which is zero on a CPU."""
        match = re.search(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)
        if not match or "TFLOP/s/GPU" not in text or float(match[1]) <= 0:
            return text
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size

        flops = self._flops(get_current_global_batch_size())
        rate = flops / (float(match[1]) * 1e-3 * 1e12 * self.args.world_size)
        return re.sub(r"(TFLOP/s/GPU\): )[0-9.]+", lambda m: f"{m[1]}{rate:.4g}", text)

    # The end

    def finish(self, status: str, reason: str | None = None, signal: str | None = None) -> None:
        """Write results.json and the last event; `status` is completed, diverged or interrupted, `reason` why so early."""
        peak = torch.tensor([float(_peak_memory())], dtype=torch.float64, device=current_device())
        if dist.get_world_size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if not self.is_logging_rank:
            return
        result = self._result(status, reason, int(peak.item()))
        if self.folder:
            write_atomic(self.folder / run_files.RESULTS, json.dumps(result, indent=1) + "\n")
        if (writer := sinks.writer()) is not None:
            writer.close(result)
        told = {"signal": signal} if signal else {}
        reason = result["reason"]
        events.record("end", status=result["status"], reason=reason, iteration=self.iteration, **told)
        loss = result["final_valid_loss"] if result["final_valid_loss"] is not None else result["final_train_loss"]
        shown = (
            ""
            if loss is None
            else f", {'validation' if result['final_valid_loss'] is not None else 'training'} loss {loss:.4f}"
        )
        why = f" ({reason or signal})" if reason or signal else ""
        console.say(
            f"{result['status']}{why} at step {self.iteration} of {self.args.train_iters}{shown}, "
            f"{clock_or_dash(result['train_time_s'])} of training{', in ' + str(self.folder) if self.folder else ''}"
        )

    def _result(self, status: str, reason: str | None, peak: int) -> dict[str, Any]:
        args, progress = self.args, self.progress
        valid = self.losses.get("valid")
        if status == "completed" and progress.diverged(valid if valid is not None else progress.last_loss):
            status, reason = "diverged", "the loss ended no lower than it began, or gradients are zero or not finite"
        tokens = args.consumed_train_samples * args.seq_length
        written = self.folder / run_files.CONFIG if self.folder else None
        known = run_files.record(written) if written is not None and written.is_file() else record.build(args)
        before = (run_files.results(self.folder) if self.folder else None) or {}
        return {
            "status": status,
            "reason": reason,
            "diverged": status == "diverged",
            "params_total": sum(m.numel for m in self.matrices),
            "params_non_embedding": sum(m.numel for m in self.matrices if m.kind not in ("embedding", "output")),
            "tokens": tokens,
            "iterations": self.iteration,
            "final_train_loss": progress.last_loss,
            "final_valid_loss": valid if valid is not None and math.isfinite(valid) else None,
            "final_test_loss": self.losses.get("test"),
            **{
                f"final_{split}_loss": loss for split, loss in self.losses.items() if split.endswith(run_files.AVERAGED)
            },
            "wall_time_s": self._wall_before + time.time() - self._started,
            "train_time_s": progress.train_time(tokens),
            "tokens_per_s": progress.tokens_per_s,
            "step_time_s": progress.step_time() if progress.steps else {},
            "peak_memory_bytes": peak,
            "flops_per_s": progress.flops_per_s,
            **known,
            "data": args.data_path or args.train_data_path,
            "datasets": known.get("data"),
            # what `megatron-opt eval` has added, of checkpoints that a resumed run leaves behind it
            **({"evaluation": before["evaluation"]} if "evaluation" in before else {}),
        }


def clock_or_dash(seconds: float | None) -> str:
    """A duration for people."""
    return console.clock(seconds) if seconds else "–"


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
