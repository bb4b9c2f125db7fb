"""z⊙(Hz) is exact: over all sign vectors its mean is the Hessian's diagonal; what would be wrong is refused."""

import itertools
from argparse import Namespace

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers.groups import ParamGroupConfig
from megatron_opt.training import hutchinson
from megatron_opt.training.optimizer_flags import curvature_kind


def small_model():
    torch.manual_seed(0)
    params = [torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)]
    x, labels = torch.randn(5, 2, dtype=torch.float64), torch.randint(0, 2, (1, 5))

    def loss(first, second):
        logits = torch.tanh(x @ first) @ second
        return hutchinson.token_losses(labels, logits[:, None]).sum()

    return params, loss


def exact_diagonals(params, loss):
    blocks = torch.autograd.functional.hessian(loss, tuple(params))
    return [blocks[i][i].reshape(p.numel(), -1).diagonal().view(p.shape) for i, p in enumerate(params)]


def estimate(params, loss, vector):
    leaves = [p.clone().requires_grad_() for p in params]
    parts = torch.tensor(vector, dtype=torch.float64).split([p.numel() for p in params])
    z = {leaf: part.view(leaf.shape) for leaf, part in zip(leaves, parts)}
    hutchinson.product(loss(*leaves), z).backward()
    return [z[leaf] * leaf.grad for leaf in leaves]


def test_mean_over_all_signs_is_the_hessians_diagonal():
    params, loss = small_model()
    sums = [torch.zeros_like(p) for p in params]
    vectors = list(itertools.product((-1.0, 1.0), repeat=sum(p.numel() for p in params)))
    for vector in vectors:
        for total, part in zip(sums, estimate(params, loss, vector)):
            total += part
    for total, exact in zip(sums, exact_diagonals(params, loss)):
        assert float(exact.abs().max()) > 0.1
        torch.testing.assert_close(total / len(vectors), exact, rtol=1e-10, atol=1e-12)


def test_token_losses_are_cross_entropies():
    torch.manual_seed(1)
    logits, labels = torch.randn(7, 3, 11), torch.randint(0, 11, (3, 7))
    found = hutchinson.token_losses(labels, logits)
    for b in range(3):
        for s in range(7):
            expected = -torch.log_softmax(logits[s, b], 0)[labels[b, s]]
            assert float(found[b, s]) == pytest.approx(float(expected), rel=1e-5)


def test_signs_are_even_and_depend_on_name_step_and_seed():
    like = torch.zeros(100, 100)
    one = hutchinson.signs(1, 10, "a", like)
    assert set(one.unique().tolist()) == {-1.0, 1.0} and abs(float(one.mean())) < 0.04
    assert torch.equal(one, hutchinson.signs(1, 10, "a", like))
    for other in ((2, 10, "a"), (1, 20, "a"), (1, 10, "b")):
        assert abs(float((one * hutchinson.signs(*other, like)).mean())) < 0.04


FINE = {name: value for name, (value, _) in hutchinson._NEEDED.items()}


@pytest.mark.parametrize("name", hutchinson._NEEDED)
def test_what_would_be_wrong_is_refused_by_its_flag(name):
    wrong = {"transformer_impl": "transformer_engine", "recompute_granularity": "full"}.get(name, 2)
    wrong = True if FINE[name] is False else wrong
    args = Namespace(**{**FINE, name: wrong})
    with pytest.raises(UserError, match=hutchinson._NEEDED[name][1]):
        hutchinson.check_curvature(args, "hutchinson")
    hutchinson.check_curvature(args, "gnb")
    hutchinson.check_curvature(Namespace(**FINE), "hutchinson")


@pytest.mark.parametrize("kind", ["gnb", "hutchinson"])
def test_context_parallelism_is_refused(kind):
    with pytest.raises(UserError, match="--context-parallel-size 1"):
        hutchinson.check_curvature(Namespace(**FINE, context_parallel_size=2), kind)


def test_a_run_has_one_kind_of_curvature():
    sophia = [
        ParamGroupConfig(".*", "sophia", {"curvature": kind} if kind else {}) for kind in (None, "gnb", "hutchinson")
    ]
    assert curvature_kind([ParamGroupConfig(".*", "adamw")]) is None
    assert curvature_kind(sophia[:2]) == "gnb" and curvature_kind(sophia[2:]) == "hutchinson"
    with pytest.raises(UserError, match="choose one for both"):
        curvature_kind(sophia)
