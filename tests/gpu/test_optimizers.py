"""Twenty steps of every optimizer on the GPU: the CPU's weights and state to 1e-4, and state that goes over and back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import ElementwiseOptimizer, MatrixInfo

SHAPES = [(24, 24), (16, 40), (48, 16)]
STEPS, LR = 20, 1e-2
# Where a rule divides by what rounding leaves, two devices agree to what rounding is there: not asked here.
OPTIONS: dict[str, dict[str, Any]] = {
    "soap": {"factor_precision": "fp64", "eps": 1e-6}, "soap_h": {"factor_precision": "fp64", "eps": 1e-6},
    "shampoo": {"factor_precision": "fp64"}, "shampoo_h": {"factor_precision": "fp64"},
    "muon": {"fp32_matmul_prec": "high"}, "muon_h": {"fp32_matmul_prec": "high"},
    "kl_soap": {"factor_precision": "fp64", "eps": 1e-6}, "kl_soap_h": {"factor_precision": "fp64", "eps": 1e-6},
    "soap_muon": {"factor_precision": "fp64", "eps": 1e-6, "fp32_matmul_prec": "high"},
    "soap_muon_h": {"factor_precision": "fp64", "eps": 1e-6, "fp32_matmul_prec": "high"},
    "dion2": {"fp32_matmul_prec": "high"}, "dion2_h": {"fp32_matmul_prec": "high"},
    "dion3": {"fp32_matmul_prec": "high"}, "dion3_h": {"fp32_matmul_prec": "high"},
    "scion": {"fp32_matmul_prec": "high"}, "scion_h": {"fp32_matmul_prec": "high"},
}  # fmt: skip
DRAWN = ("kron", "kron_h")  # its probe is drawn by the device's own generator


class Run:
    """A rule and the weights that it trains towards targets, on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(3)
        made = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2)]
        self.noise = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]
        self.optimizer = registry.build(name, OPTIONS.get(name, {}))
        self.weights, self.targets = ([x.to(device) for x in several] for several in made)
        self.infos = [MatrixInfo(f"w{i}", shape) for i, shape in enumerate(SHAPES)]
        elementwise = isinstance(self.optimizer, ElementwiseOptimizer)
        self.states: list[dict[str, Tensor]] = [
            self.optimizer.init_state(w) if elementwise else self.optimizer.init_state(w, info)
            for w, info in zip(self.weights, self.infos, strict=True)
        ]

    def to(self, device: torch.device) -> None:
        """As a checkpoint does it: values alone travel."""
        self.weights, self.targets = ([x.to(device) for x in xs] for xs in (self.weights, self.targets))
        self.states = [{key: value.to(device) for key, value in state.items()} for state in self.states]
        self.optimizer.numbers = {k: float(v) for k, v in getattr(self.optimizer, "numbers", {}).items()}

    def step(self, number: int) -> None:
        device = self.weights[0].device
        grads = [
            w - t + n.to(device) for w, t, n in zip(self.weights, self.targets, self.noise[number - 1], strict=True)
        ]
        if isinstance(self.optimizer, ElementwiseOptimizer):
            self.optimizer.update(self.weights, grads, self.states, number, LR, 0.1)
            return
        moved = self.optimizer.update(grads, self.states, number, self.infos)
        multi_tensor.update(UpdateKind.APPLY, self.weights, moved, (), Coefficients(lr=LR, decay_factor=0.1 * LR))


def _near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu().double() - b.cpu().double()).norm() <= 1e-4 * b.double().norm()


@pytest.mark.parametrize("name", sorted(registry.optimizers()))
def test_twenty_steps_are_the_cpus(device: torch.device, name: str) -> None:
    if name in DRAWN and device.type == "cuda":
        pytest.skip("the probe is drawn by each device's own generator: held by descent, not by bits")
    here, there = Run(name, torch.device("cpu")), Run(name, device)
    for number in range(1, STEPS + 1):
        here.step(number)
        there.step(number)
    _near(there.weights, here.weights)


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_probes_descend_alike(device: torch.device, name: str) -> None:
    lengths = []
    for where in (torch.device("cpu"), device):
        run = Run(name, where)
        for number in range(1, STEPS + 1):
            run.step(number)
        lengths.append(sum(float((w - t).norm()) for w, t in zip(run.weights, run.targets, strict=True)))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


@pytest.mark.parametrize("name", [n for n in sorted(registry.optimizers()) if n not in DRAWN])
def test_state_goes_to_the_gpu_and_back(device: torch.device, name: str) -> None:
    here, moved = Run(name, torch.device("cpu")), Run(name, torch.device("cpu"))
    for number in range(1, 13):
        if number in (5, 9):  # over, and back
            moved.to(device if number == 5 else torch.device("cpu"))
        here.step(number)
        moved.step(number)
    _near(moved.weights, here.weights)
