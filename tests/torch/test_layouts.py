"""DDP, FSDP2 and DTensor layouts against one process: same losses, weights and state."""

from typing import Any

import pytest
import torch

from megatron_opt.torch import EngineOptions
from tests.torch import cases, ranks

STEPS = 6
LAYOUTS = ("fsdp", "ddp", "columns")
SHARDED = ("muon", "fsdp", STEPS, {"engine": EngineOptions(matrix_mode="sharded")})
ALL = [(case, layout, STEPS, {}) for case in cases.RULES for layout in LAYOUTS] + [SHARDED]


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    """What one process gets, by rule."""
    found = {}
    for case in cases.RULES:
        model = cases.make_model()
        optimizer = cases.make_optimizer(model, case)
        losses = cases.train(model, optimizer, 0, STEPS)
        found[case] = {
            "losses": losses,
            "weights": cases.weights_of(model),
            "state": cases.whole_state(optimizer),
            "norm": optimizer.grad_norm,
            "grads": {name: param.grad for name, param in model.named_parameters()},
        }
    return found


@pytest.fixture(scope="module")
def two() -> dict[Any, list[dict[str, Any]]]:
    """What each of two ranks gets, by rule, layout and whether matrices are cut."""
    found = ranks.run(cases.repeat_all, 2, ALL)
    return {(work[0], work[1], bool(work[3])): [found[0][i], found[1][i]] for i, work in enumerate(ALL)}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=tolerance)
    for what in ("weights", "state", "grads"):
        assert set(found[what]) == set(wanted[what])
        for key, value in wanted[what].items():
            difference = torch.linalg.vector_norm(found[what][key].double() - value.double())
            assert float(difference) <= tolerance * float(torch.linalg.vector_norm(value.double())) + 1e-12, (what, key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.RULES)
def test_two_ranks_repeat_one_process(one: Any, two: Any, case: str, layout: str) -> None:
    for found in two[case, layout, False]:
        assert_same(found, one[case], 1e-6)


def test_matrices_cut_over_ranks_repeat_one_process(one: Any, two: Any) -> None:
    """Products of cut matrices are summed in another order; weights and losses agree, and gradients stay the user's."""
    for found in two["muon", "fsdp", True]:
        assert_same(found, one["muon"], 1e-5)


def test_ddp_computes_each_matrix_once_and_repeats_one_process_on_whole_batches(one: Any) -> None:
    found = ranks.run(cases.split_batches, 2, "muon", STEPS)
    mean = [(a + b) / 2 for a, b in zip(found[0]["losses"], found[1]["losses"])]
    assert mean == pytest.approx(one["muon"]["losses"], rel=1e-5)
    mine, other = (set(rank["computed"]) for rank in found)
    assert mine and other and not mine & other and mine | other == cases.HIDDEN
    assert all(len(rank["computed"]) == STEPS * len(set(rank["computed"])) for rank in found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "ddp"])
def test_four_ranks_repeat_one_process(one: Any, layout: str) -> None:
    for rank in ranks.run(cases.repeat_all, 4, [(case, layout, STEPS, {}) for case in cases.RULES]):
        for case, found in zip(cases.RULES, rank):
            assert_same(found, one[case], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "fsdp+tp"])
def test_tensor_parallel_ranks_repeat_one_process(layout: str) -> None:
    """Tensor parallelism sums activations in another order, so that gradients themselves differ by rounding."""
    work: list[cases.Work] = [(case, layout, STEPS, {}) for case in ("muon", "scion", "kron", "muon_h")]
    wanted = [cases.repeat(case, "one", STEPS) for case, *_ in work]
    for rank in ranks.run(cases.repeat_all, 4, work):
        for expected, found in zip(wanted, rank):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            for key, value in expected["weights"].items():
                assert float((found["weights"][key] - value).norm()) <= 1e-4 * float(value.norm()), key
