"""SOAP against a float64 transcription of the study's rule, a peer, and what the first basis must hold."""

import pytest
import torch

from megatron_opt.kernels import dispatch, projection
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

BETA1, BETA2, SHAMPOO, EPS = 0.9, 0.95, 0.9, 1e-12
BASE = dict(beta1=BETA1, beta2=BETA2, shampoo_beta=SHAMPOO, eps=EPS, floor=0.0)  # the study's rule


def gradients(shape, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [(0.5 * mean + torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype) for _ in range(count)]


def run(grads, options, name="soap", shape=None):
    info = MatrixInfo("w", tuple(shape or grads[0].shape))
    optimizer = registry.build(name, {**BASE, **options})
    state = optimizer.init_state(torch.zeros_like(grads[0]), info)
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)], state


def eigenvectors(a):
    return torch.linalg.eigh(a)[1].flip(1)


def qr_refresh(a, q, v, side):
    order = torch.argsort(torch.diag(q.T @ a @ q), descending=True)
    v = v[order] if side == 0 else v[:, order]
    return torch.linalg.qr(a @ q[:, order])[0], v


def transcription(grads, freq, sides=(0, 1), authors=False, floor=0.0):
    """The rule on one block in float64; bases by eigh, then QR, with no care for rank."""
    g = grads[0]
    gg = {0: (1 - SHAMPOO) * g @ g.T, 1: (1 - SHAMPOO) * g.T @ g}
    q = {s: eigenvectors(gg[s]) if s in sides else torch.eye(len(gg[s]), dtype=g.dtype) for s in (0, 1)}
    m, v, out = torch.zeros_like(g), torch.zeros_like(g), [torch.zeros_like(g)]
    for t, g in enumerate(grads[1:], 2):
        n = t - 1 if authors else t
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * (q[0].T @ g @ q[1]) ** 2
        root = v.sqrt().clamp_min(floor * v.mean().sqrt())
        u = q[0] @ ((q[0].T @ m @ q[1]) / (root + EPS)) @ q[1].T
        out.append(u * (1 - BETA2**n) ** 0.5 / (1 - BETA1**n))
        new = {0: SHAMPOO * gg[0] + (1 - SHAMPOO) * g @ g.T, 1: SHAMPOO * gg[1] + (1 - SHAMPOO) * g.T @ g}
        if n % freq == 0:
            for s in sides:
                q[s], v = qr_refresh((new if authors else gg)[s], q[s], v, s)
        gg = new
    return out


def close(ours, theirs, tolerance):
    for t, (a, b) in enumerate(zip(ours, theirs), 1):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-30), t


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["study", "authors"])
def test_lists_of_native_kernels_are_stepped_as_stacks_are(variant, floor, monkeypatch):
    """The way of a processor with AVX-512, its kernels' references in their place: whole matrices, one in two blocks.

    Shifted powers, without which rounding in a null space turns a basis, on some processors by more than is allowed here.
    """
    shapes = [(12, 20), (12, 20), (24, 20)]
    grads = [[g.float() for g in gradients(shape, 9, seed)] for seed, shape in enumerate(shapes)]
    infos = [MatrixInfo(f"w{i}", shape) for i, shape in enumerate(shapes)]
    optimizer = registry.build(
        "soap",
        {
            **BASE,
            "variant": variant,
            "floor": floor,
            "precondition_frequency": 3,
            "block_size": 20,
            "power_shift": 1e-3,
        },
    )

    def steps():
        states = [optimizer.init_state(torch.zeros(shape), info) for shape, info in zip(shapes, infos)]
        out = [optimizer.update([g[t].clone() for g in grads], states, t + 1, infos) for t in range(9)]
        return [u for several in out for u in several]

    stacked = steps()
    taken = []
    monkeypatch.setattr(projection, "taken", lambda *lists: taken.append(1) or True)
    monkeypatch.setattr(dispatch.Operation, "__call__", lambda self, device, *rest: self.reference(*rest))
    listed = steps()
    assert taken
    for ours, theirs in zip(listed, stacked):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freq", [1, 3, 10])
@pytest.mark.parametrize("variant, floor", [("study", 0.0), ("authors", 0.0), ("study", 0.7), ("authors", 0.7)])
def test_square_is_the_papers(freq, variant, floor):
    grads = gradients((12, 12), 50)
    ours, _ = run(grads, dict(precondition_frequency=freq, variant=variant, floor=floor))
    close(ours, transcription(grads, freq, authors=variant == "authors", floor=floor), 1e-6)


def test_the_floor_keeps_noise_in_a_null_space_small():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(16, 3, generator=generator), torch.randn(3, 16, generator=generator)
    grads = [left @ torch.randn(3, 3, generator=generator) @ right for _ in range(12)]
    noises = [1e-7 * torch.randn(16, 16, generator=generator) for _ in grads]
    outside = torch.eye(16) - left @ torch.linalg.pinv(left)  # what no gradient reaches

    def norms(floor):
        directions, _ = run([g + e for g, e in zip(grads, noises)], dict(floor=floor, precondition_frequency=5))
        return [float((outside @ u).norm()) for u in directions[1:]]

    assert max(norms(0.0)) > 0.5  # whole updates, made of noise
    assert max(norms(0.01)) < 1e-3  # ‖noise‖ over the floor: 16·1e-7/0.01


@pytest.mark.parametrize("shape, side", [((8, 30), 0), ((30, 8), 1)])
def test_short_side_alone_is_the_papers(shape, side):
    grads = gradients(shape, 50)
    expected = transcription(grads, 2, sides=(side,))
    close(run(grads, dict(precondition_frequency=2, one_sided=True))[0], expected, 1e-6)
    close(run(grads, dict(precondition_frequency=2, max_precond_dim=30))[0], expected, 1e-6)


def test_blocks_are_the_papers():
    grads = gradients((24, 16), 30)
    ours, _ = run(grads, dict(block_size=8, precondition_frequency=2))
    for i in range(0, 24, 8):
        for j in range(0, 16, 8):
            block = transcription([g[i : i + 8, j : j + 8] for g in grads], 2)
            close([u[i : i + 8, j : j + 8] for u in ours], block, 1e-6)


def test_uneven_blocks_are_blocks():
    grads = gradients((11, 13), 8)
    ours, _ = run(grads, dict(block_size=8, precondition_frequency=3))
    for rows in (slice(0, 8), slice(8, 11)):
        for columns in (slice(0, 8), slice(8, 13)):
            alone, _ = run([g[rows, columns] for g in grads], dict(precondition_frequency=3))
            close([u[rows, columns] for u in ours], alone, 1e-9)


def test_no_side_is_adam():
    grads = gradients((6, 9), 20)
    ours, _ = run(grads, dict(max_precond_dim=1))
    m = v = torch.zeros(6, 9, dtype=torch.float64)
    for t, (g, u) in enumerate(zip(grads, ours), 1):
        if t > 1:
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        expected = m / (v.sqrt() + EPS) * (1 - BETA2**t) ** 0.5 / (1 - BETA1**t)
        torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-12)


def test_authors_variant_equals_a_peer_over_50_steps():
    peer = pytest.importorskip("pytorch_optimizer")
    grads = gradients((12, 12), 51, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(12, 12, dtype=torch.float64))
    theirs = peer.SOAP(
        [parameter], lr=1.0, betas=(BETA1, BETA2), shampoo_beta=SHAMPOO, eps=EPS, precondition_frequency=4,
        weight_decay=0.0, normalize_gradient=False, correct_bias=True,
    )  # fmt: skip
    ours, _ = run(grads, dict(precondition_frequency=4, variant="authors"))
    weight = torch.zeros(12, 12, dtype=torch.float64)
    for g, u in zip(grads, ours):
        parameter.grad = g.clone()
        theirs.step()
        weight = weight - u
    assert float((weight - parameter.detach()).norm() / weight.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (12, 12), (64, 64), (64, 256), (96,)])
@pytest.mark.parametrize("freq", [1, 5, 10])
def test_last_bit_differences_stay_small(shape, freq):
    """Two fp32 computations of the same gradients stay together: nothing depends on how a null space was rounded."""
    grads = gradients(shape, 20, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    others = [g * (1 + 6e-8 * torch.randn(g.shape, generator=generator)) for g in grads]
    # fp32 factors lose small eigenvectors where they are refreshed often: see factor_precision
    options = dict(precondition_frequency=freq, factor_precision="fp64" if freq < 10 else "fp32")
    (ours, state), (theirs, other) = run(grads, options), run(others, options)
    close(theirs, ours, 1e-4)
    for key in state:
        assert float((state[key] - other[key]).norm()) <= 1e-4 * float(state[key].norm()) + 1e-12, key


def test_first_step_moves_nothing_and_a_late_start_is_a_start():
    grads = gradients((6, 6), 3)
    ours, state = run(grads[:1], {})
    assert not ours[0].any() and state["ready"].item() == 1 and not state["exp_avg"].any()
    optimizer, info = registry.build("soap", BASE), MatrixInfo("w", (6, 6))
    state = optimizer.init_state(torch.zeros(6, 6, dtype=torch.float64), info)
    assert not optimizer.update([grads[0]], [state], 7, [info])[0].any()
    assert optimizer.update([grads[1]], [state], 8, [info])[0].any()


def test_bases_stay_orthogonal_over_1000_steps():
    generator = torch.Generator().manual_seed(0)
    optimizer = registry.build("soap", dict(precondition_frequency=1, block_size=24))
    info = MatrixInfo("w", (40, 24))
    state = optimizer.init_state(torch.zeros(40, 24), info)
    scale = torch.logspace(0, -3, 24)
    for t in range(1, 1001):
        optimizer.update([torch.randn(40, 24, generator=generator) * scale], [state], t, [info])
    bases = [q for key, q in state.items() if key.startswith("q_")]
    assert len(bases) == 4  # of both sides of two blocks
    for q in bases:
        assert float((q.mT @ q - torch.eye(q.shape[-1])).abs().max()) < 1e-5, q.shape


def test_stagger_spreads_refreshes():
    optimizer = registry.build("soap", dict(stagger=True, precondition_frequency=10))
    infos = [MatrixInfo(f"layers.{i}.w", (4, 4)) for i in range(200)]
    due = [sum(optimizer.is_due(info, step) for info in infos) for step in range(10, 20)]
    assert sum(due) == 200 and max(due) < 40
    assert all(sum(optimizer.is_due(info, step) for step in range(30, 40)) == 1 for info in infos)


def test_adaptive_refresh_skips_what_did_not_turn():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    steady = [u * torch.randn(16, generator=generator) * torch.linspace(4, 1, 16) @ u.T for _ in range(30)]
    turned = [torch.randn(16, 16, generator=generator) for _ in range(30)]
    for grads, moves in ((steady, False), (turned, True)):
        optimizer = registry.build("soap", dict(adaptive_tol=0.2, precondition_frequency=1, shampoo_beta=0.5))
        info = MatrixInfo("w", (16, 16))
        state = optimizer.init_state(torch.zeros(16, 16), info)
        optimizer.update([grads[0]], [state], 1, [info])
        start = state["q_0_0"].clone()
        for t, g in enumerate(grads[1:], 2):
            optimizer.update([g.clone()], [state], t, [info])
        assert (not torch.equal(start, state["q_0_0"])) is moves


def test_failed_decomposition_keeps_the_old_basis_and_is_counted(monkeypatch, caplog):
    from megatron_opt.kernels import eigenbasis

    grads = gradients((5, 5), 3, dtype=torch.float32)
    optimizer, info = registry.build("soap", dict(precondition_frequency=1)), MatrixInfo("layer.w", (5, 5))
    state = optimizer.init_state(torch.zeros(5, 5), info)
    optimizer.update([grads[0]], [state], 1, [info])
    start = state["q_0_0"].clone()
    calls = []

    def fails(factor, basis, rank, shift, doubts=None):
        calls.append(factor.dtype)
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(eigenbasis, "power_step", fails)
    monkeypatch.setattr(eigenbasis, "refresh_bases", lambda *arguments: torch.zeros(1, dtype=torch.bool))
    assert optimizer.update([grads[1].clone()], [state], 2, [info])[0].isfinite().all()
    assert torch.equal(state["q_0_0"], start) and optimizer.failures["layer.w"] == 2
    assert calls[:2] == [torch.float32, torch.float64] and "layer.w" in caplog.text


def test_what_a_decomposition_doubts_or_fails_at_is_mended_block_by_block():
    """Attempts of many batches in one question; noise before another column, a block of NaN, one that fails in fp64 too."""
    from megatron_opt.kernels import eigenbasis
    from megatron_opt.optimizers.decomposition import decompose_or_keep
    from megatron_opt.optimizers.flag_coroutines import answered, joined

    draw = torch.Generator().manual_seed(0)
    sound = torch.randn(3, 6, 6, generator=draw, dtype=torch.float64)
    scattered = sound.clone()
    scattered[1, :, 2] = scattered[1, :, 0]  # noise, and sound columns behind it
    broken = scattered.float()
    broken[2, 0, 0] = torch.nan
    batches, keep = (sound, scattered, broken), torch.eye(6).repeat(3, 1, 1)
    doubts = []
    wrong = eigenbasis.complete(scattered, doubts=doubts)
    assert bool(doubts[0]) and not torch.allclose(wrong, eigenbasis.complete(scattered))
    questions = []

    def asked():
        run = joined([decompose_or_keep(eigenbasis.complete, (x,), keep=(keep.to(x.dtype),)) for x in batches])
        values = None
        while True:
            try:
                values = yield run.send(values)
            except StopIteration as stopped:
                return stopped.value
            questions.append(values)

    found = answered(asked())
    assert len(questions) == 1  # one wait
    for ((basis,), failed), x, fails in zip(found, batches, ([], [], [2])):
        whole = [block for block in range(3) if block not in fails]
        assert failed == fails and basis.dtype == x.dtype
        assert torch.equal(basis[whole], eigenbasis.complete(x[whole]))
        assert torch.equal(basis[fails], keep[fails].to(x.dtype))
