"""What became of a run: a state machine over every event of its log, whatever their order.

A start or restart begins anew and forgets; what follows moves on from there:

  starting → running → left (a signal) | ended (completed, diverged, interrupted) | stopped (a fault, a restart may come)
                                       | refused (bad input) | failed (the launcher has given up)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STARTS = ("start", "restart")
FAULTS = ("rank_died", "error", "hang", "rollback")
FINAL = ("left", "ended", "refused", "failed")


@dataclass(frozen=True)
class Life:
    """Where a run stands; `text` is what to tell people."""

    phase: str = "unknown"
    text: str = "no such run"
    since: float = 0.0  # Unix time of the last start
    generation: int = 0  # restarts by the launcher that the last start has behind it


def follow(life: Life, event: dict[str, Any]) -> Life:
    """The state after one more event; events that say nothing of it leave it as it is."""
    name, generation = event.get("event"), int(event.get("restart") or 0)
    if name in STARTS:
        return Life("starting", "starting", float(event.get("time") or 0.0), generation)
    if name == "failed":  # the launcher's last word; why, if a rank has said so
        text = life.text if life.phase == "refused" else f"failed with exit code {event.get('code')}"
        return _to(life, "refused" if life.phase == "refused" else "failed", text)
    if name == "refused":
        return _to(life, "refused", f"refused: {event.get('reason')}")
    if name == "end":
        if signal := event.get("signal"):
            return _to(life, "left", f"left on {signal}")
        why = f": {event['reason']}" if event.get("reason") else ""
        return _to(life, "ended", f"{event.get('status')}{why}")
    if life.phase in FINAL:  # a rank that falls over while it leaves, a save that ends late
        return life
    if name == "signal":
        return _to(life, "left", f"left on {event.get('signal')}")
    if name in FAULTS and generation >= life.generation:  # not of ranks that were replaced meanwhile
        if life.phase == "stopped" and name == "error":  # others fall because one did
            return life
        return _to(life, "stopped", f"stopped: {_fault(event)}")
    if name == "save" and life.phase in ("unknown", "starting"):
        return _to(life, "running", "running")
    return life


def _to(life: Life, phase: str, text: str) -> Life:
    return Life(phase, text, life.since, life.generation)


def _fault(event: dict[str, Any]) -> str:
    name = event["event"]
    if name == "rank_died":
        return ", ".join(f"rank {rank} {how}" for rank, how in (event.get("ranks") or {}).items()) or "a rank died"
    if name == "error":
        return f"rank {event.get('rank')}: {event.get('reason')}"
    if name == "hang":
        return f"held up by rank {', '.join(map(str, event.get('guilty') or ())) or 'unknown'}"
    return f"going back to iteration {event.get('to')}"


def after(events: Iterable[dict[str, Any]]) -> Life:
    """The state after a log."""
    life = Life()
    for event in events:
        life = follow(life, event)
    return life
