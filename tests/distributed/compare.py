"""How two runs are compared."""

from torch import Tensor

from tests.distributed.pool import Run


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
    """Weights and every tensor of state as the reference has them."""
    assert_same_matrices(run.weights, reference.weights, tolerance, f"{run.case.name} weights")
    found, wanted = run.state, reference.state
    assert sorted(found) == sorted(wanted)
    for key in wanted:
        assert_same_matrices(found[key], wanted[key], tolerance, f"{run.case.name} {key}")
