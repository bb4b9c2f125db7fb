"""SOAP-Muon, KL-SOAP and Dion against float64 transcriptions, and a peer of KL-SOAP's factors."""

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from tests.optimizers.test_muon import newton_schulz
from tests.optimizers.test_soap import (
    BASE,
    BETA1,
    BETA2,
    EPS,
    SHAMPOO,
    close,
    eigenvectors,
    gradients,
    qr_refresh,
    run,
    transcription,
)


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("mode, factor", [("shape_scaling", 1.0), ("spectral", 12**0.5)])
def test_soap_muon_is_soaps_direction_orthogonalized(authors, mode, factor):
    grads = gradients((12, 12), 20)
    more = {"variant": "authors" if authors else "study", "scale_mode": mode, "extra_scale_factor": 2.0}
    ours, _ = run(grads, dict(precondition_frequency=3, fp32_matmul_prec="high", **more), name="soap_muon")
    theirs = transcription(grads, 3, authors=authors)
    assert not ours[0].any()
    close(ours, [2 * factor * newton_schulz(u / (u.norm() + 1e-7)) for u in theirs], 1e-5)


def test_soap_muon_orthogonalizes_a_matrix_of_blocks_whole():
    grads = gradients((16, 8), 6)
    ours, _ = run(
        grads, dict(block_size=8, precondition_frequency=2, fp32_matmul_prec="high", coefficient_type="polar_express",
                    num_ns_steps=10, scale_mode="none"), name="soap_muon",
    )  # fmt: skip
    inner, _ = run(grads, dict(block_size=8, precondition_frequency=2, precondition_1d=True))
    for u, soap in zip(ours[1:], inner[1:]):
        left, _, right = torch.linalg.svd(soap, full_matrices=False)
        torch.testing.assert_close(u, left @ right, rtol=0, atol=0.02)


def test_soap_muon_leaves_vectors_to_another_rule():
    with pytest.raises(UserError, match=r"^--soap-muon-precondition-1d has no effect"):
        registry.build("soap_muon", {"precondition_1d": True})


def kl_transcription(grads, freq, sides=(0, 1), floor=1e-4, authors=False):
    """KL-SOAP on one block in float64: L and R whitened by each other through the bases at hand."""
    g = grads[0]
    m_rows, n_cols = g.shape
    factor = {0: (1 - SHAMPOO) * g @ g.T / n_cols, 1: (1 - SHAMPOO) * g.T @ g / m_rows}
    q = {s: eigenvectors(factor[s]) if s in sides else torch.eye(len(factor[s]), dtype=g.dtype) for s in (0, 1)}
    m, v, out = torch.zeros_like(g), torch.zeros_like(g), [torch.zeros_like(g)]

    def inverse(side):
        if len(sides) == 1:
            return torch.eye(len(factor[side]), dtype=g.dtype)
        values = torch.diag(q[side].T @ factor[side] @ q[side])
        return q[side] @ torch.diag(1 / values.clamp_min(floor * values.mean())) @ q[side].T

    for t, g in enumerate(grads[1:], 2):
        n = t - 1 if authors else t
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * (q[0].T @ g @ q[1]) ** 2
        u = q[0] @ ((q[0].T @ m @ q[1]) / (v.sqrt() + EPS)) @ q[1].T
        out.append(u * (1 - BETA2**n) ** 0.5 / (1 - BETA1**n))
        if n % freq == 0 and not authors:
            for s in sides:
                q[s], v = qr_refresh(factor[s], q[s], v, s)
        new = {
            0: SHAMPOO * factor[0] + (1 - SHAMPOO) * g @ inverse(1) @ g.T / n_cols,
            1: SHAMPOO * factor[1] + (1 - SHAMPOO) * g.T @ inverse(0) @ g / m_rows,
        }
        if n % freq == 0 and authors:
            for s in sides:
                q[s], v = qr_refresh(new[s], q[s], v, s)
        factor = new
    return out, factor


@pytest.mark.parametrize("freq", [1, 3, 10])
@pytest.mark.parametrize("variant", ["study", "authors"])
def test_kl_soap_is_the_papers(freq, variant):
    grads = gradients((12, 12), 40)
    ours, state = run(grads, dict(precondition_frequency=freq, variant=variant, power_shift=0.0), name="kl_soap")
    theirs, factor = kl_transcription(grads, freq, authors=variant == "authors")
    close(ours, theirs, 1e-6)
    close([state[f"gg_0_{side}"][0] for side in (0, 1)], [factor[0], factor[1]], 1e-6)
    soap, _ = run(grads, dict(precondition_frequency=freq, variant=variant))
    assert float((soap[-1] - ours[-1]).norm()) > 0.05 * float(ours[-1].norm())  # another rule


def test_kl_soap_with_one_factor_is_soap():
    """There is nothing to whiten by; a factor's scale does not turn its basis."""
    grads = gradients((8, 30), 12)
    options = dict(precondition_frequency=2, one_sided=True)
    close(run(grads, options | {"power_shift": 0.0}, name="kl_soap")[0], run(grads, options)[0], 1e-9)


def test_emerging_optimizers_advances_the_factors_alike():
    soap = pytest.importorskip("emerging_optimizers.soap.soap")
    grads = gradients((9, 9), 6)
    optimizer = registry.build("kl_soap", {**BASE, "eigenvalue_floor": 1e-8, "precondition_frequency": 100})
    info = MatrixInfo("w", (9, 9))
    state = optimizer.init_state(torch.zeros(9, 9, dtype=torch.float64), info)
    optimizer.update([grads[0].clone()], [state], 1, [info])
    theirs = [state[f"gg_0_{side}"][0].clone() for side in (0, 1)]
    for t, g in enumerate(grads[1:], 2):
        bases = [state[f"q_0_{side}"][0].clone() for side in (0, 1)]
        soap.update_kronecker_factors_kl_shampoo(theirs, g, SHAMPOO, bases, 1e-30)
        optimizer.update([g.clone()], [state], t, [info])
        close([state[f"gg_0_{side}"][0] for side in (0, 1)], theirs, 1e-9)


def dion_transcription(grads, right, mu=0.95, eps=1e-8):
    """Algorithm 1, with the compact form of the error feedback."""
    momentum, out = torch.zeros_like(grads[0]), []
    for g in grads:
        b = momentum + g
        p = torch.linalg.qr(b @ right).Q
        r = b.T @ p
        momentum = b - (1 - mu) * p @ r.T
        right = r / (r.pow(2).sum(0).sqrt() + eps)
        out.append((g.shape[0] / g.shape[1]) ** 0.5 * p @ right.T)
    return out


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_dion_is_the_papers(shape, share):
    grads, info = gradients(shape, 12), MatrixInfo("w", shape)
    optimizer = registry.build("dion", {"rank_fraction": share})
    state = optimizer.init_state(torch.zeros(shape, dtype=torch.float64), info)
    right = state["right_factor"].clone()
    assert right.shape == (shape[1], round(share * min(shape)))
    ours = [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)]
    close(ours, dion_transcription(grads, right), 1e-9)


def test_dion_at_full_rank_becomes_an_orthogonal_step():
    """A constant gradient: the power iteration arrives at its singular vectors, and the step at their product."""
    grads, info = gradients((8, 12), 1) * 60, MatrixInfo("w", (8, 12))
    optimizer = registry.build("dion", {"rank_fraction": 1.0, "scale_mode": "none"})
    state = optimizer.init_state(torch.zeros(8, 12, dtype=torch.float64), info)
    for t, g in enumerate(grads, 1):
        (u,) = optimizer.update([g.clone()], [state], t, [info])
    left, _, right = torch.linalg.svd(grads[0], full_matrices=False)
    torch.testing.assert_close(u, left @ right, rtol=0, atol=1e-3)


def test_dion_makes_no_step_of_rounding_noise():
    """Gradients of rank 2: of four columns two hold noise, and a kept right factor finds what comes later."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(16, 2, generator=generator), torch.randn(2, 16, generator=generator)
    optimizer, info = registry.build("dion", {"scale_mode": "none"}), MatrixInfo("w", (16, 16))
    state = optimizer.init_state(torch.zeros(16, 16), info)
    for t in range(1, 9):
        (u,) = optimizer.update([left @ torch.randn(2, 2, generator=generator) @ right], [state], t, [info])
    assert torch.linalg.matrix_rank(u, rtol=1e-3) == 2
    assert float(torch.linalg.vector_norm(state["right_factor"], dim=0).min()) > 0.5
    noisy = torch.randn(16, 16, generator=generator)
    for t in range(9, 12):
        (u,) = optimizer.update([noisy.clone()], [state], t, [info])
    assert torch.linalg.matrix_rank(u, rtol=1e-3) == 4


def test_dions_first_factor_is_of_the_name_alone():
    optimizer, first = registry.build("dion", {}), []
    for name in ("a", "a", "b"):
        first.append(optimizer.init_state(torch.zeros(8, 12), MatrixInfo(name, (8, 12)))["right_factor"])
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
