"""Short runs on one repeated batch that write down how large every kind of activation is, step by step.

`python -m megatron_opt.training.activations FOLDER` makes the runs of FOLDER/plan.json (name → flags), each in a forked
process, so that Megatron is imported once, and leaves NAME.json of each; the caller is `mup_check.py`.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.training import entry

# kind of activation: the modules whose output it is
KINDS = {
    "embedding": r"embedding",
    "qkv": r".*\.linear_qkv",
    "attention": r".*\.core_attention",
    "attention output": r".*\.linear_proj",
    "mlp up": r".*\.linear_fc1",
    "mlp down": r".*\.linear_fc2",
    "residual": r"decoder\.layers\.\d+",
    "logits": r"output_layer",
}


class Recorder:
    """Hooks on a model: mean |x| of each kind, and mean |x − x₀| against the first step's, at every step."""

    def __init__(self) -> None:
        self.sizes: list[dict[str, float]] = []
        self.changes: list[dict[str, float]] = []
        self.losses: list[float] = []
        self._first: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}

    def watch(self, chunks: list[Any]) -> None:
        """Hook every module of a kind."""
        for chunk in chunks:
            scale = float(chunk.config.mup_output_mult) if chunk.config.use_mup else 1.0
            for name, module in chunk.named_modules():
                kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)
                if kind:
                    module.register_forward_hook(self._hook(f"{kind}:{name}", scale if kind == "logits" else 1.0))

    def _hook(self, key: str, scale: float) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self._now.setdefault(key, tensor.detach().double() * scale)  # a step's first microbatch stands for it

        return hook

    def wrap(self, train_step: Any) -> Any:
        """Megatron's training step on the first step's batches for ever."""
        from megatron.core.rerun_state_machine import RerunDataIterator

        kept: list[Any] = []

        def repeated(source: Iterator[Any]) -> Iterator[Any]:
            count = 0
            while True:
                if count == len(kept):
                    kept.append(next(source))
                yield kept[count]
                count += 1

        def wrapped(forward_step: Any, data_iterator: Any, *rest: Any, **kwargs: Any) -> Any:
            self._now = {}
            result = train_step(forward_step, RerunDataIterator(repeated(data_iterator)), *rest, **kwargs)
            self._first = self._first or dict(self._now)
            self.sizes.append(_means({key: x.abs().mean() for key, x in self._now.items()}))
            self.changes.append(_means({key: (x - self._first[key]).abs().mean() for key, x in self._now.items()}))
            self.losses.append(float(result[0]["lm loss"]))
            return result

        return wrapped


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean over the modules of a kind."""
    by_kind: dict[str, list[float]] = {}
    for key, value in values.items():
        by_kind.setdefault(key.split(":")[0], []).append(float(value))
    return {kind: sum(several) / len(several) for kind, several in by_kind.items()}


def record(target: Path, argv: list[str]) -> None:
    """Train as the flags say on one process; the record as JSON."""
    from megatron.training import training

    from megatron_opt.training import arguments, job

    recorder = Recorder()
    training.train_step = recorder.wrap(training.train_step)
    job.train(arguments.parse(argv), recorder.watch)
    content = {"sizes": recorder.sizes, "changes": recorder.changes, "losses": recorder.losses}
    target.write_text(json.dumps(content))


def _forked(target: Path, argv: list[str]) -> int:
    """Exit code of one run in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        record(target, argv)
        code = 0
    except UserError as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> int:
    """All runs of the plan in order; the first failure's exit code."""
    entry.set_single_process_env()
    from megatron_opt import platform

    platform.activate()
    import megatron_opt.training.job  # noqa: F401  # before the first fork
    from megatron_opt.optimizers import registry

    registry.optimizers()
    import megatron.training.training  # noqa: F401

    for name, argv in json.loads((folder / "plan.json").read_text()).items():
        print(name, file=sys.stderr, flush=True)
        if code := _forked(folder / f"{name}.json", argv):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
