"""How often a step makes the host wait for the GPU: once, for the norms; what more is known, by rule, stands here."""

from typing import Any

import pytest
import torch

from megatron_opt.distributed.planning import Layout
from megatron_opt.distributed.rehearsal import rehearsal
from megatron_opt.engine_options import EngineOptions
from megatron_opt.kernels import multi_tensor, symmetric
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.dion import Dion
from megatron_opt.optimizers.factored import FactoredOptimizer
from megatron_opt.optimizers.groups import ParamGroupConfig, default_group_configs
from megatron_opt.optimizers.shampoo import Shampoo
from megatron_opt.platform.pretended_gpu import GPU, cpu, gpu, pretended_gpu

MODEL = ModelSpec.of(
    {
        "num-layers": 1, "hidden-size": 32, "num-attention-heads": 2, "ffn-hidden-size": 48, "seq-length": 32,
        "normalization": "RMSNorm", "disable-bias-linear": True, "swiglu": True, "padded-vocab-size": 64,
        "position-embedding-type": "rope", "untie-embeddings-and-output-weights": True,
    }
)  # fmt: skip
ONE = Layout(distributed=True)
NORMS = 1


def above_the_norms(optimizer: str) -> tuple[int, int]:
    """Most waits more in the first step and in one with a refresh.

    Each group of matrices with factors asks once whether its matrices have a gradient and are seeded, and once whether
    decompositions held; torch looks at the success of each `eigh`, of which a first step has one a matrix, and Shampoo's
    refresh one for each size. Hyperball looks at eight radii when states are made.
    """
    cls = registry.known(optimizer)
    inner, radii = getattr(cls, "inner_class", cls), 8 if optimizer.endswith("_h") else 0
    if issubclass(inner, Dion):
        return 7 + radii, 0  # random factors come from the CPU when states are made
    if issubclass(inner, Shampoo):
        return (8 + radii, 7) if radii else (13, 11)
    if issubclass(inner, FactoredOptimizer):
        return (9 + radii, 1) if radii else (16, 2)
    return radii, 0


@pytest.mark.parametrize("optimizer", sorted(registry.optimizers()))
def test_the_host_waits_once_a_step(optimizer: str) -> None:
    first, refresh = above_the_norms(optimizer)
    with rehearsal(MODEL, ONE, default_group_configs(optimizer), meta=False) as made:
        assert made.step()[0].waits.total() <= NORMS + first
        assert made.step()[0].waits.total() <= NORMS
        made.optimizer.step_number = 9  # a refresh is due at the tenth
        assert made.step()[0].waits.total() <= NORMS + refresh


@pytest.mark.parametrize("optimizer", ["muon", "muon_h", "mars", "cautious", "adamw", "soap", "shampoo"])
def test_the_host_waits_once_on_many_ranks(optimizer: str) -> None:
    options: dict[str, Any] = {"muon": {"normuon": True}, "soap": {"one_sided": True}}.get(optimizer, {})
    optimizers = default_group_configs(optimizer, {optimizer: options})
    layout = Layout(tp=2, dp=4, distributed=True)
    engine = EngineOptions(matrix_mode="sharded" if optimizer in ("muon", "soap") else "auto")
    with rehearsal(MODEL, layout, optimizers, rank=3, options=engine) as made:
        made.step(), made.step()  # SOAP's slices ask in both whether moments are zero
        found = made.step()[0]
    assert found.waits == {"copy to the host": NORMS}
    assert found.launches["collective"] >= 1


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_a_step_on_a_pretended_gpu_is_the_step_on_the_cpu(optimizer: str) -> None:
    optimizers = default_group_configs(
        optimizer, {"soap": {"precondition_frequency": 2}} if optimizer == "soap" else {}
    )
    found = []
    for native in (True, False):
        torch.manual_seed(1)
        with rehearsal(MODEL, ONE, optimizers, meta=False, bf16=False, native=native) as made:
            for _ in range(3):
                made.step()
            found.append([cpu(param).clone() for param in made.params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_waits_is_counted() -> None:
    x = torch.arange(4.0)
    with pretended_gpu() as count:
        y = gpu(x)
        y.add_(1), y[1:].mul(2), torch.zeros(3, device=GPU), x.to(GPU, non_blocking=True)
        assert not count.waits
        seen = [
            y.sum().item(),
            bool((y > 1).any()),
            y.tolist(),
            y.cpu(),
            x.to(GPU),
            y[y > 1],
            torch.tensor([1.0], device=GPU),
        ]
        assert count.waits.total() == len(seen)
        with pytest.raises(RuntimeError, match="mixes"):
            y + x[:4].clone()
        with pytest.raises(RuntimeError, match="mixes"):
            torch.stack([y, torch.ones(4)])
    assert cpu(y) is not y and x.tolist() == [1, 2, 3, 4]  # the same memory


def test_a_read_of_the_first_version_is_seen() -> None:
    """A rule that asks for a value is above the number."""
    with rehearsal(MODEL, ONE, [ParamGroupConfig(".*", "adamw")], meta=False) as made:
        made.step()
        made.optimizer.zero_grad = None  # type: ignore[assignment,method-assign]
        norms = made.optimizer._norms
        made.optimizer._norms = lambda grads: (float(grads[0][0].sum()), norms(grads))[1]  # type: ignore[method-assign]
        assert made.step()[0].waits.total() == NORMS + 1


@pytest.mark.parametrize("optimizer", ["muon", "scion", "muon_h", "scion_h"])
def test_a_step_without_exchanges_can_be_captured(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph takes no wait and nothing from the host's memory; what these rules compute depends on no number of the step."""
    monkeypatch.setattr(symmetric, "_library", lambda: None)  # Triton asks for a driver
    made, info = registry.build(optimizer, {}), MatrixInfo("w", (24, 40))
    with pretended_gpu() as count:
        weight = torch.randn(info.shape, device=GPU)
        numbers = torch.ones(12, device=GPU)
        state = made.init_state(weight, info)
        count.waits.clear()
        count.launches.clear()
        found = []
        for number in (1, 7):
            kept = {key: cpu(value).clone() for key, value in state.items()}
            grad = gpu(torch.ones(info.shape).triu())
            moved = made.update([grad], [state], number, [info])
            multi_tensor.update(UpdateKind.APPLY, [weight], moved, (), Coefficients(), device_coefficients=numbers)
            found.append(cpu(moved[0]).clone())
            for key, value in kept.items():
                cpu(state[key]).copy_(value)
        assert torch.equal(*found)
    # the reference of the fused update, which runs here, reads the coefficients that the kernel is given a pointer to
    assert count.waits == {"copy to the host": 2} and not count.launches["copy to the GPU"]
