"""Shampoo against a float64 transcription; roots by either method; grafting's length."""

import pytest
import torch

from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

BETA1, BETA2, SHAMPOO, EPS = 0.9, 0.95, 0.8, 1e-12


def run(grads, **options):
    graft = {} if options.get("grafting") == "none" else dict(graft_beta2=BETA2, graft_eps=EPS)
    options = dict(beta1=BETA1, shampoo_beta=SHAMPOO) | graft | options
    info = MatrixInfo("w", tuple(grads[0].shape))
    optimizer = registry.build("shampoo", options)
    state = optimizer.init_state(torch.zeros_like(grads[0]), info)
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)]


def power(a, exponent, damping):
    values, vectors = torch.linalg.eigh(a)
    return vectors @ torch.diag((values.clamp_min(0) + damping * values.max()) ** exponent) @ vectors.T


@pytest.mark.parametrize("shape, sides", [((7, 7), (0, 1)), ((5, 9), (0, 1)), ((5, 9), (0,))])
@pytest.mark.parametrize("grafting", ["adam", "none"])
@pytest.mark.parametrize("freq", [1, 4])
def test_is_the_papers(shape, sides, grafting, freq):
    torch.manual_seed(0)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(30)]
    ours = run(grads, grafting=grafting, precondition_frequency=freq, damping=1e-4, one_sided=len(sides) == 1)
    left, right = torch.zeros(shape[0], shape[0]).double(), torch.zeros(shape[1], shape[1]).double()
    m, v = torch.zeros(shape).double(), torch.zeros(shape).double()
    for t, (g, u) in enumerate(zip(grads, ours), 1):
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        left, right = SHAMPOO * left + (1 - SHAMPOO) * g @ g.T, SHAMPOO * right + (1 - SHAMPOO) * g.T @ g
        if t == 1 or t % freq == 0:
            p = [power(a / (1 - SHAMPOO**t), -0.5 / len(sides), 1e-4) for a in (left, right)]
        expected = m / (1 - BETA1**t)
        adam = expected / ((v / (1 - BETA2**t)).sqrt() + EPS)
        expected = p[0] @ expected @ p[1] if len(sides) == 2 else p[0] @ expected
        if grafting == "adam":
            expected = expected * adam.norm() / expected.norm()
        torch.testing.assert_close(u, expected, rtol=1e-7, atol=1e-9)


def test_newton_trains_like_eigh():
    torch.manual_seed(0)
    grads = [torch.randn(12, 12) for _ in range(20)]
    a, b = (run(grads, root=root, damping=1e-3, precondition_frequency=2) for root in ("eigh", "newton"))
    # eigh damps by the largest eigenvalue, Newton by the Frobenius norm
    assert all(float((x * y).sum() / x.norm() / y.norm()) > 0.98 for x, y in zip(a, b))


def test_whitens_a_diagonal():
    g = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    (u,) = run([g], grafting="none", damping=1e-12)
    torch.testing.assert_close(u, torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
