"""`study speedrun`: steps to a target loss of the runs of a protocol, beside published ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_opt import run_files, yaml_files
from megatron_opt.errors import UserError
from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.fits.steps_to_target import Attained, steps_to_target

HEADER = ["optimizer", "steps", "mean loss", "runs", "(target − mean)·√runs", "mean at target", "source"]


def main(argv: list[str], prog: str) -> int:
    """Print the table; a setup without runs is left open."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("protocol", type=Path, help="YAML with target, margin, setups and published results")
    parser.add_argument("runs", type=Path, help="folder of runs, SETUP/SEED/metrics.jsonl")
    options = parser.parse_args(argv)
    protocol = read_protocol(options.protocol)
    rows = published_rows(protocol) + own_rows(protocol, options.runs)
    title = f"{protocol['name']}: steps to {protocol['target']}, margin {protocol['margin']}"
    print_table(make_console(), HEADER, rows, title)
    return 0


def read_protocol(path: Path) -> dict[str, Any]:
    """A protocol file; raises UserError where it lacks what the table needs."""
    try:
        content = yaml_files.load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({why}); name a protocol file.") from error
    kinds = {"name": str, "target": int | float, "margin": int | float, "setups": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{path} has no {key}, or not as examples/speedrun/track3.yaml has it; add it.")
    return dict(content)


def published_rows(protocol: Mapping[str, Any]) -> list[list[str]]:
    """Results of others, by the same rule."""
    return [
        _row(one["optimizer"], one["steps"], one["loss"], one["runs"], protocol["target"], "–", one["source"])
        for one in protocol.get("published") or ()
    ]


def own_rows(protocol: Mapping[str, Any], runs: Path) -> list[list[str]]:
    """One row for each setup of the protocol."""
    rows = []
    for name in protocol["setups"]:
        curves = curves_of(runs / name)
        if not curves:
            rows.append([name, *["–"] * (len(HEADER) - 2), "not run"])
            continue
        found = steps_to_target(curves, protocol["target"], protocol["margin"])
        at = "–" if found.crossing is None else f"step {found.crossing:.0f}"
        rows.append(_row(name, found.steps, found.loss, found.runs, protocol["target"], at, _said(found)))
    return rows


def curves_of(folder: Path) -> list[list[tuple[int, float]]]:
    """(step, validation loss) of each run below a setup's folder."""
    found = (run_files.evaluations(run_files.metrics(path)) for path in sorted(folder.glob("*/metrics.jsonl")))
    return [[(int(row["iteration"]), float(row["loss"])) for row in rows] for rows in found if rows]


def _said(found: Attained) -> str:
    spread = f"σ of a run {found.spread:.4f}" if found.runs > 1 else "one run"
    return spread if found.steps is not None else f"not reached; {spread}"


def _row(name: str, steps: int | None, loss: float, runs: int, target: float, at: str, source: str) -> list[str]:
    evidence = (target - loss) * runs**0.5
    return [name, "–" if steps is None else str(steps), f"{loss:.4f}", str(runs), f"{evidence:.4f}", at, source]
