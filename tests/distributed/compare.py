"""How two runs are compared."""

import torch
from torch import Tensor

from megatron_opt.kernels.projection import rotate
from megatron_opt.optimizers.blocks import Grid
from tests.distributed import recording
from tests.distributed.pool import Run

State = dict[str, dict[str, Tensor]]  # kind, matrix

_SETTLED = 1e-5  # 1 - cos of the angle between a column of one basis and that of the other


def assert_same_curve(run: Run, reference: Run, tolerance: float = 1e-5, steps: int = 20) -> None:
    """Per-step losses and gradient norms within a relative tolerance."""
    assert len(run.losses) == len(reference.losses) == steps
    for what in ("losses", "grad_norms"):
        pairs = list(zip(getattr(run, what), getattr(reference, what), strict=True))
        worst = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]) / abs(pairs[i][1]))
        a, b = pairs[worst]
        assert abs(a - b) <= tolerance * abs(b), f"{run.case.name}, {what}, step {worst + 1}: {a!r} and {b!r}"


def assert_same_matrices(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, what: str = "") -> None:
    """The same matrices, each within a tolerance relative to its norm."""
    assert sorted(found) == sorted(wanted), what
    for name, value in wanted.items():
        assert found[name].shape == value.shape, (what, name)
        far = (found[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert far <= tolerance, f"{what} {name}: off by {far:.1e}"


def assert_same_state(run: Run, reference: Run, tolerance: float = 1e-4) -> None:
    """Weights and every tensor of state as the reference has them; ten times the tolerance after a tie (`ties`)."""
    found, wanted = run.state, reference.state
    assert sorted(found) == sorted(wanted)
    tolerance *= 10 if ties(found, wanted) else 1
    assert_same_matrices(run.weights, reference.weights, tolerance, f"{run.case.name} weights")
    rotated = _matrices_with_bases(wanted)
    for key in wanted:
        if (factor := key.replace("q_", "gg_", 1)) in wanted and key.startswith("q_"):
            _assert_same_bases(found[key], wanted[key], wanted[factor], tolerance, f"{run.case.name} {key}")
            continue
        apart = rotated if key in ("exp_avg", "exp_avg_sq") else set()
        parts = [{name: x for name, x in state[key].items() if name not in apart} for state in (found, wanted)]
        assert_same_matrices(*parts, tolerance, f"{run.case.name} {key}")
    for name in rotated:
        _assert_same_moments(run, found, wanted, name, tolerance)


def ties(found: State, wanted: State) -> list[str]:
    """Matrices where a column of a basis is another one than the reference's.

    A refresh sorts columns by estimated eigenvalues before it orthonormalizes them. Where two of these are equal to
    rounding, two layouts may sort them either way; the bases then differ in the plane of the two, and so do steps.
    """
    named = []
    for key in wanted:
        if key.startswith("q_"):
            for name, factor in wanted[key.replace("q_", "gg_", 1)].items():
                size = factor.shape[1]
                gg, p, q = (x.view(-1, size, size) for x in (factor, found[key][name], wanted[key][name]))
                values = (q * (gg @ q)).sum(-2)
                seen = values > 1e-6 * values.amax(-1, keepdim=True)  # no null space
                named += [name] if bool((_free(p, q) & seen).any()) else []
    return named


def _matrices_with_bases(state: State) -> set[str]:
    """Matrices whose moments lie in an eigenbasis of their own."""
    named = {name for key, several in state.items() if key.startswith("q_") for name in several}
    return named & set(state.get("exp_avg", {})) & set(state.get("exp_avg_sq", {}))


def _assert_same_moments(run: Run, found: State, wanted: State, name: str, tolerance: float) -> None:
    """Momentum turned back is the same; second moments are so where both bases have one column."""
    shape = wanted["exp_avg"][name].shape
    sides = [side for side in (0, 1) if name in wanted.get(f"q_0_{side}", {})]
    block = next(
        (int(size) for flag, size in zip(run.case.flags, run.case.flags[1:]) if flag.endswith("-block-size")), 512
    )
    grid = Grid.of(shape, [block if side in sides else shape[side] for side in (0, 1)])
    cut = {key: [grid.cut(state[key][name]) for state in (found, wanted)] for key in ("exp_avg", "exp_avg_sq")}
    for region, (count, *sizes) in enumerate(grid.shapes()):
        turned, seconds = [], [stacks[region].clone() for stacks in cut["exp_avg_sq"]]
        bases = [
            [
                state[f"q_{region}_{side}"][name].view(count, sizes[side], sizes[side]) if side in sides else None
                for side in (0, 1)
            ]
            for state in (found, wanted)
        ]
        for (left, right), stacks in zip(bases, cut["exp_avg"]):
            turned.append(rotate(stacks[region], left, right, back=True))
        assert_same_matrices({name: turned[0]}, {name: turned[1]}, tolerance, f"{run.case.name} exp_avg")
        for side in sides:
            free = _free(bases[0][side], bases[1][side])
            for second in seconds:
                second.masked_fill_(free.unsqueeze(-1 if side == 0 else -2), 0.0)
        assert_same_matrices({name: seconds[0]}, {name: seconds[1]}, tolerance, f"{run.case.name} exp_avg_sq")


def _free(p: Tensor, q: Tensor) -> Tensor:
    """Columns (count, size) in which two stacks of bases differ."""
    return (p * q).sum(-2) < 1 - _SETTLED


def _assert_same_bases(
    found: dict[str, Tensor], wanted: dict[str, Tensor], factors: dict[str, Tensor], tolerance: float, what: str
) -> None:
    """Both bases show the same factor: in its null space, and among equal eigenvalues, columns are free."""
    assert sorted(found) == sorted(wanted), what
    for name, factor in factors.items():
        size = factor.shape[1]
        gg, p, q = (x.view(-1, size, size) for x in (factor, found[name], wanted[name]))
        shown = [basis.mT @ gg @ basis for basis in (p, q)]
        far = (shown[0] - shown[1]).norm() / gg.norm().clamp_min(1e-30)
        if far > tolerance:  # two columns sorted either way
            free = _free(p, q)
            assert free.double().mean() <= 0.25, f"{what} {name}: the bases differ in {int(free.sum())} columns"
            far = (shown[0] - shown[1]).masked_fill(free.unsqueeze(-1) | free.unsqueeze(-2), 0.0).norm() / gg.norm()
        assert far <= tolerance, f"{what} {name}: the factor differs by {far:.1e} in the two bases"


def assert_moved(saved: Run, loaded: Run) -> None:
    """Weights and state as they were after a load are, bit for bit, those that the stopped run ended with."""
    pairs = [("weights", saved.weights, [block for rank in loaded.ranks for block in rank["loaded_weights"]])]
    assert saved.state
    for key, wanted in saved.state.items():
        pairs.append((key, wanted, [block for rank in loaded.ranks for block in rank["loaded_state"].get(key, [])]))
    for what, wanted, blocks in pairs:
        found = recording.whole(blocks)
        assert sorted(found) == sorted(wanted), what
        assert all(torch.equal(found[matrix], value) for matrix, value in wanted.items()), what
