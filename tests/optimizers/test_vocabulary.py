"""The vocabulary's side of embedding and output has no factor unless asked for; rules without slices are never cut."""

import pytest

from megatron_opt.distributed.ownership import Job, pack
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer

TABLES = [MatrixInfo("embedding", (512, 64), "embedding", "word"), MatrixInfo("output", (512, 64), "output", "output")]
POSITIONS = MatrixInfo("positions", (128, 64), "embedding", "position")
HIDDEN = MatrixInfo("up", (512, 64), "hidden", "up")


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_factors_are_of_the_width_alone(name):
    optimizer, asked = registry.build(name, {}), registry.build(name, {"precondition_vocabulary": True})
    for info in TABLES:
        assert optimizer.sides(info) == (1,) and asked.sides(info) == (0, 1)
        assert optimizer.grid(info).shapes() == [(1, 512, 64)]  # not cut along the vocabulary
        assert optimizer.cost(info).state_bytes < asked.cost(info).state_bytes
    assert optimizer.sides(HIDDEN) == optimizer.sides(POSITIONS) == (0, 1)


def test_krons_factor_of_the_vocabulary_is_diagonal():
    optimizer, asked = registry.build("kron", {}), registry.build("kron", {"precondition_vocabulary": True})
    for info in TABLES:
        assert optimizer.diagonal(info) == (True, False) and asked.diagonal(info) == (False, False)
    assert optimizer.diagonal(HIDDEN) == optimizer.diagonal(POSITIONS) == (False, False)


WHOLE = {
    "kron": {}, "shampoo": {}, "muon": {"momentum_dtype": "int8"}, "muon_h": {"momentum_dtype": "int8"}, "cautious_h": {},
    "kron_h": {}, "shampoo_h": {}, "soap": {"block_size": 0}, "scion": {"momentum_dtype": "int8"},
}  # fmt: skip
CUT = {"muon": {}, "muon ": {"normuon": True}, "muon_h": {}, "scion_h": {}, "adam_h": {}}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("mode", ["auto", "owner", "group", "sharded"])
def test_rules_that_need_the_whole_matrix_get_an_owner(name, mode):
    """Also where one matrix is far more than a rank's share, and where slices are asked for."""
    optimizer = registry.build(name, WHOLE[name])
    assert isinstance(optimizer, MatrixOptimizer)
    infos = [MatrixInfo("large", (2048, 1024)), *(MatrixInfo(f"small{i}", (16, 16)) for i in range(6))]
    plan = pack([Job.of(info, optimizer) for info in infos], 4, mode)
    assert sorted(part.matrix for part in plan.parts) == sorted(info.name for info in infos)
    assert all(
        part.stop - part.start == info.shape[0] for info in infos for part in plan.parts if part.matrix == info.name
    )
    assert {part.matrix: part.rank for part in plan.parts} == plan.owner


@pytest.mark.parametrize("name", CUT)
def test_other_rules_are_cut_where_asked(name):
    optimizer, info = registry.build(name.strip(), CUT[name]), MatrixInfo("large", (2048, 1024))
    plan = pack([Job.of(info, optimizer)], 4, "sharded")
    assert len(plan.parts) == 4
