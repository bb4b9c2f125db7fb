"""Kron against a float64 transcription of the study's rule and a peer; its schedule; its factors' fixed point."""

import math

import pytest
import torch

from megatron_opt.kernels import preconditioner
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.kron import UpdateSchedule

BETA, LR = 0.9, 0.2
DAMPING = math.sqrt(torch.finfo(torch.float32).eps)


def gradients(shape, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [(0.5 * mean + torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype) for _ in range(count)]


def run(grads, **options):
    options = {
        "beta1": BETA,
        "preconditioner_lr": LR,
        "update_flat_start": 0,
        "update_probability": 1.0,
        **options,
    }
    info = MatrixInfo("w", tuple(grads[0].shape))
    optimizer = registry.build("kron", options)
    state = optimizer.init_state(torch.zeros_like(grads[0]), info)
    out = [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)]
    return out, state, optimizer, info


def lower_bound(a):
    most = a.abs().max()
    a = a / most
    x = a[:, a.pow(2).sum(0).argmax()] @ a
    return most * ((x / x.norm()) @ a.T).norm()


def transcription(grads, optimizer, info, due=lambda t: True, normalize=True, scale=1.0, clip=1.1, balance=0):
    """Triangular PSGD on one block in float64."""
    m, n = grads[0].shape
    q0, q1 = (
        math.sqrt(scale) * torch.eye(m, dtype=torch.float64),
        math.sqrt(scale) * torch.eye(n, dtype=torch.float64),
    )
    mu, out, updates = torch.zeros(m, n, dtype=torch.float64), [], 0
    for t, g in enumerate(grads, 1):
        if normalize:
            g = g / (g.norm() + 1e-16)
        mu = BETA * mu + (1 - BETA) * g
        h = mu / (1 - BETA**t)
        if due(t):
            updates += 1
            if balance and updates % balance == 0:
                a, b = q0.abs().max(), q1.abs().max()
                q0, q1 = q0 * (a * b).sqrt() / a, q1 * (a * b).sqrt() / b
            v = optimizer.noise(info, t, h)
            damped = h + DAMPING * h.abs().mean() * v
            a = q0 @ damped @ q1.T
            b = torch.linalg.inv(q0).T @ v @ torch.linalg.inv(q1)
            s0, s1, d0, d1 = a @ a.T + b @ b.T, a.T @ a + b.T @ b, a @ a.T - b @ b.T, a.T @ a - b.T @ b
            q0, q1 = (
                q0 - LR / lower_bound(s0) * torch.triu(d0) @ q0,
                q1 - LR / lower_bound(s1) * torch.triu(d1) @ q1,
            )
        u = q0.T @ q0 @ h @ q1.T @ q1
        out.append(u / max(1.0, float(u.pow(2).mean().sqrt()) / clip))
    return out


def close(ours, theirs, tolerance):
    for t, (a, b) in enumerate(zip(ours, theirs), 1):
        assert float((a - b).norm()) <= tolerance * float(b.norm()), t


@pytest.mark.parametrize("shape", [(10, 10), (6, 14), (14, 6)])
@pytest.mark.parametrize("normalize", [True, False])
def test_triangular_is_the_papers(shape, normalize):
    grads = gradients(shape, 50)
    ours, _, optimizer, info = run(grads, normalize_grads=normalize, preconditioner_init_scale=2.0, balance_every=7)
    close(ours, transcription(grads, optimizer, info, normalize=normalize, scale=2.0, balance=7), 1e-8)


def test_schedule_decides_which_steps_update():
    grads = gradients((5, 7), 40)
    ours, _, optimizer, info = run(grads, update_probability=0.3, update_flat_start=-0)
    schedule = UpdateSchedule(0.3, 0)
    optimizer.schedule = UpdateSchedule(0.3, 0)
    close(ours, transcription(grads, optimizer, info, due=schedule), 1e-8)


def test_schedule():
    """Every step at first, then ever fewer, down to the final share; equal however it is asked."""
    schedule = UpdateSchedule(0.1, 500)
    numbers = [schedule(step) for step in range(1, 8001)]
    assert numbers[:500] == list(range(1, 501))
    late = [number > 0 for number in numbers[5000:]]
    assert sum(late) == 300
    assert UpdateSchedule(0.1, 500)(7777) == numbers[7776]
    middle = sum(number > 0 for number in numbers[500:2500])  # ∑ exp(−0.001·k) with whole waits in between
    assert 600 < middle < 900


def test_uneven_blocks_are_blocks():
    grads = gradients((11, 13), 6)
    ours, _, optimizer, info = run(grads, block_size=8, normalize_grads=False, max_update_rms=0.0)
    damping = []  # the whole matrix's mean enters each block
    mu = torch.zeros(11, 13, dtype=torch.float64)
    for t, g in enumerate(grads, 1):
        mu = BETA * mu + (1 - BETA) * g
        damping.append((mu / (1 - BETA**t)).abs().mean())
    for rows in (slice(0, 8), slice(8, 11)):
        for columns in (slice(0, 8), slice(8, 13)):
            m = torch.zeros(11, 13, dtype=torch.float64)
            q = {
                0: torch.eye(rows.stop - rows.start).double()[None],
                1: torch.eye(columns.stop - columns.start).double()[None],
            }
            for t, g in enumerate(grads, 1):
                m = BETA * m + (1 - BETA) * g
                h = m / (1 - BETA**t)
                v = optimizer.noise(info, t, h)
                block = (h + DAMPING * damping[t - 1] * v)[rows, columns][None]
                preconditioner.triangular_update(q, block, v[rows, columns][None], LR)
                expected = preconditioner.precondition(h[rows, columns][None], q)[0]
                torch.testing.assert_close(ours[t - 1][rows, columns], expected, rtol=1e-9, atol=1e-12)


def test_vectors_and_long_sides_have_diagonal_factors():
    _, state, *_ = run(gradients((40,), 3))
    assert state["q_0_0"].shape == (1, 40)
    _, state, *_ = run(gradients((40, 6), 3), max_size_triangular=20, block_size=4)
    assert state["q_0_0"].shape == (1, 40) and state["q_0_1"].shape == (1, 4, 4) and state["q_1_1"].shape == (1, 2, 2)


def test_equals_kron_torch_over_50_steps(monkeypatch):
    """The peer starts its schedule at 0, preconditions the damped momentum (by 3e-4 of it) and draws its noise."""
    peer = pytest.importorskip("kron_torch.kron")
    grads = gradients((8, 8), 50)
    _, _, optimizer, info = run(grads[:1])
    parameter = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    step = [0]

    def draw(like):
        return optimizer.noise(info, step[0], like)

    theirs = peer.Kron(
        [parameter],
        lr=1.0,
        b1=BETA,
        preconditioner_update_probability=1.0,
        precond_lr=LR,
        precond_dtype=torch.float64,
    )
    theirs.rng.random = lambda: 1.0
    monkeypatch.setattr(peer.torch, "randn_like", draw)
    ours, *_ = run(grads, normalize_grads=False)
    weight = torch.zeros(8, 8, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):
        for g, u in zip(grads, ours):
            step[0] += 1
            parameter.grad = g.clone()
            theirs.step()
            weight = weight - u
    assert float((weight - parameter.detach()).norm() / weight.norm()) < 1e-3


@pytest.mark.parametrize("form", ["triangular", "procrustes"])
def test_factors_whiten(form):
    """On gradients of one distribution P·g tends to unit covariance on both sides."""
    torch.manual_seed(0)
    left, right = (
        torch.linspace(0.3, 3, 6, dtype=torch.float64),
        torch.linspace(0.5, 2, 9, dtype=torch.float64),
    )
    mix = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    grads = [mix @ (left[:, None] * torch.randn(6, 9, dtype=torch.float64) * right) for _ in range(1500)]
    _, state, *_ = run(grads, update_form=form, beta1=0.0, normalize_grads=False, preconditioner_lr=0.05)
    factors = {side: state[f"q_0_{side}"] for side in (0, 1)}
    samples = torch.stack([preconditioner.precondition(g[None], factors)[0] for g in grads[-500:]])
    raw = torch.stack(grads[-500:])

    def spread(x):
        values = torch.linalg.eigvalsh(torch.einsum("bij,bkj->ik", x, x))
        return float(values.max() / values.min())

    assert spread(raw) > 50 and spread(samples) < 4
    if form == "procrustes":
        q = state["q_0_0"][0]
        assert float((q - q.T).norm() / q.norm()) < 0.05


def test_zero_gradients_leave_the_factors():
    zero = torch.zeros(4, 4)
    out, state, *_ = run([zero] * 600)
    assert not out[-1].any() and torch.equal(state["q_0_0"][0], torch.eye(4))


@pytest.mark.parametrize("form", ["triangular", "procrustes"])
def test_on_a_gpu_zeros_teach_nothing_and_nobody_waits(form):
    """The path of a GPU, on tensors that pretend to be there: the CPU's numbers, and no read of a value."""
    from megatron_opt.platform.pretended_gpu import cpu, gpu, pretended_gpu

    torch.manual_seed(0)
    infos = [MatrixInfo("a", (8, 12)), MatrixInfo("zero", (8, 12)), MatrixInfo("v", (5,))]
    weights = [torch.randn(info.shape) for info in infos]
    steps = [[torch.randn(info.shape) * (info.name != "zero") for info in infos] for _ in range(4)]
    found = []
    for place in (torch.clone, lambda x: gpu(x.clone())):
        optimizer = registry.build("kron", {"update_form": form})
        with pretended_gpu() as count:
            states = [optimizer.init_state(place(weight), info) for weight, info in zip(weights, infos)]
            first = {key: cpu(value).clone() for key, value in states[1].items()}
            count.waits.clear()
            for number, grads in enumerate(steps, 1):
                moved = optimizer.update([place(grad) for grad in grads], states, number, infos)
            assert not count.waits
            assert all(torch.equal(cpu(value), first[key]) for key, value in states[1].items())
            found.append([cpu(x).clone() for x in (*moved, *(x for state in states for x in state.values()))])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
