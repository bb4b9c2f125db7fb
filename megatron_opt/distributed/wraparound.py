"""Jobs packed into ranks that are filled one after another to the mean, and cut only where a rank is full (McNaughton 1959).

Balancing load alone, jobs are taken in their order. To balance bytes of state too, they are lined up by bytes per load, and
a rank takes from the heavy end until filling it from the light end gives it the mean of both.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from megatron_opt.distributed.jobs import Job, Run

FINE = 64  # shards are multiples of about this part of a rank's load or state


class _Cursor:
    """How far a job is packed."""

    def __init__(self, job: Job, level: float, state_level: float, fine: int) -> None:
        self.job, self.at, self.runs = job, 0, list[Run]()
        self.depth, self.units = job.depth, job.units
        self.weights = [job.weigh(tile) for tile in range(self.units // self.depth)]
        total = sum(w.load * self.depth + w.first_load for w in self.weights)
        state = sum(w.state * self.depth + w.first_state for w in self.weights)
        self.ratio = state / total
        grain = 1 << max(0, self.depth.bit_length() - 10)  # shards of whole tiles of memory
        self.step = max(1, int(self.units / fine * min(level / total, state_level / (state or 1.0))) // grain) * grain
        self._look()

    def _look(self) -> None:
        """Measure what is next."""
        self.done = self.at == self.units
        if self.done:
            return
        tile, offset = divmod(self.at, self.depth)
        weight = self.weights[tile]
        self.count = min(self.step, self.depth - offset)
        self.load, self.state = weight.load * self.count, weight.state * self.count
        if not offset:
            self.load, self.state = self.load + weight.first_load, self.state + weight.first_state

    def take(self, rank: int) -> None:
        """Give what is next to a rank."""
        start = self.at
        if self.runs and self.runs[-1][0] == rank:
            start = self.runs.pop()[1]
        self.at += self.count
        self.runs.append((rank, start, self.at))
        self._look()


class _Line:
    """Jobs in a line, of which the first or the last is next."""

    def __init__(self, cursors: Sequence[_Cursor], both: bool) -> None:
        self.waiting, self.both = deque(cursors), both
        self.first: _Cursor | None = None
        self.last: _Cursor | None = None
        self.advance()

    def advance(self) -> None:
        """Replace jobs that are done; at the end both are the same one."""
        if self.first is None or self.first.done:
            single = self.last if self.last and not self.last.done else None
            self.first = self.waiting.popleft() if self.waiting else single
        if not self.both:
            self.last = self.first
        elif self.last is None or self.last.done:
            self.last = self.waiting.pop() if self.waiting else self.first


def level_of(loads: Sequence[float], more: float) -> float:
    """The level to which ranks must be filled to take `more` among them; fuller ranks stay as they are."""
    ordered = sorted(loads)
    for count, below in zip(range(len(ordered), 0, -1), list(accumulate(ordered))[::-1], strict=True):
        level = (more + below) / count
        if level >= ordered[count - 1]:
            return level
    return ordered[0]


def pack_wraparound(
    jobs: Sequence[Job], loads: Sequence[float], states: Sequence[float], both: bool, fine: int = FINE
) -> dict[str, list[Run]]:
    """Runs by job; `loads` and `states` are what ranks have already, `both` says whether state is to be balanced too."""
    total = sum(job.load for job in jobs)
    total_state = sum(job.cost.state_bytes for job in jobs)
    cursors = [_Cursor(job, total / len(loads), total_state / len(loads), fine) for job in jobs]
    if both:
        cursors.sort(key=lambda cursor: (-cursor.ratio, -cursor.job.load, cursor.job.matrix))
    level = level_of(loads, total)
    state_level = level_of(states, total_state)
    line, lack, lack_state = _Line(cursors, both), 0.0, 0.0
    for rank, (load, state) in enumerate(zip(loads, states, strict=True)):
        lack += max(0.0, level - load)
        lack_state += max(0.0, state_level - state)
        while taken := _choose(line, lack, lack_state, rank + 1 == len(loads)):
            lack -= taken.load
            lack_state -= taken.state
            taken.take(rank)
            line.advance()
    return {cursor.job.matrix: cursor.runs for cursor in cursors}


def _choose(line: _Line, lack: float, lack_state: float, is_last: bool) -> _Cursor | None:
    """The end from which a rank that lacks so much takes next; None where it is full."""
    first, last = line.first, line.last
    if first is None or last is None:
        return None
    if is_last:
        return first
    # what filling the rank's load from the light end would leave of its state, and what the heavy end adds to that
    left, more = lack_state - lack * last.ratio, first.state - first.load * last.ratio
    wanted, other = (first, last) if left > more / 2 else (last, first)
    if wanted.load / 2 <= lack:
        return wanted
    return other if other.load / 2 <= lack and other.state / 2 <= lack_state else None
