"""How layers are cut into pipeline stages: evenly, by Megatron's flags for uneven cuts, or by what a layer weighs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opt.errors import UserError

REMEDY = (
    "cut them by --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, "
    "--account-for-embedding-in-pipeline-split, --account-for-loss-in-pipeline-split or --pipeline-model-parallel-layout"
)


def split_of(flags: Mapping[str, Any], layers: int, pp: int, virtual: int) -> tuple[int, ...]:
    """Layers of each virtual stage in the model's order, as Megatron cuts them; empty for an even cut."""
    if text := flags.get("pipeline-model-parallel-layout"):
        split = parse_layout(str(text))
        if len(split) != pp * virtual or sum(split) != layers:
            raise UserError(
                f"--pipeline-model-parallel-layout {text!r} has {sum(split)} layers on {len(split)} stages; the model "
                f"has {layers}, and PP {pp} × {virtual} virtual stages are {pp * virtual}."
            )
        return split
    first = flags.get("decoder-first-pipeline-num-layers")
    last = flags.get("decoder-last-pipeline-num-layers")
    embedding = bool(flags.get("account-for-embedding-in-pipeline-split"))
    loss = bool(flags.get("account-for-loss-in-pipeline-split"))
    if not (first or last or embedding or loss) or pp == 1:
        return ()
    if (first or last) and (embedding or loss):
        raise UserError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers do not go with "
            "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split; give one of the two."
        )
    if embedding or loss:
        counted = layers + embedding + loss
        if counted % (pp * virtual):
            raise UserError(
                f"{layers} layers with embedding and loss counted are {counted}, which PP {pp} × {virtual} virtual "
                "stages do not divide; change --account-for-…-in-pipeline-split."
            )
        sizes = [counted // (pp * virtual)] * (pp * virtual)
        sizes[0] -= embedding
        sizes[-1] -= loss
        return tuple(sizes)
    middle, stages = layers - (first or 0) - (last or 0), pp - bool(first) - bool(last)
    if middle < 0 or (middle % stages if stages else middle):
        raise UserError(
            f"{layers} layers less --decoder-first-pipeline-num-layers {first or 0} and "
            f"--decoder-last-pipeline-num-layers {last or 0} leave {middle}, which {stages} stages do not divide."
        )
    by_rank = [first or middle // stages] + [middle // stages if stages else 0] * (pp - 2)
    by_rank.append(last or middle // stages)
    if any(size % virtual for size in by_rank):
        raise UserError(
            f"stages of {first or by_rank[0]}, {by_rank[1] if pp > 2 else by_rank[0]} and {by_rank[-1]} layers are not "
            f"divisible by {virtual} virtual stages; change --decoder-first-pipeline-num-layers."
        )
    return tuple(size // virtual for _ in range(virtual) for size in by_rank)


def parse_layout(text: str) -> tuple[int, ...]:
    """Layers by stage of Megatron's --pipeline-model-parallel-layout, such as Et*3|(tt|)*29,m|L."""
    plain = text.replace(" ", "").replace(",", "")
    group = re.compile(r"\(([^()]*)\)\*(\d+)|\(([^()]*)\)(?!\*)|([^()*|])\*(\d+)")
    while match := group.search(plain):
        inside, times, alone, letter, repeated = match.groups()
        new = alone if alone is not None else (inside * int(times) if inside is not None else letter * int(repeated))
        if len(new) > 10_000:
            break
        plain = plain[: match.start()] + new + plain[match.end() :]
    if set(plain) - set("EtmL|") or not plain.startswith("E") or not plain.endswith("L"):
        raise UserError(f"--pipeline-model-parallel-layout {text!r} is not like Et*3|(tt|)*29m|L: E, t, m, L and |.")
    return tuple(stage.count("t") for stage in plain.split("|"))


def balanced(weights: Sequence[float], ends: tuple[float, float], parts: int) -> tuple[int, ...]:
    """Layers by part, such that the heaviest part is as light as can be; `ends` weigh on the first and last part.

    Of equal cuts the one whose parts are most alike, where filling from the end finds it.
    """

    def cut(limit: float, spread: bool = False) -> list[int] | None:
        sizes, at = [], len(weights)
        for part in reversed(range(parts)):  # from the end: what is left over falls to the first parts
            room = limit - (ends[0] if part == 0 else 0.0) - (ends[1] if part == parts - 1 else 0.0)
            size, share = 0, -(-at // (part + 1)) if spread else at
            while size < share and weights[at - 1] <= room + 1e-12 * limit:
                room -= weights[at - 1]
                at, size = at - 1, size + 1
            sizes.append(size)
        return sizes[::-1] if at == 0 else None

    low, high = max(*weights, *ends), sum(weights) + sum(ends)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle) is not None else (middle, high)
    lightest = cut(high, spread=True) or cut(high)
    assert lightest is not None
    return tuple(lightest)


def split_flags(split: Sequence[int], pp: int, virtual: int) -> str:
    """Megatron's flags of a cut; empty for an even one."""
    if not split or len(set(split)) == 1:
        return ""
    middle = set(split[1:-1])
    if len(middle) == 1:
        each = middle.pop()
        if virtual == 1:
            words = [f"--decoder-first-pipeline-num-layers {split[0]}"] if split[0] != each else []
            words += [f"--decoder-last-pipeline-num-layers {split[-1]}"] if split[-1] != each else []
            if split[0] and split[-1]:
                return " ".join(words)
        if (each - split[0], each - split[-1]) in ((1, 0), (0, 1), (1, 1)):
            words = ["--account-for-embedding-in-pipeline-split"] if split[0] < each else []
            words += ["--account-for-loss-in-pipeline-split"] if split[-1] < each else []
            return " ".join(words)
    stages = ["t" * size for size in split]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
    return f"--pipeline-model-parallel-layout {_short(stages)}"


def _short(stages: list[str]) -> str:
    """Runs of equal stages as (tt|)*29."""
    parts, at = [], 0
    while at < len(stages):
        run = 1
        while at + run < len(stages) - 1 and stages[at + run] == stages[at]:
            run += 1
        body = re.sub(r"t{2,}", lambda run_of_t: f"t*{len(run_of_t.group())}", stages[at]) if run == 1 else stages[at]
        last = at + run == len(stages)
        parts.append(body + ("" if last else "|") if run == 1 else f"({body}|)*{run}")
        at += run
    return "".join(parts)
