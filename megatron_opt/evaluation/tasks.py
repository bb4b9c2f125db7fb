"""Tasks of lm-evaluation-harness and of --tasks-path by name, with data that this machine has.

The harness reads fifteen thousand files to know its names, a minute's work; here it reads the folders that hold them.
"""

import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_opt.errors import UserError, did_you_mean
from megatron_opt.evaluation import local_data

SEED = 1234  # of the examples in few-shot contexts, as the harness has it
_NAME = re.compile(rb"(?m)^[\"']?(?:task|group)[\"']?\s*:\s*[\"']?([\w.\-]+)[\"']?\s*$")
_TAG = re.compile(rb"(?m)^[\"']?tag[\"']?\s*:\s*[\"']?([\w.\-]+)[\"']?\s*$|^\s*-\s+[\"']?([\w.\-]+)[\"']?\s*$")


def load(names: Sequence[str], folder: Path | None = None, shots: int | None = None) -> Any:
    """The harness's TaskDict of tasks, groups and tags. `folder`: --tasks-path; `shots`: --num-fewshot.

    Raises UserError for an unknown name, a task file that cannot be read, and data that are not there or malformed.
    """
    import datasets
    import lm_eval

    if folder is not None:
        _check(folder)
    random.seed(0)
    own = Path(lm_eval.__file__).parent / "tasks"
    with mock.patch.object(datasets, "load_dataset", local_data.loader(folder, datasets.load_dataset)), _quiet():
        loaded = _load(list(names), own, folder)
    for task in loaded["tasks"].values():
        configured = task.get_config("num_fewshot")
        if shots is not None and configured != 0:  # a task that says 0 means it, as in the harness
            task.set_config(key="num_fewshot", value=shots)
        elif configured is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests = _guarded(task, task.build_all_requests)
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the harness says of task files that it cannot load, it raises too."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check(folder: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise UserError(f"--tasks-path {folder} is no folder; give one of task files (YAML) or of copies of data sets.")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of the harness and of YAML, which it would pass over in silence
            raise UserError(f"the task file {path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _load(names: list[str], own: Path, folder: Path | None) -> Any:
    tops = [top.name for top in own.iterdir() if top.is_dir() and top.name[0] not in "._"]
    near = {top for top in tops for name in names if name.lower().startswith(top.lower())}
    manager = _manager([own / top for top in sorted(near)], folder)
    if not set(names) <= set(manager.all_tasks):
        where = _scan(own)
        known = set(manager.all_tasks)
        for name in names:
            if name not in known and name not in where:
                raise UserError(
                    f"--tasks: there is no task {name} in lm-evaluation-harness"
                    f"{'' if folder is None else f' or in {folder}'}.{did_you_mean(name, known | where.keys())}"
                )
        near |= {top for name in names if name not in known for top in where[name]}
        manager = _manager([own / top for top in sorted(near)], folder)
    try:
        return manager.load(names)
    except UserError:
        raise
    except KeyError as error:  # a group with members elsewhere
        lacking = error.args[0] if error.args else None  # none: a metric
        with contextlib.suppress(KeyError):
            if lacking is not None:
                return _manager([own], folder).load(names)
        raise UserError(
            f"--tasks {','.join(names)} cannot be loaded: a task names {'a metric' if lacking is None else repr(lacking)}, "
            "which is not there."
        ) from None
    except Exception as error:  # task files and their Python run code of any kind
        raise UserError(
            f"--tasks {','.join(names)} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _manager(tops: list[Path], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[*tops, *([folder] if folder else [])])


def _scan(own: Path) -> dict[str, set[str]]:
    """Name of a task, group or tag → folders of the harness whose files say it."""
    folders: dict[str, set[str]] = {}
    for path in own.rglob("*.yaml"):
        content = path.read_bytes()
        top = path.relative_to(own).parts[0]
        for match in [*_NAME.finditer(content), *(_TAG.finditer(content) if b"tag" in content else ())]:
            name = next(group for group in match.groups() if group).decode()
            folders.setdefault(name, set()).add(top)
    return folders


def _guarded(task: Any, build: Callable[..., None]) -> Callable[..., None]:
    """Building requests, where an item that lacks what the task asks of it is told; the harness counts some as wrong."""

    def checked(*args: Any, **kwargs: Any) -> None:
        name = task.config.task
        try:
            build(*args, **kwargs)
            if task.OUTPUT_TYPE == "multiple_choice":
                asked = {key: kwargs[key] for key in ("limit", "samples", "rank", "world_size") if key in kwargs}
                _check_answers(name, task, dict(task.doc_iterator(**asked)))
        except UserError:
            raise
        except Exception as error:  # of templates and of tasks' own Python
            raise UserError(
                f"the task {name}: an item is not of the form that it asks for ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); look at its data."
            ) from error

    return checked


def _check_answers(name: str, task: Any, docs: dict[int, Any]) -> None:
    for number, doc in docs.items():  # one without choices has no request
        choices = task.doc_to_choice(doc)
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for one in right if isinstance(right, list) else [right]:
            if not (one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices)):
                raise UserError(
                    f"the task {name}, item {number + 1}: the right answer {one!r} is none of its {len(choices)} choices."
                )
