"""`megatron-opt COMMAND …`: one word, one module, imported only when asked for."""

import argparse
import importlib
import os
import select
import signal
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from megatron_opt import quiet
from megatron_opt.errors import Parser, UserError, did_you_mean, naming
from megatron_opt.extras import sentence_of
from megatron_opt.training import entry, failing

COMMANDS = {
    "data": ("megatron_opt.data.cli", "fetch a corpus, train a tokenizer, write .bin/.idx, inspect a dataset"),
    "doctor": ("megatron_opt.doctor", "check this machine or, under torchrun, every rank of a cluster"),
    "status": ("megatron_opt.status", "what a run is doing: step, loss, speed, restarts, checkpoints, time to end"),
    "study": ("megatron_opt.study.cli", "plan, tune, run, fit and report a comparison of optimizers"),
    "cost": ("megatron_opt.cost_model.cli", "predict a training step on a cluster; search layouts; calibrate"),
    "migrate": ("megatron_opt.migrate.cli", "plan a change of optimizer; convert a checkpoint into a warm start"),
    "optimizers": ("megatron_opt.optimizer_list", "list the optimizers, or one's formula, flags and defaults"),
    "mup": ("megatron_opt.training.mup_check", "check that activation sizes do not follow the width under µP"),
    "export": ("megatron_opt.export.exporting", "write a checkpoint as a Hugging Face model"),
    "import": ("megatron_opt.export.importing", "make a checkpoint to start from out of a Hugging Face model"),
    "generate": ("megatron_opt.export.generating", "continue a text with a checkpoint's model, on CPU"),
    "eval": ("megatron_opt.evaluation.cli", "accuracy of a checkpoint on tasks, through lm-evaluation-harness"),
    "train": ("megatron_opt.launch", "start a training run on this machine or as one node of several"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: megatron-opt COMMAND … | --version\n\ncommands:\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit code 0 done, 1 failed, 2 bad input, 141 the reader of the output has left."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + signal.SIGPIPE
    except Exception as error:
        failing.tell(1, f"{type(error).__name__}: {error}")
        raise


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"megatron-opt {version()}")
        return 0
    if argv[0] not in COMMANDS:
        known = f"there are {', '.join(COMMANDS)}.{did_you_mean(argv[0], COMMANDS)}"
        print(f"megatron-opt: no command {argv[0]!r}; {known}", file=sys.stderr)
        return 2
    quiet.install()
    argparse.ArgumentParser.error = Parser.error  # type: ignore[method-assign,assignment]  # of every command's parser and its subparsers
    try:
        module = importlib.import_module(COMMANDS[argv[0]][0])
        return int(module.main(argv[1:], prog=f"megatron-opt {argv[0]}") or 0)
    except BrokenPipeError:
        raise
    except (UserError, ModuleNotFoundError, OSError) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
    return entry.print_user_error(f"megatron-opt {argv[0]}", UserError(naming(str(sentence), argv[1:])))


def version() -> str:
    """The installed version, or that of the source tree."""
    try:
        return metadata.version("megatron-opt")
    except metadata.PackageNotFoundError:
        pyproject = Path(__file__).parent.parent / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text())["project"]["version"]) if pyproject.is_file() else "unknown"


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more; what is left for it is dropped then."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
