"""What a run leaves behind: metrics.jsonl while it trains, results.json at its end, more in TensorBoard and the log.

Megatron's own log lines stay; this adds true throughput on CPU, the split of a step's time, and norms of weights and
updates by parameter group.
"""

import json
import math
import re
import resource
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_opt
from megatron_opt.files import write_atomic
from megatron_opt.training import stragglers
from megatron_opt.training.clock import Clock


class Diverged(Exception):
    """The loss has not been finite for a whole log interval; the run ends with that as its result."""


def git_revision() -> str | None:
    """Commit of the source tree that this package runs from, or None."""
    folder = Path(megatron_opt.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Monitor:
    """Follows one run; `install` puts it around Megatron's logging and evaluation."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.clock = Clock()
        self.own_time = stragglers.OwnTime()
        self.stragglers = stragglers.Watch(args.straggler_factor, args.straggler_window)
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.optimizer: Any = None
        self.matrices: Sequence[Any] = ()
        self.started = time.time()
        self.first_loss: float | None = None
        self.grad_norm: float | None = None
        self.last_train: float | None = None
        self.losses: dict[str, float] = {}
        self.totals: dict[str, float] = {}
        self.steps_timed = 0
        self.since = time.perf_counter()
        self.since_iteration = 0
        self.iteration = 0
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def speaks(self) -> bool:
        """The last rank has the loss, as for Megatron's own log."""
        return self.args.rank == self.args.world_size - 1

    # Megatron's hooks

    def install(self, training: Any) -> None:
        """Wrap Megatron's training_log, evaluate, log printer and forward-backward function."""
        log, evaluate_all, evaluate = training.training_log, training.evaluate_and_print_results, training.evaluate
        printer, schedule = training.print_rank_last, training.get_forward_backward_func

        def training_log(loss_dict: Any, total: Any, lr: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            flag = log(loss_dict, total, lr, iteration, *args, **kwargs)
            grad_norm = args[3] if len(args) > 3 else kwargs.get("grad_norm")
            self.on_step(iteration, loss_dict, lr, grad_norm)
            return flag

        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._split = "test" if "test set" in prefix else "valid"
            self._at = args[3] if len(args) > 3 else kwargs["iteration"]
            return evaluate_all(prefix, *args, **kwargs)

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            began, self.clock.running = time.perf_counter(), False
            found = evaluate(*args, **kwargs)
            self.clock.running = True
            self.since += time.perf_counter() - began  # evaluation is not training time
            losses = found[0] if found else None
            if losses and "lm loss" in losses:
                self.on_eval(self._split, self._at, float(losses["lm loss"]))
            return found

        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            return self.clock.timed("forward_backward", schedule(*args, **kwargs))

        if not torch.cuda.is_available() and self.args.straggler_factor:
            self.own_time.install(training)
        training.training_log, training.evaluate = training_log, evaluated
        training.evaluate_and_print_results = evaluate_and_print_results
        training.print_rank_last = lambda text: printer(self._true_throughput(training, text))
        training.get_forward_backward_func = get_forward_backward_func

    def watch(self, optimizer: Any, chunks: Sequence[Any]) -> None:
        """Time the optimizer and the communication around it; ask it for norms when they will be logged."""
        self.optimizer = optimizer
        step = self.clock.timed("optimizer", optimizer.step)

        def stepped() -> Any:
            if hasattr(optimizer, "want_stats"):
                following = self.iteration + 1
                optimizer.want_stats = following % self.args.log_interval == 0 or following == self.args.train_iters
            return step()

        optimizer.step = stepped
        for chunk in chunks:
            chunk.finish_grad_sync = self.clock.timed("communication", chunk.finish_grad_sync)
            chunk.start_param_sync = self.clock.timed("communication", chunk.start_param_sync)
        from megatron_opt.distributed.exchange import Trip

        Trip.finish = self.clock.timed("communication", Trip.finish)  # type: ignore[method-assign]

    # Events

    def on_step(self, iteration: int, losses: Any, lr: float | None, grad_norm: float | None) -> None:
        """After every step, on every rank; writes at the log interval."""
        self.iteration, self.grad_norm = iteration, grad_norm
        loss = float(losses["lm loss"]) if losses and "lm loss" in losses else None
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            if math.isfinite(loss):
                self.last_train = loss
        if iteration % self.args.log_interval and iteration != self.args.train_iters:
            return
        now = time.perf_counter()
        steps = max(iteration - self.since_iteration, 1)
        seconds = (now - self.since) / steps
        self.since, self.since_iteration = now, iteration
        spans = {name: value / steps for name, value in self.clock.take().items()}
        self.steps_timed += steps
        for name, value in {"total": seconds, **spans}.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * steps
        tokens_per_s = self.args.global_batch_size * self.args.seq_length / seconds
        entry = {
            "kind": "train",
            "iteration": iteration,
            "tokens": self.args.consumed_train_samples * self.args.seq_length,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_time": seconds,
            "tokens_per_s": tokens_per_s,
            "split": {name: round(value, 6) for name, value in spans.items()},
        }
        if self.speaks and "curvature" in spans:
            print(f" curvature: {spans['curvature'] * 1e3:.1f} ms a step, {spans['curvature'] / seconds:.1%} of it")
        stats = getattr(self.optimizer, "stats", None)
        if stats:
            entry["groups"] = stats
        self._append(entry)
        self._tensorboard(iteration, tokens_per_s, seconds, spans, stats)
        own = self.own_time.take()
        if torch.cuda.is_available():  # the host does not wait where the device does
            own = steps * (
                sum(spans.get(n, 0.0) for n in ("forward_backward", "optimizer")) - spans.get("communication", 0.0)
            )
        self._compare(iteration, steps, loss is not None and not math.isfinite(loss), own)

    def _compare(self, iteration: int, steps: int, bad: bool, own: float) -> None:
        """Of all ranks: whether the loss is still finite, and who is slow."""
        from megatron.core import mpu

        stage = float(mpu.get_pipeline_model_parallel_rank())
        mine = torch.tensor([float(bad), own, stage], dtype=torch.float64, device=torch.cuda.current_device())
        rows = [mine]
        if dist.get_world_size() > 1:
            rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, mine)
        bads, owns, stages = torch.stack(rows).T.tolist()
        slow = self.stragglers.see(steps, owns, stages)
        if self.args.rank in slow:
            stragglers.report(iteration, self.args.rank, slow[self.args.rank])
        self._bad = (getattr(self, "_bad", 0) + 1) if any(bads) else 0
        if self._bad > 2:
            raise Diverged

    def on_eval(self, split: str, iteration: int, loss: float) -> None:
        """After an evaluation, on the ranks that have the loss."""
        self.losses[split] = loss
        tokens = self.args.consumed_train_samples * self.args.seq_length
        self._append({"kind": "eval", "iteration": iteration, "tokens": tokens, "loss": loss, "split": split})

    def _append(self, entry: dict[str, Any]) -> None:
        if self.folder and self.speaks:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def _tensorboard(
        self, iteration: int, tokens_per_s: float, seconds: float, spans: dict[str, float], stats: Any
    ) -> None:
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer is None:
            return
        writer.add_scalar("tokens-per-second", tokens_per_s, iteration)
        for name, value in {"total": seconds, **spans}.items():
            writer.add_scalar(f"step-time/{name.replace('_', '-')}", value, iteration)
        for group, norms in (stats or {}).items():
            for name, value in norms.items():
                writer.add_scalar(f"{name.replace('_', '-')}/{group}", value, iteration)

    def _true_throughput(self, training: Any, text: str) -> str:
        """Megatron rounds TFLOP/s to one decimal, which is zero on a CPU."""
        match = re.search(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)
        if not match or "TFLOP/s/GPU" not in text or float(match[1]) <= 0:
            return text
        flops = training.num_floating_point_operations(self.args, self.args.global_batch_size)
        rate = flops / (float(match[1]) * 1e-3 * 1e12 * self.args.world_size)
        return re.sub(r"(TFLOP/s/GPU\): )[0-9.]+", lambda m: f"{m[1]}{rate:.4g}", text)

    # The end

    def finish(self, status: str) -> None:
        """Write results.json; `status` is completed, diverged or interrupted."""
        peak = torch.tensor([float(_peak_memory())], dtype=torch.float64, device=torch.cuda.current_device())
        if dist.get_world_size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if not self.folder or not self.speaks:
            return
        valid = self.losses.get("valid")
        final = valid if valid is not None else self.last_train
        worse = final is not None and self.first_loss is not None and not final < self.first_loss
        dead = self.grad_norm is not None and not 0 < self.grad_norm < math.inf  # saturated: nothing moves any more
        if status == "completed" and (worse or dead):
            status = "diverged"
        steps = max(self.steps_timed, 1)
        mean = {name: value / steps for name, value in self.totals.items()}
        args = self.args
        result = {
            "status": status,
            "diverged": status == "diverged",
            "optimizer": args.optimizer,
            "preset": args.preset,
            "seed": args.seed,
            "params_total": sum(m.numel for m in self.matrices),
            "params_non_embedding": sum(m.numel for m in self.matrices if m.kind not in ("embedding", "output")),
            "tokens": args.consumed_train_samples * args.seq_length,
            "iterations": self.iteration,
            "final_train_loss": self.last_train,
            "final_valid_loss": valid if valid is not None and math.isfinite(valid) else None,
            "final_test_loss": self.losses.get("test"),
            "wall_time_s": time.time() - self.started,
            "train_time_s": self.totals.get("total", 0.0),
            "tokens_per_s": args.global_batch_size * args.seq_length / mean["total"] if mean.get("total") else None,
            "step_time_s": mean,
            "peak_memory_bytes": int(peak.item()),
            "world_size": args.world_size,
            "layout": {
                "tp": args.tensor_model_parallel_size,
                "pp": args.pipeline_model_parallel_size,
                "dp": args.data_parallel_size,
                "ep": args.expert_model_parallel_size,
                "cp": args.context_parallel_size,
            },
            "flops_per_s": self._flops_per_s(mean.get("total")),
            "tokenizer": _tokenizer(args),
            "data": args.data_path or args.train_data_path,
            "git_revision": git_revision(),
            "versions": {
                "megatron_opt": megatron_opt.__version__,
                "torch": torch.__version__,
                "megatron_core": _core(),
            },
            "argv": args.command_line,
            "config": {key: _plain(value) for key, value in sorted(vars(args).items()) if not key.startswith("_")},
        }
        write_atomic(self.folder / "results.json", json.dumps(result, indent=1) + "\n")

    def _flops_per_s(self, seconds: float | None) -> float | None:
        import megatron.training.training as training

        if not seconds:
            return None
        return float(training.num_floating_point_operations(self.args, self.args.global_batch_size)) / seconds


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _core() -> str:
    import megatron.core

    return str(megatron.core.__version__)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _tokenizer(args: Any) -> dict[str, Any]:
    import hashlib

    model = getattr(args, "tokenizer_model", None)
    digest = None
    if model and Path(model).is_file():
        digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    return {"model": model, "vocab_size": getattr(args, "padded_vocab_size", None), "sha256": digest}
