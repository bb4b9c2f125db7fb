"""torch.distributed.checkpoint carries the state between numbers of ranks, by value; torch.save within one process."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opt.torch import Optimizer
from tests.torch import cases, ranks

STEPS = 3
CASES = ("adamw", "muon", "soap", "kron")
WAYS = ("stateful", "nested", "flat")


def assert_continued(found: Any, saved: Any) -> None:
    assert set(found["state"]) == set(saved["state"])
    assert all(torch.equal(found["state"][key], value) for key, value in saved["state"].items())
    assert found["losses"] == pytest.approx(saved["losses"], rel=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("checkpoints"))


def _calls(folders: Path, source: str) -> list[tuple[Any, ...]]:
    return [(case, way, str(folders / source / case / way), STEPS) for case in CASES for way in WAYS]


@pytest.fixture(scope="module")
def of_two(folders: Path) -> list[Any]:
    """Saved by two ranks."""
    return ranks.run(cases.all_of, 2, cases.save, _calls(folders, "two"))[0]  # type: ignore[no-any-return]


def test_two_ranks_state_is_loaded_by_one_process(folders: Path, of_two: list[Any]) -> None:
    for call, saved in zip(_calls(folders, "two"), of_two, strict=True):
        assert_continued(cases.load(*call), saved)


def test_one_process_state_is_loaded_by_two_ranks(folders: Path, of_two: list[Any]) -> None:
    calls = _calls(folders, "one")
    saved = [cases.save(*call) for call in calls]
    for rank in ranks.run(cases.all_of, 2, cases.load, calls):
        for found, wanted in zip(rank, saved, strict=True):
            assert_continued(found, wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("muon", {}),
        ("muon", {"momentum_dtype": "int8"}),
        ("adamw", {"state_dtype": "int8"}),
        ("soap_h", {}),
        ("dion", {}),
        ("dion3", {}),
        ("kl_shampoo", {}),
        ("schedule_free", {}),
        ("prodigy", {"d0": 1e-2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_torch_save_continues_bit_for_bit(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = cases.make_model().to(dtype)
    optimizer = Optimizer(model, name, lr=1e-2, **options)
    cases.train(model, optimizer, 0, STEPS)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other = cases.make_model(2).to(dtype)
    again = Optimizer(other, name, lr=3e-2, **options)
    again.load_state_dict(stored["optimizer"])
    other.load_state_dict(stored["model"])
    assert again.param_groups[0]["lr"] == 1e-2 and again.param_groups[0]["step"] == STEPS
    assert cases.train(other, again, STEPS, STEPS + 2) == cases.train(model, optimizer, STEPS, STEPS + 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_state_of_something_else_is_refused() -> None:
    model = cases.make_model()
    optimizer = cases.make_optimizer(model, "muon")
    cases.train(model, optimizer, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="is of the groups"):
        cases.make_optimizer(cases.make_model(), "scion").load_state_dict(state)
    state["state"][0].pop("q.momentum_buffer")
    with pytest.raises(ValueError, match=r"no q\.momentum_buffer of layers\.0\.qkv\.weight"):
        cases.make_optimizer(cases.make_model(), "muon").load_state_dict(state)
    with pytest.raises(ValueError, match="another model's"):
        Optimizer(
            [(n, torch.nn.Parameter(torch.ones(3, 5))) for n, _ in [("a.weight", 0)]], "muon", lr=1
        ).load_state_dict(
            {
                "state": {0: {"momentum_buffer": torch.ones(3, 4)}},
                "param_groups": [{"name": "muon.0.0", "params": [0], "step": 1}],
            }
        )
