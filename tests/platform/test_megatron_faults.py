"""Megatron's faults that change numbers, and multi-latent attention on local layers."""

from types import SimpleNamespace

import pytest
import torch

from megatron_opt.platform import latent_attention, megatron_faults
from tests.training.test_bad_input import MODEL, pretrain


class Group:
    def __init__(self, size):
        self.size = lambda: size


@pytest.mark.parametrize(("name", "factor"), [("global_load_balancing_loss", 4.0), ("load_balancing_loss", 1.0)])
def test_the_parts_of_a_global_aux_loss_are_summed(name, factor):
    """A rank's gradient is averaged over DP afterwards: times DP it is the sum of the parts. What is logged is not scaled."""
    logged = []

    def original(self, activation, coefficient, loss, name, group, **named):
        logged.append(float(loss))
        return loss

    router = SimpleNamespace(tp_dp_cp_group=Group(8), tp_cp_group=Group(2))  # DP 4
    part = torch.tensor(3.0, requires_grad=True)
    attach = megatron_faults._global_aux_loss(original)
    attach(router, None, 1.0, part * 2, name, None, needs_dp_avg=False).backward()
    assert logged == [6.0] and part.grad == 2.0 * factor


def test_local_attention_is_built_by_mla_with_its_scale_only(monkeypatch):
    built = []
    monkeypatch.setattr(
        type(latent_attention.CHANNELS), "original", lambda _: lambda self, *args, **kwargs: built.append(kwargs)
    )
    build = latent_attention.CHANNELS.function
    build(object(), softmax_scale=0.3, k_channels=12, v_channels=8)
    build(object(), softmax_scale=None)
    assert built == [{"softmax_scale": 0.3}, {"softmax_scale": None}]
    with pytest.raises(AssertionError, match="scale"):
        build(object(), k_channels=12, v_channels=8)


@pytest.mark.slow
def test_multi_latent_attention_trains_on_cpu(tmp_path):
    flags = "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 12"
    code, said = pretrain([*MODEL, *flags.split(), "--mock-data", "--position-embedding-type", "rope"], cwd=tmp_path)
    assert code == 0, said[-2000:]
