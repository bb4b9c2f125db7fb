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
        if (factor := key.replace("q_", "gg_", 1)) in wanted and key.startswith("q_"):
            _assert_same_bases(found[key], wanted[key], wanted[factor], tolerance, f"{run.case.name} {key}")
            continue
        assert_same_matrices(found[key], wanted[key], tolerance, f"{run.case.name} {key}")


def _assert_same_bases(
    found: dict[str, Tensor], wanted: dict[str, Tensor], factors: dict[str, Tensor], tolerance: float, what: str
) -> None:
    """Both bases show the same factor: in its null space, and among equal eigenvalues, columns are free."""
    assert sorted(found) == sorted(wanted), what
    for name, factor in factors.items():
        size = factor.shape[1]
        gg, p, q = (x.view(-1, size, size) for x in (factor, found[name], wanted[name]))
        far = (p.mT @ gg @ p - q.mT @ gg @ q).norm() / gg.norm().clamp_min(1e-30)
        assert far <= tolerance, f"{what} {name}: the factor differs by {far:.1e} in the two bases"
