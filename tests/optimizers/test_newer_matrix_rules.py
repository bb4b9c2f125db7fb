"""SOAP-Muon, KL-SOAP, KL-Shampoo and the Dions against float64 transcriptions, and a peer of KL-SOAP's factors."""

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


def kl_shampoo_transcription(grads, freq, sides=(0, 1), floor=1e-4, authors=False):
    """Factors from √mean(g²)·I on, each of the gradient whitened by the other; momentum over the roots of both."""
    g = grads[0]
    rows, columns = g.shape
    level = g.square().mean() ** (1 / len(sides))
    one = {0: torch.eye(rows, dtype=g.dtype), 1: torch.eye(columns, dtype=g.dtype)}
    factor, q = {s: level * one[s] for s in sides}, {0: one[0], 1: one[1]}
    q |= {s: eigenvectors(g @ g.T if s == 0 else g.T @ g) for s in sides}
    m, out = torch.zeros_like(g), [torch.zeros_like(g)]

    def power(side, p):
        if side not in sides:
            return one[side]
        values = torch.diag(q[side].T @ factor[side] @ q[side])
        return q[side] @ torch.diag(values.clamp_min(floor * values.mean()) ** p) @ q[side].T

    def refreshed(factors):
        return {s: qr_refresh(factors[s], q[s], m, s)[0] if s in sides else q[s] for s in (0, 1)}

    for t, g in enumerate(grads[1:], 2):
        n = t - 1 if authors else t
        m = BETA1 * m + (1 - BETA1) * g
        out.append(power(0, -0.5) @ m @ power(1, -0.5) / (1 - BETA1**n))
        if n % freq == 0 and not authors:
            q = refreshed(factor)
        whole = len(sides) == 2
        new = {
            0: (g @ power(1, -1) @ g.T if whole else g @ g.T) / columns,
            1: (g.T @ power(0, -1) @ g if whole else g.T @ g) / rows,
        }
        factor = {s: SHAMPOO * factor[s] + (1 - SHAMPOO) * new[s] for s in sides}
        if n % freq == 0 and authors:
            q = refreshed(factor)
    return out


KL_SHAMPOO = {"beta1": BETA1, "shampoo_beta": SHAMPOO, "power_shift": 0.0}


def stepped(name, options, grads):
    """Directions and the state, without SOAP's options."""
    info = MatrixInfo("w", tuple(grads[0].shape))
    optimizer = registry.build(name, options)
    state = optimizer.init_state(torch.zeros_like(grads[0]), info)
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)], state


@pytest.mark.parametrize("freq", [1, 3, 10])
@pytest.mark.parametrize("variant", ["study", "authors"])
@pytest.mark.parametrize("shape, sides", [((12, 12), (0, 1)), ((9, 14), (0,))])
def test_kl_shampoo_is_the_papers(freq, variant, shape, sides):
    grads = gradients(shape, 40)
    options = dict(precondition_frequency=freq, variant=variant, one_sided=len(sides) == 1, **KL_SHAMPOO)
    ours, _ = stepped("kl_shampoo", options, grads)
    close(ours, kl_shampoo_transcription(grads, freq, sides, authors=variant == "authors"), 1e-6)


def test_kl_shampoo_does_not_know_the_gradients_scale():
    """From the first step on, and in the long run as well: steps of one size, about that of SOAP's."""
    grads = gradients((12, 16), 30)
    once, _ = stepped("kl_shampoo", dict(precondition_frequency=2, **KL_SHAMPOO), grads)
    small, _ = stepped("kl_shampoo", dict(precondition_frequency=2, **KL_SHAMPOO), [2.0**-13 * g for g in grads])
    close(small, once, 1e-6)
    assert all(0.1 < float(u.square().mean().sqrt()) < 1.5 for u in once[1:])


def test_emerging_optimizers_advances_kl_shampoos_factors_alike():
    soap = pytest.importorskip("emerging_optimizers.soap.soap")
    grads = gradients((9, 9), 6)
    optimizer = registry.build("kl_shampoo", KL_SHAMPOO | {"eigenvalue_floor": 1e-8, "precondition_frequency": 100})
    info = MatrixInfo("w", (9, 9))
    state = optimizer.init_state(torch.zeros(9, 9, dtype=torch.float64), info)
    optimizer.update([grads[0].clone()], [state], 1, [info])
    theirs = [state[f"gg_0_{side}"][0].clone() for side in (0, 1)]
    for t, g in enumerate(grads[1:], 2):
        bases = [state[f"q_0_{side}"][0].clone() for side in (0, 1)]
        soap.update_kronecker_factors_kl_shampoo(theirs, g, SHAMPOO, bases, 1e-30)
        optimizer.update([g.clone()], [state], t, [info])
        close([state[f"gg_0_{side}"][0] for side in (0, 1)], theirs, 1e-9)


def dion2_transcription(grads, fraction, mu=0.95, rows_alone=False, beta2=0.95):
    """The authors' code on a whole matrix; with `rows_alone` Dion3's normalization by row."""
    rows, columns = grads[0].shape
    by_rows = rows_alone or rows <= columns
    momentum, second, out = torch.zeros_like(grads[0]), torch.zeros(rows, 1, dtype=grads[0].dtype), []
    for g in grads:
        momentum = momentum + g
        sizes = momentum.abs().sum(1 if by_rows else 0)
        count = -(-len(sizes) * fraction // 1)
        kept = sizes.argsort(descending=True)[: int(count)]
        part = momentum[kept] if by_rows else momentum[:, kept]
        left, _, right = torch.linalg.svd(part, full_matrices=False)
        x = left @ right
        if rows_alone:
            second[kept] = beta2 * second[kept] + (1 - beta2) * x.square().mean(1, keepdim=True)
            scaled = x / (second[kept].sqrt() + 1e-8)
            x = scaled * x.norm() / scaled.norm()
        u = torch.zeros_like(g)
        if by_rows:
            u[kept], momentum[kept] = x, mu * momentum[kept]
        else:
            u[:, kept], momentum[:, kept] = x, mu * momentum[:, kept]
        out.append((rows / columns) ** 0.5 * u)
    return out, momentum


@pytest.mark.parametrize("name", ["dion2", "dion3"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_dion2_and_dion3_are_the_authors(name, shape, fraction):
    grads = gradients(shape, 15)
    options = dict(fraction=fraction, fp32_matmul_prec="high", coefficient_type="polar_express", num_ns_steps=30)
    ours, state = stepped(name, options, grads)
    theirs, momentum = dion2_transcription(grads, fraction, rows_alone=name == "dion3")
    close(ours, theirs, 1e-6)
    close([state["momentum_buffer"]], [momentum], 1e-12)


def test_what_dion2_leaves_out_comes_later():
    """A row with a small gradient waits until it has grown: within 200 steps every row has moved."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 12, generator=generator) * torch.logspace(0, -0.3, 8)[:, None]
    ours, _ = stepped("dion2", {}, [base] * 200)
    assert all(int((u.abs().sum(1) > 0).sum()) == 2 for u in ours)
    assert torch.stack(ours).abs().sum((0, 2)).min() > 0


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
