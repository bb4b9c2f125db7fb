"""Which samples a step has seen: ids for checking that a restart neither loses nor repeats one (`--log-samples`)."""

import json
import time
from pathlib import Path
from typing import Any

KEY = "sample_id"


class Numbered:
    """A dataset whose samples tell their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], KEY: int(index)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


def log(args: Any, ids: list[int]) -> None:
    """Append a microbatch to this rank's file."""
    if args.output_dir:
        entry = {"time": time.time(), "iteration": args.curr_iteration + 1, "ids": ids}
        with (Path(args.output_dir) / f"samples-{args.rank}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def consumed(folder: Path, resumed: list[tuple[float, int]]) -> dict[int, list[int]]:
    """Ids by iteration over all ranks; what followed a checkpoint that was `resumed` (time, iteration) later is void."""
    ids: dict[int, list[int]] = {}
    for path in sorted(Path(folder).glob("samples-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if not any(entry["time"] < when and entry["iteration"] > iteration for when, iteration in resumed):
                ids.setdefault(entry["iteration"], []).extend(entry["ids"])
    return ids
