"""Hutchinson's estimate of the Hessian's diagonal, z⊙(Hz) for random signs z: its mean over z is the diagonal itself.

Hz is the gradient of ⟨∇L, z⟩, so the model is differentiated twice. That is exact where every operation of the model is
torch's own: a kernel with a backward of its own, or a collective in the graph, would be taken as a constant.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.training.initialization import uniform

# flag: the value that leaves the graph to torch
_NEEDED: dict[str, tuple[Any, str]] = {
    "tensor_model_parallel_size": (1, "--tensor-model-parallel-size 1"),
    "pipeline_model_parallel_size": (1, "--pipeline-model-parallel-size 1"),
    "num_experts": (None, "no --num-experts"),
    "transformer_impl": ("local", "--transformer-impl local"),
    "recompute_granularity": (None, "no --recompute-granularity"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "bias_swiglu_fusion": (False, "--no-bias-swiglu-fusion"),
    "bias_gelu_fusion": (False, "--no-bias-gelu-fusion"),
    "bias_dropout_fusion": (False, "--no-bias-dropout-fusion"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
}


def check_curvature(args: Any, kind: str) -> None:
    """Refuse layouts and kernels on which an estimate would be wrong."""
    if getattr(args, "context_parallel_size", 1) > 1:
        raise UserError("--optimizer sophia takes whole sequences; use --context-parallel-size 1.")
    if kind != "hutchinson":
        return
    wrong = [words for name, (value, words) in _NEEDED.items() if getattr(args, name, value) != value]
    if wrong:
        raise UserError(
            f"--sophia-curvature hutchinson differentiates the model twice, which is exact only with {', '.join(wrong)}; "
            "give those, or use --sophia-curvature gnb."
        )


def signs(seed: int, step: int, name: str, like: Tensor) -> Tensor:
    """±1 with equal chances in the shape of a parameter, a function of seed, step, name and place."""
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    return torch.where(uniform(seed, f"hutchinson {step} {name}", index) < 0.5, -1.0, 1.0).view(like.shape).to(like)


def product(loss: Tensor, z: Mapping[Tensor, Tensor]) -> Tensor:
    """⟨∇L, z⟩, whose gradient is Hz, for a loss that depends on the parameters (the keys of `z`)."""
    params = list(z)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    wide = torch.promote_types(loss.dtype, torch.float32)
    parts = [(g * z[p]).sum(dtype=wide) for g, p in zip(grads, params, strict=True) if g is not None]
    return torch.stack(parts).sum()


def token_losses(labels: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy (b, s) of logits (s, b, v); Megatron's own has a backward that takes the softmax as constant."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide.flatten(0, 1), labels.mT.flatten(), reduction="none")
    return losses.view(logits.shape[:2]).mT.contiguous()


def forward_step(
    inner: Callable[..., Any], z: Mapping[Tensor, Tensor], data_iterator: Any, model: Any, *rest: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's forward step with ⟨∇L, z⟩ in place of the loss: its backward pass leaves Hz in the gradients."""
    output, loss_function = inner(data_iterator, model, *rest)

    def doubled(output: Tensor) -> Any:
        loss, *others = loss_function(output)
        return (product(loss, z), *others)

    return output, doubled
