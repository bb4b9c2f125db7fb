"""Steps without exchanges as CUDA graphs: a replay is the step, with other coefficients too."""

import pytest
import torch

from megatron_opt.kernels import multi_tensor as mt
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

CAPTURABLE = ("muon", "scion", "muon_h")  # no number of the host changes from step to step


def _captured(step: object) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # type: ignore[operator]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # type: ignore[operator]
    return graph


def test_a_replay_takes_the_coefficients_of_its_own_step(cuda: torch.device) -> None:
    torch.manual_seed(0)
    start = torch.randn(10_000, device=cuda)
    grads = [torch.randn(10_000, device=cuda) for _ in range(4)]
    table = [
        Coefficients(lr=1e-2 / (t + 1), beta1=0.9, input_weight1=0.1, beta2=0.98, input_weight2=0.02, eps=1e-8)
        for t in range(4)
    ]
    plain = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    for grad, c in zip(grads, table, strict=True):
        mt.update(UpdateKind.ADAM, plain[:1], [grad], [[plain[1]], [plain[2]]], c)
    held = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    grad, numbers = grads[0].clone(), torch.tensor(table[0], device=cuda)

    def step() -> None:
        mt.update(UpdateKind.ADAM, held[:1], [grad], [[held[1]], [held[2]]], table[0], device_coefficients=numbers)

    graph = _captured(step)
    for tensor, value in zip(held, (start, torch.zeros_like(start), torch.zeros_like(start)), strict=True):
        tensor.copy_(value)
    for other, c in zip(grads, table, strict=True):
        grad.copy_(other)
        numbers.copy_(torch.tensor(c))
        graph.replay()
    for ours, theirs in zip(held, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_matrix_rules_replay(cuda: torch.device, name: str) -> None:
    torch.manual_seed(0)
    optimizer, info = registry.build(name, {}), MatrixInfo("w", (64, 96))
    start = torch.randn(info.shape, device=cuda)
    grads = [torch.randn(info.shape, device=cuda) for _ in range(3)]

    def run(replayed: bool) -> torch.Tensor:
        weight, grad = start.clone(), grads[0].clone()
        state = optimizer.init_state(weight, info)
        kept = {key: value.clone() for key, value in state.items()}

        def step() -> None:
            taken = optimizer.update([grad.clone()], [state], 1, [info])
            mt.update(UpdateKind.APPLY, [weight], taken, (), Coefficients(lr=0.1))

        graph = _captured(step) if replayed else None
        weight.copy_(start)
        for key, value in kept.items():
            state[key].copy_(value)
        for other in grads:
            grad.copy_(other)
            graph.replay() if graph is not None else step()
        return weight

    assert torch.equal(run(True), run(False))
