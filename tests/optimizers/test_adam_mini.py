"""Adam-mini's blocks, its rule in float64, and AdamW on vectors."""

import pytest
import torch

from megatron_opt.optimizers import groups, registry
from megatron_opt.optimizers.base import MatrixInfo

BETA1, BETA2, EPS = 0.9, 0.98, 1e-10


def run(info, grads):
    optimizer = registry.build("adam_mini", dict(beta1=BETA1, beta2=BETA2, eps=EPS))
    state = optimizer.init_state(torch.zeros_like(grads[0]), info)
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)], state


@pytest.mark.parametrize(
    "info, rows",
    [
        (MatrixInfo("k", (12, 5), role="k", heads=3), 4),
        (MatrixInfo("q", (12, 5), role="q", heads=2), 6),
        (MatrixInfo("v", (12, 5), role="v", heads=3), 1),
        (MatrixInfo("o", (12, 5), role="attention_output"), 1),
        (MatrixInfo("up", (12, 5), role="up"), 1),
        (MatrixInfo("e", (12, 5), "embedding"), 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_is_the_papers(info, rows):
    """`rows`: how many rows share one second moment."""
    torch.manual_seed(0)
    grads = [torch.randn(12, 5, dtype=torch.float64) for _ in range(50)]
    ours, state = run(info, grads)
    assert state["exp_avg_sq"].numel() == 12 // rows
    m, v = torch.zeros(12, 5, dtype=torch.float64), torch.zeros(12 // rows, dtype=torch.float64)
    for t, (g, u) in enumerate(zip(grads, ours), 1):
        m = BETA1 * m + (1 - BETA1) * g
        for block in range(12 // rows):
            part = g[block * rows : (block + 1) * rows]
            v[block] = BETA2 * v[block] + (1 - BETA2) * (part * part).mean()
        scale = ((v / (1 - BETA2**t)).sqrt() + EPS).repeat_interleave(rows)[:, None]
        torch.testing.assert_close(u, m / (1 - BETA1**t) / scale, rtol=1e-10, atol=1e-14)


def test_vectors_are_adamw():
    torch.manual_seed(0)
    grads = [torch.randn(9, dtype=torch.float64) for _ in range(50)]
    ours, _ = run(MatrixInfo("norm", (9,), "norm"), grads)
    parameter = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    theirs = torch.optim.AdamW([parameter], lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
    for g in grads:
        parameter.grad = g.clone()
        theirs.step()
    torch.testing.assert_close(-sum(ours), parameter.detach(), rtol=1e-9, atol=1e-11)


def test_only_norms_and_biases_are_clipped():
    infos = [MatrixInfo("w", (4, 4)), MatrixInfo("norm", (4,), "norm"), MatrixInfo("e", (9, 4), "embedding")]
    named = {i.name: g for g in groups.assign(infos, groups.default_group_configs("adam_mini")) for i in g.infos}
    assert [named[i.name].clip_scope for i in infos] == [None, "global", None]
