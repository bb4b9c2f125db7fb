"""Directions into weights: the formula in float64, bf16 copies, kept norms, and matrices that are left alone."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.distributed.weights import WeightStep
from megatron_opt.layout.region import Region
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

SHAPES = {"down": (6, 40), "gate": (5, 7), "up": (5, 7)}
LR, DECAY = 0.1, 0.3


class OneProcess:
    """`gate` and `up` in one parameter shard, `down` in another, on one process."""

    def __init__(self, mode: str, optimizer: str = "muon", dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(2)
        self.infos = {name: MatrixInfo(name, shape) for name, shape in SHAPES.items()}
        rects = [
            [Rect("gate", Region(0, 5, 0, 7)), Rect("up", Region(0, 5, 0, 7), 35)],
            [Rect("down", Region(0, 6, 0, 40))],
        ]
        mains = [torch.randn(70, generator=draw), torch.randn(240, generator=draw)]
        self.images = [main.to(dtype) for main in mains]
        param_shards: Any = [
            SimpleNamespace(
                view=SimpleNamespace(counts=True, param=image), main=main, rects=held,
                model_copy=lambda image=image: image if image.dtype != torch.float32 else None,
            )
            for main, image, held in zip(mains, self.images, rects, strict=True)
        ]  # fmt: skip
        holdings = [[(at, rect) for at, held in enumerate(rects) for rect in held]]
        self.shard_group = ShardGroup("", None, 0, 1, param_shards, holdings, self.infos, None)  # type: ignore[arg-type]
        self.optimizer = registry.build(optimizer, {})
        states = {(n, 0): self.optimizer.init_state(w, self.infos[n]) for n, w in self.weights().items()}
        matrix: Any = SimpleNamespace(
            shard_group=self.shard_group, infos=self.infos, states=states, placed=SimpleNamespace(counts=True)
        )
        matrix.optimizers, matrix.rescale = (
            dict.fromkeys(self.infos, self.optimizer),
            partial(MatrixStep.rescale, matrix),
        )
        groups: Any = [SimpleNamespace(decay_mode=mode)]
        self.step = WeightStep(self.shard_group, matrix, groups, [self.optimizer], dict.fromkeys(self.infos, 0))
        self.updates = [torch.randn(70, generator=draw), torch.randn(240, generator=draw)]

    def weights(self) -> dict[str, Tensor]:
        return self.whole([param_shard.main for param_shard in self.shard_group.param_shards])

    def whole(self, flats: list[Tensor]) -> dict[str, Tensor]:
        parts = {"gate": flats[0][:35], "up": flats[0][35:], "down": flats[1]}
        return {name: part.reshape(SHAPES[name]).clone() for name, part in parts.items()}


@pytest.mark.parametrize("mode", ["decoupled", "independent", "cautious"])
def test_weights_follow_the_formula(mode: str) -> None:
    held = OneProcess(mode)
    before = {name: weight.double() for name, weight in held.weights().items()}
    directions = {name: update.double() for name, update in held.whole(held.updates).items()}
    held.step.step(held.updates, {"up"}, [{"lr": 2 * LR, "lr_scale": 0.5, "weight_decay": DECAY}])
    for name, weight in held.weights().items():
        w, u = before[name], directions[name]
        share = DECAY if mode == "independent" else LR * DECAY
        decay = torch.where(u * w >= 0, share * w, 0.0) if mode == "cautious" else share * w
        expected = w if name == "up" else w - LR * u - decay
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_bf16_parameters_are_written_in_the_same_pass() -> None:
    held = OneProcess("decoupled", dtype=torch.bfloat16)
    held.step.step(held.updates, set(), [{"lr": LR, "lr_scale": 1.0, "weight_decay": DECAY}])
    for param_shard, image in zip(held.shard_group.param_shards, held.images, strict=True):
        assert held.step.writes_model == {0} and torch.equal(image, param_shard.main.bfloat16())


def test_projected_weights_keep_their_norm_and_are_published_apart() -> None:
    held = OneProcess("decoupled", "muon_h", torch.bfloat16)
    before = held.weights()
    held.step.step(held.updates, {"up"}, [{"lr": LR, "lr_scale": 1.0, "weight_decay": 0.0}])
    after = held.weights()
    assert torch.equal(after["up"], before["up"]) and not held.step.writes_model
    for name in ("gate", "down"):
        assert not torch.equal(after[name], before[name])
        torch.testing.assert_close(after[name].norm(), before[name].norm())


def test_squared_norms_by_matrix() -> None:
    held = OneProcess("decoupled")
    held.updates[1][3] = float("inf")
    found = held.shard_group.squared_norms(held.updates)
    wholes = held.whole(held.updates)
    assert found.shape == (3,) and found.dtype == torch.float64 and torch.isinf(found[held.shard_group.order["down"]])
    for name in ("gate", "up"):
        torch.testing.assert_close(found[held.shard_group.order[name]], wholes[name].double().square().sum())
