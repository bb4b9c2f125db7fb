"""Sophia's curvature: one more pass over a step's batches every k steps (arXiv 2305.14342).

Gauss–Newton–Bartlett: labels are sampled from the model's own logits on the step's batches; with g the gradient of the
mean loss on them over n tokens, n·g⊙g estimates the diagonal of the Gauss–Newton matrix. A label is the argmax of logit
plus Gumbel noise that is a hash of (seed, step, sequence, position, token), so that no layout samples another label.

Hutchinson: `hutchinson.py`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_opt.kernels.host import current_device
from megatron_opt.training import hutchinson
from megatron_opt.training.batches import REPLAY
from megatron_opt.training.clock import Clock
from megatron_opt.training.initialization import uniform

_ELEMENTS = 1 << 22  # logits at a time


def _sequence_keys(labels: Tensor) -> Tensor:
    """One int64 a sequence (b,), from its true labels (b, s): the same wherever the sequence is processed."""
    positions = torch.arange(1, labels.shape[1] + 1, dtype=torch.int64, device=labels.device)
    return (labels.long() * positions * 0x5851F42D4C957F2D).sum(dim=1)


def sample_labels(logits: Tensor, labels: Tensor, seed: int, step: int, group: Any = None) -> Tensor:
    """Labels (b, s) drawn from softmax(logits); logits are this rank's (s, b, v/t) of a vocabulary-parallel group."""
    s, b, local = logits.shape
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    vocabulary = local * size
    keys = _sequence_keys(labels)
    tokens = torch.arange(local, dtype=torch.int64, device=logits.device) + rank * local
    best = torch.empty(s, b, dtype=torch.float64, device=logits.device)
    chosen = torch.empty(s, b, dtype=torch.int64, device=logits.device)
    height = max(1, _ELEMENTS // (b * local))
    for start in range(0, s, height):
        rows = torch.arange(start, min(s, start + height), dtype=torch.int64, device=logits.device)
        index = (keys[None, :] * s + rows[:, None])[:, :, None] * vocabulary + tokens  # wraps around, as a hash may
        noise = -torch.log(-torch.log(uniform(seed, f"sophia {step}", index)))
        value, label = (logits[start : start + len(rows)].double() + noise).max(dim=2)
        best[start : start + len(rows)], chosen[start : start + len(rows)] = value, tokens[label]
    if size > 1:
        highest = best.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        chosen = torch.where(best == highest, chosen, -1)
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX, group=group)
    return chosen.transpose(0, 1).contiguous()


def install(training: Any, args: Any, kind: str, clock: Clock) -> None:
    """Put an estimate (`gnb` or `hutchinson`) behind the training steps after which a rule wants one."""
    train_step = training.train_step

    def with_curvature(
        forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
        forward_backward: Any, *rest: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        due = optimizer.curvature_due(optimizer.step_number + 1)
        if due:
            REPLAY.record()
        result = train_step(
            forward_step, data_iterator, model, optimizer, scheduler, config, forward_backward, *rest, **kwargs
        )
        if due:
            REPLAY.replay()
            untimed = getattr(forward_backward, "__wrapped__", forward_backward)  # this is curvature's time
            try:
                timed(args, forward_step, data_iterator, model, optimizer, untimed)
            finally:
                REPLAY.stop()
        return result

    timed = clock.timed("curvature", {"gnb": estimate, "hutchinson": estimate_hutchinson}[kind])
    training.train_step = with_curvature


def estimate(
    args: Any, forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, forward_backward: Callable[..., Any]
) -> None:
    """Gradients of the loss on sampled labels; the optimizer takes their squares."""
    from megatron.core.utils import unwrap_model

    heads = [chunk for chunk in unwrap_model(list(model)) if getattr(chunk, "post_process", False)]
    with contextlib.ExitStack() as until:
        for head in heads:
            until.enter_context(_loss(head, _sampled_loss(head, args.seed, optimizer.step_number)))
        reports = _pass(args, forward_step, data_iterator, model, optimizer, forward_backward)
    optimizer.update_curvature(counted_tokens(reports), squared=True)


@contextlib.contextmanager
def _loss(head: Any, other: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Another loss in the place of the head's, and of what --z-loss-coeff has put there."""
    before = vars(head).get("compute_language_model_loss")
    head.compute_language_model_loss = other
    try:
        yield
    finally:
        del head.compute_language_model_loss
        if before is not None:
            head.compute_language_model_loss = before


def estimate_hutchinson(
    args: Any, forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, forward_backward: Callable[..., Any]
) -> None:
    """z⊙(Hz) of the loss on the true labels, z of signs; the optimizer takes it as it is."""
    from megatron.core.utils import unwrap_model

    (chunk,) = unwrap_model(list(model))
    signs = {
        param: hutchinson.signs(args.seed, optimizer.step_number, name, param)
        for name, param in chunk.named_parameters()
        if param.requires_grad
    }
    step = functools.partial(hutchinson.forward_step, forward_step, signs)
    # torch's fused attention has no second derivative
    with _loss(chunk, hutchinson.token_losses), sdpa_kernel(SDPBackend.MATH):
        _pass(args, step, data_iterator, model, optimizer, forward_backward)
    for param, z in signs.items():
        param.main_grad.mul_(z)
    optimizer.update_curvature(1.0, squared=False)


def _pass(
    args: Any, forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, forward_backward: Callable[..., Any]
) -> Any:
    """Forward and backward over the step's batches into emptied gradient buffers; what the loss functions report."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    return forward_backward(
        forward_step_func=forward_step,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
    )


def counted_tokens(reports: Any) -> float:
    """n: tokens of the step that the loss counts, masked ones left out, over all microbatches and ranks; a collective."""
    from megatron.core import parallel_state as ps

    counted = torch.zeros(1, dtype=torch.float64, device=current_device())
    for report in reports or []:  # filled on the last pipeline stage
        counted += report["lm loss"].detach().double().view(-1)[1]
    if dist.get_world_size() > 1:
        dist.all_reduce(counted)
    return counted.item() / ps.get_tensor_model_parallel_world_size()  # whose ranks count the same tokens


def _sampled_loss(head: Any, seed: int, step: int) -> Callable[[Tensor, Tensor], Tensor]:
    from megatron.core import parallel_state as ps

    original = functools.partial(type(head).compute_language_model_loss, head)
    group = ps.get_tensor_model_parallel_group() if ps.get_tensor_model_parallel_world_size() > 1 else None

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        return original(sample_labels(logits.detach(), labels, seed, step, group), logits)

    return loss
