"""One table: every matrix rule × shapes × dtypes × what must hold of any optimizer."""

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer, StateKind, norm_of
from megatron_opt.optimizers.narrow import is_narrow
from tests.optimizers.slicing import step_together

# name of the case -> (rule, options); whatever a rule can be switched to has a line
CASES = {
    "muon": ("muon", {}),
    "muon-fp32": ("muon", dict(fp32_matmul_prec="high")),
    "muon-bf16-momentum": ("muon", dict(momentum_dtype="bf16", momentum_form="ema")),
    "muon-int8-momentum": ("muon", dict(momentum_dtype="int8")),
    "muon-normuon": ("muon", dict(normuon=True)),
    "scion": ("scion", {}),
    "soap": ("soap", dict(precondition_frequency=2)),
    "soap-blocks": ("soap", dict(block_size=8, precondition_frequency=2, stagger=True)),
    "soap-one-sided": ("soap", dict(one_sided=True, precondition_frequency=2, block_size=16)),
    "soap-authors": ("soap", dict(variant="authors", precondition_frequency=2, max_precond_dim=40)),
    "soap-bf16": ("soap", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="bf16")),
    "soap-blocks-bf16": ("soap", dict(block_size=8, precondition_frequency=2, factor_precision="bf16")),
    "soap-one-sided-bf16": (
        "soap",
        dict(one_sided=True, precondition_frequency=2, block_size=16, factor_precision="bf16", moment_dtype="bf16"),
    ),
    "soap-int8": ("soap", dict(precondition_frequency=2, moment_dtype="int8")),
    "kron": ("kron", dict(update_probability=1.0, preconditioner_lr=0.1)),
    "kron-bf16": ("kron", dict(update_probability=1.0, factor_precision="bf16", moment_dtype="bf16")),
    "kron-int8": ("kron", dict(update_probability=1.0, moment_dtype="int8", factor_precision="bf16")),
    "shampoo-bf16": ("shampoo", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="bf16")),
    "kl_soap-bf16": ("kl_soap", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="bf16")),
    "soap_muon-int8": ("soap_muon", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="int8")),
    "dion-bf16": ("dion", dict(moment_dtype="bf16")),
    "soap_h-bf16": ("soap_h", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="bf16")),
    "kron-blocks": ("kron", dict(update_probability=1.0, block_size=8, max_size_triangular=100)),
    "kron-procrustes": ("kron", dict(update_probability=1.0, update_form="procrustes", block_size=16)),
    "shampoo": ("shampoo", dict(precondition_frequency=2)),
    "shampoo-blocks": (
        "shampoo",
        dict(precondition_frequency=3, block_size=8, grafting="none", damping=1e-3),
    ),
    "adam_mini": ("adam_mini", {}),
    "muon_h": ("muon_h", {}),
    "scion_h": ("scion_h", dict(fp32_matmul_prec="high")),
    "soap_h": ("soap_h", dict(precondition_frequency=2)),
    "soap_h-blocks": ("soap_h", dict(precondition_frequency=2, block_size=8)),
    "soap_h-one-sided": ("soap_h", dict(precondition_frequency=2, one_sided=True)),
    "muon-normuon-fp32": ("muon", dict(normuon=True, fp32_matmul_prec="high")),
    "kron_h": ("kron_h", dict(update_probability=1.0)),
    "shampoo_h": ("shampoo_h", dict(precondition_frequency=2)),
    "adam_h": ("adam_h", {}),
    "nadamw_h": ("nadamw_h", {}),
    "cautious_h": ("cautious_h", {}),
    "lion_h": ("lion_h", {}),
    "signum_h": ("signum_h", {}),
    "ademamix_h": ("ademamix_h", {}),
    "adopt_h": ("adopt_h", {}),
    "kl_soap": ("kl_soap", dict(precondition_frequency=2)),
    "kl_soap-blocks": ("kl_soap", dict(precondition_frequency=2, block_size=8, variant="authors")),
    "kl_shampoo": ("kl_shampoo", dict(precondition_frequency=2)),
    "kl_shampoo-blocks": ("kl_shampoo", dict(precondition_frequency=2, block_size=8, variant="authors")),
    "kl_shampoo-one-sided": ("kl_shampoo", dict(precondition_frequency=2, one_sided=True)),
    "kl_shampoo-int8": ("kl_shampoo", dict(precondition_frequency=2, factor_precision="bf16", moment_dtype="int8")),
    "kl_shampoo_h": ("kl_shampoo_h", dict(precondition_frequency=2)),
    "kl_soap_h": ("kl_soap_h", dict(precondition_frequency=2)),
    "soap_muon": ("soap_muon", dict(precondition_frequency=2, fp32_matmul_prec="high")),
    "soap_muon-blocks": ("soap_muon", dict(precondition_frequency=2, block_size=8)),
    "soap_muon_h": ("soap_muon_h", dict(precondition_frequency=2)),
    "dion": ("dion", {}),
    "dion-full": ("dion", dict(rank_fraction=1.0)),
    "dion2": ("dion2", dict(fraction=0.5, fp32_matmul_prec="high")),
    "dion2-full": ("dion2", dict(fraction=1.0)),
    "dion2-bf16": ("dion2", dict(fraction=0.5, moment_dtype="bf16", fp32_matmul_prec="high")),
    "dion3": ("dion3", dict(fraction=0.5, fp32_matmul_prec="high")),
    "dion3-int8": ("dion3", dict(fraction=0.5, moment_dtype="int8", fp32_matmul_prec="high")),
    "dion2_h": ("dion2_h", dict(fp32_matmul_prec="high")),
    "dion3_h": ("dion3_h", dict(fp32_matmul_prec="high")),
    "dion_h": ("dion_h", {}),
}
SHAPES = {
    "tall": (32, 12),
    "wide": (12, 32),
    "square": (16, 16),
    "vector": (24,),
    "vocabulary": (300, 16),
    "one": (1, 1),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def build(case, **more):
    name, options = CASES[case]
    return registry.build(name, options | more)


def info_of(shape, index=0):
    return MatrixInfo(f"layers.{index}.weight", shape, heads=4 if shape[0] % 4 == 0 else 1, role="k")


def gradients(shape, count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, dtype=torch.float64, generator=generator)
    draws = [mean + torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [draw.to(dtype) for draw in draws]


def accepted(optimizer, shape):
    """Skip what the rule refuses (and see that it does so with a sentence)."""
    info = info_of(shape)
    if len(shape) == 1 and not optimizer.vectors:
        with pytest.raises(UserError, match="route it"):
            optimizer.init_state(torch.ones(shape), info)
        pytest.skip("matrices only")
    return info


def steps(optimizer, state, grads, info, start=1):
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, start)]


table = pytest.mark.parametrize("case", list(CASES))
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


def test_every_matrix_rule_is_in_the_table():
    known = {name for name, cls in registry.optimizers().items() if issubclass(cls, MatrixOptimizer)}
    assert known == {name for name, _ in CASES.values()}


@table
@shapes
@dtypes
def test_directions_are_finite_of_the_right_kind_and_repeatable(case, shape, dtype):
    optimizer = build(case)
    info = accepted(optimizer, shape)
    weight = torch.ones(shape, dtype=dtype)
    grads = gradients(shape, 5, dtype)
    runs = []
    for _ in range(2):
        state = optimizer.init_state(weight.clone(), info)
        runs.append(steps(optimizer, state, grads, info))
    for first, second in zip(*runs):
        assert first.shape == shape and first.dtype == dtype and first.isfinite().all()
        assert first.is_contiguous() and torch.equal(first, second)
    assert runs[0][-1].any()


@table
@shapes
def test_state_is_what_its_specification_says(case, shape):
    optimizer = build(case)
    info = accepted(optimizer, shape)
    state, spec = optimizer.init_state(torch.ones(shape), info), optimizer.state_spec(info)
    assert set(state) == set(spec)
    for key, tensor in state.items():
        match spec[key]:
            case StateKind.MATRIX:
                assert tensor.shape == shape
            case StateKind.ROWS:
                assert tensor.shape[0] == tensor.numel() == shape[0]
            case StateKind.BLOCKS:
                assert tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2]
            case StateKind.NORM | StateKind.FLAG:
                assert tensor.shape == (1,)
    partition = optimizer.partition(info)
    if partition and partition.shard_dim is not None:
        assert set(partition.init_shard(torch.ones(shape))) <= set(spec)
        assert set(partition.init_shared(torch.device("cpu"))) <= set(spec)


@table
@shapes
def test_resume_is_bit_for_bit(case, shape):
    optimizer = build(case)
    info = accepted(optimizer, shape)
    grads = gradients(shape, 7, torch.float32)
    state = optimizer.init_state(torch.ones(shape), info)
    steps(optimizer, state, grads[:4], info)
    saved = {key: value.clone() for key, value in state.items()}
    expected = steps(optimizer, state, grads[4:], info, 5)
    resumed = steps(build(case), saved, grads[4:], info, 5)
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed))
    assert set(saved) == set(state) and all(torch.equal(saved[key], state[key]) for key in state)


@table
@shapes
@dtypes
def test_zero_gradients_give_zeros_first_and_finite_numbers_later(case, shape, dtype):
    optimizer = build(case)
    info = accepted(optimizer, shape)
    zero = torch.zeros(shape, dtype=dtype)
    state = optimizer.init_state(torch.ones(shape, dtype=dtype), info)
    for u in steps(optimizer, state, [zero, zero, zero], info):
        assert not u.any()
    later = steps(optimizer, state, [*gradients(shape, 3, dtype), zero, zero], info, 4)
    assert all(u.isfinite().all() for u in later) and all(value.isfinite().all() for value in state.values())


@table
def test_many_matrices_at_once_are_each_alone(case):
    """Batches of equal shapes, mixed with others, change nothing but rounding."""
    optimizer = build(case)
    some = [(12, 8), (8, 12), (12, 8), (8, 8), (30, 4), (12, 8), (8, 8)]
    infos = [info_of(shape, index) for index, shape in enumerate(some)]
    grads = [gradients(shape, 6, torch.float64, seed=index) for index, shape in enumerate(some)]
    weights = [torch.ones(shape, dtype=torch.float64) for shape in some]
    together = [optimizer.init_state(weight, info) for weight, info in zip(weights, infos)]
    alone = copy.deepcopy(together)
    tolerance = 0.05 if getattr(optimizer.config, "fp32_matmul_prec", "high") == "medium" else 1e-9
    for t in range(6):
        all_at_once = optimizer.update([g[t].clone() for g in grads], together, t + 1, infos)
        for index, info in enumerate(infos):
            (one,) = optimizer.update([grads[index][t].clone()], [alone[index]], t + 1, [info])
            assert float((one - all_at_once[index]).norm()) <= tolerance * float(one.norm()) + 1e-12


def join_norms(optimizer, states, weights, info):
    """What the caller does with the states of parts before the first step."""
    for norm in optimizer.keys(StateKind.NORM, info):
        for state, weight in zip(states, weights):
            state[norm] = norm_of(weight)
        whole = torch.stack([state[norm].double().square() for state in states]).sum(0).sqrt()
        for state in states:
            state[norm].copy_(whole)
            optimizer.check_state(state, info)


def to_norm(optimizer, direction, state):
    """What the caller does with the direction of a matrix in parts."""
    return (
        direction * optimizer.projection(direction.double().square().sum(), state).to(direction)
        if optimizer.projects
        else direction
    )


@table
@shapes
@dtypes
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_slices_equal_the_whole(case, shape, dtype, pieces):
    optimizer = build(case)
    info = accepted(optimizer, shape)
    partition = optimizer.partition(info)
    dim = partition and partition.shard_dim
    if dim is None or shape[dim] < pieces:
        pytest.skip("this rule needs this matrix whole")
    edges = tuple(shape[dim] * i // pieces for i in range(pieces + 1))
    cut = functools.partial(torch.split, split_size_or_sections=[b - a for a, b in itertools.pairwise(edges)], dim=dim)
    weight = gradients(shape, 1, dtype, seed=3)[0]
    whole = optimizer.init_state(weight.clone(), info)
    slices = [partition.init_shard(part.clone()) for part in cut(weight)]
    join_norms(optimizer, slices, cut(weight), info)
    shared = partition.init_shared(weight.device, dtype)
    assert set(whole) == {key for held in slices for key in held} | set(shared)
    exact, narrow = getattr(optimizer.config, "fp32_matmul_prec", "high") == "high", is_narrow(optimizer)
    tolerance = (1e-9 if dtype == torch.float64 else 1e-4) if exact else 0.05
    tolerance = 1e-2 if narrow else tolerance  # a number between two of bf16's falls either way
    for t, g in enumerate(gradients(shape, 6, dtype), 1):
        (expected,) = optimizer.update([g.clone()], [whole], t, [info])
        parts = [part.clone() for part in cut(g)]
        found = torch.cat(step_together(partition, parts, slices, shared, t, edges), dim)
        assert (
            float((to_norm(optimizer, found, slices[0]) - expected).norm())
            <= tolerance * float(expected.norm()) + 1e-12
        ), t
    for key, value in whole.items():
        kind = optimizer.state_spec(info)[key]
        if kind in (StateKind.NORM, StateKind.FLAG) or (kind is StateKind.ROWS and dim == 1):
            joined = slices[0][key]
            assert all(torch.equal(joined, state[key]) for state in slices)
        else:
            joined = shared[key] if key in shared else torch.cat([state[key] for state in slices], dim)
        assert joined.shape == value.shape
        difference = float((joined.double() - value.double()).norm())
        near = (
            1e-2 if narrow else 1e-4 if exact or kind is not StateKind.ROWS else tolerance
        )  # rows are of the iteration's results
        assert difference <= near * float(value.double().norm()) + 1e-12, key


@table
@shapes
@dtypes
def test_cells_equal_the_whole(case, shape, dtype):
    """The first column of tiles, and the others of every row together, each stepped as a matrix of its own."""
    optimizer = build(case)
    info = accepted(optimizer, shape)
    rows, columns = (*shape, 1)[:2]
    partition = optimizer.partition(info)
    height, width = (partition and partition.tile) or (rows, columns)
    if (height, width) == (rows, columns):
        pytest.skip("this rule needs this matrix whole")
    areas = [(0, rows, 0, width)] if width < columns else []
    areas += [(top, min(rows, top + height), width % columns, columns) for top in range(0, rows, height)]
    whole = optimizer.init_state(torch.ones(shape, dtype=dtype), info)
    infos = [replace(info, shape=(r1 - r0, c1 - c0)[: len(shape)]) for r0, r1, c0, c1 in areas]
    weights = [torch.ones(each.shape, dtype=dtype) for each in infos]
    cells = [partition.optimizer.init_state(weight, each) for weight, each in zip(weights, infos)]
    join_norms(optimizer, cells, weights, info)
    for t, g in enumerate(gradients(shape, 6, dtype), 1):
        (expected,) = optimizer.update([g.clone()], [whole], t, [info])
        given = [
            g.view(rows, columns)[r0:r1, c0:c1].reshape(each.shape) for (r0, r1, c0, c1), each in zip(areas, infos)
        ]
        found = torch.full_like(g, torch.nan).view(rows, columns)
        for (r0, r1, c0, c1), u in zip(areas, partition.optimizer.update(given, cells, t, infos)):
            found[r0:r1, c0:c1] = u.view(r1 - r0, c1 - c0)
        assert (
            float((to_norm(optimizer, found, cells[0]).view(shape) - expected).norm())
            <= 1e-5 * float(expected.norm()) + 1e-12
        ), t
    joined = {key: torch.full_like(value, torch.nan) for key, value in whole.items()}
    for (r0, r1, c0, c1), held in zip(areas, cells):
        places = partition.block_positions((r0, c0), (r1 - r0, c1 - c0))
        for key, value in held.items():
            if value.dim() == 3:
                of, numbers, count = places[key]
                assert count == len(whole[of])
                joined[of][numbers] = value
            elif value.numel() == 1 and optimizer.state_spec(info)[key] in (StateKind.FLAG, StateKind.NORM):
                joined[key] = value
            else:
                joined[key].view(rows, columns)[r0:r1, c0:c1] = value.view(r1 - r0, c1 - c0)
    for key, value in whole.items():
        assert float((joined[key].double() - value.double()).norm()) <= 1e-5 * float(value.double().norm()) + 1e-12, key
    assert sum(optimizer.cost(each).mean_flops() for each in infos) == pytest.approx(optimizer.cost(info).mean_flops())


@table
def test_converges_on_a_quadratic(case):
    """½‖A(W − W*)‖² with condition 100 and noisy gradients: below 1% of the start after 300 steps of decaying size."""
    optimizer = build(case)
    if optimizer.projects:
        pytest.skip("weights on a sphere: see test_hyperball.py")
    torch.manual_seed(0)
    target, weight = torch.randn(16, 12), torch.zeros(16, 12)
    scale = torch.logspace(0, -1, 16)[:, None]
    info = info_of((16, 12))
    state = optimizer.init_state(weight, info)
    start = float((scale * (weight - target)).square().sum())
    for t in range(1, 301):
        grad = scale**2 * (weight - target) + 0.05 * torch.randn(16, 12)
        weight = weight - 0.1 * (1 - t / 301) * optimizer.update([grad], [state], t, [info])[0]
    assert float((scale * (weight - target)).square().sum()) < 0.01 * start


@table
@shapes
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_cost_counts_what_runs(case, shape, kernels, monkeypatch):
    """State bytes are the tensors'; matrix-product FLOPs are the counter's over a refresh period.

    Of the reference torch itself counts the products; native operations count as the formulas registered for them.
    """
    monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
    optimizer = build(case)
    info = accepted(optimizer, shape)
    state = optimizer.init_state(torch.ones(shape), info)
    cost = optimizer.cost(info)
    assert cost.state_bytes == sum(value.numel() * value.element_size() for value in state.values())
    grads = gradients(
        shape, 12, torch.float32, seed=2
    )  # noise amid a factor's columns would be mended by more products
    steps(optimizer, state, grads[:4], info)
    period = int(cost.refresh_every)
    products = {
        torch.ops.aten.baddbmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2],
        torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        steps(optimizer, state, grads[4 : 4 + period], info, 5)
    gemm = sum(value for key, value in cost.flops.items() if "gemm" in key) * period
    gemm += sum(value for key, value in cost.refresh.items() if "gemm" in key)
    assert counter.get_total_flops() == pytest.approx(gemm, rel=1e-6)
