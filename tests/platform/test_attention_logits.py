"""The largest attention logits: blocks give what the whole gives, whatever is hidden; who records, and when."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.platform import attention_logits


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 2), st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1)])),
    causal=st.booleans(),
    hides=st.booleans(),
    rows=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_whole(sizes, causal, hides, rows, seed):
    torch.manual_seed(seed)
    length, batch, (heads, groups) = sizes
    query, key = torch.randn(length, batch, heads, 5), torch.randn(length, batch, groups, 5)
    hidden = torch.rand(batch, 1, length, length) < 0.4 if hides else None
    scores = torch.einsum("sbhd,tbhd->bhst", query.double(), key.double().repeat_interleave(heads // groups, 2)) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    before, attention_logits._ELEMENTS = attention_logits._ELEMENTS, rows * batch * heads * length
    try:
        actual = attention_logits.maxima(query, key, 0.3, hidden, causal)
    finally:
        attention_logits._ELEMENTS = before
    torch.testing.assert_close(actual, scores.amax((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)


def test_a_nan_is_not_lost():
    query, key = torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4)
    query[1, 0, 1] = torch.nan
    found = attention_logits.maxima(query, key, 1.0, causal=True)
    assert found[0] == 4 and found[1].isnan()


def test_only_training_with_gradients_is_recorded():
    config = SimpleNamespace(qk_clip=False, log_max_attention_logit=True)
    module = SimpleNamespace(config=config, training=False)
    small, large = torch.ones(2, 1, 2, 4), 3 * torch.ones(2, 1, 2, 4)
    attention_logits.record(module, large, large, 1.0)
    module.training = True
    with torch.no_grad():
        attention_logits.record(module, large, large, 1.0)
    assert not hasattr(module, attention_logits.NAME)
    for microbatch in (large, small):
        attention_logits.record(module, microbatch, microbatch, 1.0)
    assert module.current_max_attn_logits.tolist() == [36.0, 36.0]
    config.log_max_attention_logit = False
    attention_logits.record(module, 2 * large, large, 1.0)
    assert module.current_max_attn_logits.tolist() == [36.0, 36.0]
