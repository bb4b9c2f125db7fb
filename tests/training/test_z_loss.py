"""--z-loss-coeff: the gradient of cross entropy and c·log²Z together, the value of the cross entropy; layouts: tests/distributed."""

import pytest
import torch

from megatron_opt.export import model
from megatron_opt.training import curvature, z_loss


def head():
    """What computes a model's losses, whole on this rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    class Head:
        post_process, training, tp_group = True, True, ps.get_tensor_model_parallel_group()

        def compute_language_model_loss(self, labels, logits):
            return vocab_parallel_cross_entropy(logits, labels.T.contiguous()).T.contiguous()

    return Head()


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(7, 2, 11, generator=generator) + 2
    return torch.randint(0, 11, (2, 7), generator=generator), logits.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_against_float64(dtype) -> None:
    labels, logits = drawn(dtype)
    weights = torch.linspace(0.5, 2, 14, dtype=torch.float64).view(2, 7)  # a loss mask, and a loss scale
    exact = logits.detach().double().requires_grad_()
    entropy = torch.nn.functional.cross_entropy(exact.permute(1, 2, 0), labels, reduction="none")
    ((entropy + 0.3 * exact.logsumexp(-1).T.square()) * weights).sum().backward()
    with model.one_process():
        (one,) = z_loss.install(0.3, [head()])
        actual = one.compute_language_model_loss(labels, logits * 1)  # no leaf: Megatron's cross entropy writes into it
        (actual * weights.float()).sum().backward()
        one.training = False
        with torch.no_grad():
            evaluated = one.compute_language_model_loss(labels, logits * 1)
    torch.testing.assert_close(actual.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(actual, evaluated)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(logits.grad.double(), exact.grad, **near)
    assert (exact.grad.sum(-1).abs() > 0.1).any()  # that of a cross entropy alone sums to zero


def test_curvature_is_that_of_the_cross_entropy_and_the_z_loss_comes_back() -> None:
    labels, logits = drawn()
    with model.one_process():
        (one,) = z_loss.install(0.3, [head()])
        mine = one.compute_language_model_loss
        with curvature._loss(one, curvature._sampled_loss(one, 1, 1)):
            one.compute_language_model_loss(labels, logits * 1).sum().backward()
        assert one.compute_language_model_loss is mine
        assert logits.grad.sum(-1).abs().max() < 1e-4
        plain = head()
        with curvature._loss(plain, curvature._sampled_loss(plain, 1, 1)):
            assert plain.compute_language_model_loss.__name__ == "loss"
        assert "compute_language_model_loss" not in vars(plain)
