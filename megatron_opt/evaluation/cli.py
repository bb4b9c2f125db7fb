"""`megatron-opt eval CHECKPOINT --tasks NAMES`: a checkpoint's accuracy on tasks of lm-evaluation-harness, on any layout."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opt import run_files
from megatron_opt.errors import UserError, number
from megatron_opt.files import make_folder
from megatron_opt.training import entry, failing


def _parser(prog: str) -> argparse.ArgumentParser:
    from megatron_opt.export import averages

    parser = argparse.ArgumentParser(
        prog,
        description="Evaluate a checkpoint on tasks of lm-evaluation-harness; under torchrun on several ranks, "
        f"data-parallel beyond the layout. `{prog} make-tasks --help`: tasks out of held-out text.",
    )
    parser.add_argument("checkpoint", type=Path, help="the --save folder of a run (its newest), or one iter_N in it")
    parser.add_argument("--tasks", required=True, metavar="NAME,…", help="tasks, groups or tags of the harness")
    parser.add_argument(
        "--num-fewshot", type=number(0, 1000, whole=True), metavar="K", help="examples before an item (the task's own)"
    )
    parser.add_argument("--limit", type=number(1, whole=True), metavar="N", help="only the first N items of a task")
    parser.add_argument(
        "--tasks-path",
        type=Path,
        metavar="DIR",
        help="task files (YAML), and copies of data sets under the hub's names",
    )
    parser.add_argument(
        "--batch-size",
        type=number(1, whole=True),
        default=8,
        metavar="B",
        help="sequences that a rank computes at once (8)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where results go, by the key evaluation (the run's results.json)"
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="a JSON line for each item besides")
    parser.add_argument(
        "--average",
        type=number(2, whole=True),
        metavar="K",
        help="evaluate the mean of the last K checkpoints' weights too, beside the raw ones",
    )
    parser.add_argument(
        "--loss-on", metavar="PREFIX", help="the loss over an indexed dataset's first sequences too, as validation_loss"
    )
    parser.add_argument(
        "--loss-samples", type=number(1, whole=True), default=256, metavar="N", help="sequences of --loss-on (256)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where the model computes, in fp32 (a rank's own GPU where there is one)",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="in place of the one that the run names")
    parser.add_argument("--tensor-model-parallel-size", type=number(1, whole=True), default=1, metavar="N", help="(1)")
    parser.add_argument(
        "--pipeline-model-parallel-size", type=number(1, whole=True), default=1, metavar="N", help="(1)"
    )
    averages.add_argument(parser, both=True)
    parser.add_argument("--trust-checkpoint", action="store_true", help="read a foreign checkpoint's pickles unchecked")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Evaluate, or make tasks; bad input raises UserError."""
    if argv[:1] == ["make-tasks"]:
        from megatron_opt.evaluation import make_tasks

        return make_tasks.main(argv[1:], f"{prog} make-tasks")
    if not sys.stderr.isatty():  # before torch, which imports tqdm
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    args = _parser(prog).parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever the machine has
    entry.check_launcher()
    failing.listen()
    evaluate(args)
    return 0


def evaluate(args: argparse.Namespace) -> Any:
    """Results as the harness gives them, on rank 0; tells, prints and writes them."""
    names = [name for name in args.tasks.split(",") if name]
    if not names:
        raise UserError("--tasks is empty; name tasks, e.g. --tasks arc_easy,hellaswag.")
    from megatron_opt import platform

    if args.device == "cuda" and platform.on_cpu():
        raise UserError("--device cuda: torch sees no GPU on this machine; leave it out, or give cpu.")
    platform.activate()
    from megatron_opt.evaluation import averaging, model, ranks, results, tasks
    from megatron_opt.evaluation.scoring import Scorer
    from megatron_opt.export import averages, tokenizer_files
    from megatron_opt.export.reading import Checkpoint

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    kinds = averages.CHOICES if args.weights == averages.BOTH else (args.weights,)
    sources = [Checkpoint(args.checkpoint, args.trust_checkpoint, kind) for kind in kinds]
    source = sources[0]
    if args.average and source.averages is not None:
        which = f"--weights {args.weights} is" if args.weights else "schedule-free evaluates"
        raise UserError(
            f"--average is of raw weights, and {which} another average; leave it out, or give --weights raw."
        )
    model.check_layout(source.args, tp, pp)
    before = averaging.last_folders(source.folder, args.average)[1:] if args.average else []
    earlier = [Checkpoint(folder, args.trust_checkpoint, "raw") for folder in before]
    words = tokenizer_files.of_run(source.args, args.tokenizer)
    if words is None:
        raise UserError("the run has no tokenizer, and tasks are texts; give one by --tokenizer FILE.")
    folder = tokenizer_files.run_folder(source.args)
    _check_tokenizer(folder, words)
    output = args.output or (folder and folder / run_files.RESULTS)
    variants: dict[str, tuple[Any, list[Any], str]] = {
        f"{one.folder.name}{'' if one.averages is None or one.averages.leads else run_files.AVERAGED}": (
            one,
            [],
            f"-{kind}",
        )
        for one, kind in zip(sources, kinds)
    }
    if earlier:
        variants[averaging.name_of(source.folder.name, args.average)] = source, earlier, "-mean"
    every: list[Any] = []
    with ranks.world(tp, pp):
        for name, (one, others, suffix) in variants.items():
            loaded: Any = None
            asked: list[Any] = []
            with ranks.together() as first:
                if first:
                    import_harness()
                    for path in filter(None, (output, args.items)):
                        make_folder(path.parent)  # what cannot be written is said before the work
                        if path.is_dir():
                            raise UserError(f"{path} is a folder; name a file for what is written.")
                    if output:
                        results.read(output)
                    if args.loss_on:
                        length = getattr(source.args, "seq_length", None) or source.args.max_position_embeddings
                        asked = averaging.sequences(args.loss_on, length, args.loss_samples, words.vocab_size)
                    loaded = tasks.load(names, args.tasks_path, args.num_fewshot)
            scorer = Scorer(model.RankModel(one, tp, pp, others), words, args.batch_size)
            if not first:
                scorer.serve()
                continue
            with scorer.serving():
                answered = run(scorer, loaded, args.limit)
                told = results.tidy(answered, args.limit) | (averaging.loss(scorer, asked) if asked else {})
            if every:
                print(f"\n{name}: averaged weights")
            print(results.table(told))
            if output:
                results.write(output, name, told)
                print(f"written to {output}")
            if args.items:
                beside = args.items.with_name(f"{args.items.stem}{suffix}{args.items.suffix}")
                results.write_items(beside if every else args.items, answered)
            every.append(answered)
    return every[0] if every else None


def import_harness() -> None:
    """Import lm-evaluation-harness, or say what brings it."""
    from megatron_opt.extras import require

    require("lm_eval")
    require("lm_eval.evaluator")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run(scorer: Any, loaded: Any, limit: int | None) -> Any:
    """The harness's results, with every item's, of tasks from `tasks.load`; on rank 0."""
    from lm_eval.evaluator import evaluate as harness

    from megatron_opt.evaluation.backend import MegatronOptLM

    with _progress(scorer):
        # of metrics that are no means the harness draws samples: a thousand tell the error well enough
        return harness(MegatronOptLM(scorer), loaded, limit=limit, bootstrap_iters=1000)


@contextlib.contextmanager
def _progress(scorer: Any) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    with tqdm(desc="requests of this rank", unit="") as bar:
        scorer.progress = bar.update
        yield


def _check_tokenizer(folder: Path | None, words: Any) -> None:
    from megatron_opt.export import tokenizer_files

    known = tokenizer_files.recorded(folder)
    if known.get("sha256") and known["sha256"] != words.sha256():
        raise UserError(
            f"the tokenizer {words.path} is not the one that the run was trained with ({known['model']}, by the digest in "
            f"{folder}); it is the tokenizer of another vocabulary."
        )
