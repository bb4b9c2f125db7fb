"""Attention and norm in place of Megatron's: the same function as its own unfused forward, or a refusal."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt import platform
from megatron_opt.errors import UserError

platform.activate()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

from megatron_opt.platform import local_layers  # noqa: E402
from megatron_opt.platform.replacement import fields_read  # noqa: E402

HEADS, WIDTH = 4, 8
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture(scope="module", autouse=True)
def what_megatron_keeps():
    ours = parallel_state._GLOBAL_MEMORY_BUFFER is None
    if ours:
        parallel_state._set_global_memory_buffer()
    tracker = get_cuda_rng_tracker()
    if "model-parallel-rng" not in tracker.states_:
        tracker.add("model-parallel-rng", 1)
    yield
    if ours:
        parallel_state.destroy_model_parallel()


def config(**fields):
    plain = {"num_layers": 4, "hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "attention_dropout": 0.0}
    return TransformerConfig(**{**plain, "masked_softmax_fusion": False, **fields})


def attention(made, layer=1, mask_type=AttnMaskType.causal):
    return DotProductAttention(made, layer, mask_type, "self", pg_collection=SimpleNamespace(tp=ONE_RANK))


def documents(length, cuts):
    """True where a token may not look: ahead, or into a document that ended before."""
    document = torch.tensor([sum(cut <= place for cut in cuts) for place in range(length)])
    return (torch.ones(length, length).triu(1) > 0) | (document[:, None] != document)


@settings(max_examples=60)
@given(
    layer=st.integers(1, 4),
    length=st.integers(1, 12),
    groups=st.sampled_from([1, 2, 4]),
    mask_type=st.sampled_from([AttnMaskType.causal, AttnMaskType.no_mask]),
    cuts=st.none() | st.lists(st.integers(1, 11), max_size=3),
    fields=st.fixed_dictionaries(
        {
            "apply_query_key_layer_scaling": st.booleans(),
            "window_size": st.none() | st.integers(0, 12).map(lambda back: (back, 0)),
            "window_attn_skip_freq": st.none() | st.integers(1, 3) | st.just([0, 1, 1, 0]),
            "softmax_type": st.sampled_from(["vanilla", "off-by-one", "learnable"]),
            "attention_softmax_in_fp32": st.booleans(),
            "kv_channels": st.sampled_from([WIDTH, 6]),
        }
    ),
    sequence_parallel=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_the_same_function(layer, length, groups, mask_type, cuts, fields, sequence_parallel, dtype, seed):
    torch.manual_seed(seed)
    made = config(num_query_groups=groups, params_dtype=dtype, **fields)
    made.sequence_parallel = sequence_parallel  # Megatron lets nobody say so on one rank
    core = attention(made, layer, mask_type)
    mask = None if cuts is None or core.scale_mask_softmax.window_size else documents(length, cuts)
    shapes = [(length, 2, heads, made.kv_channels) for heads in (HEADS, groups, groups)]
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    learned = [core.softmax_offset] if made.softmax_type == "learnable" else []
    weights = torch.randn(length, 2, HEADS * made.kv_channels, dtype=dtype)
    results = []
    for forward in (local_layers.ATTENTION.original(), DotProductAttention.forward):
        out = forward(core, *inputs, mask, mask_type)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [*inputs, *learned])])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


def test_a_window_and_documents_hold_together():
    """Megatron's own forward drops the mask it is given where there is a window."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 1, HEADS, WIDTH, dtype=torch.float64) for _ in range(3))
    out = attention(config(window_size=(2, 0)))(q, k, v, documents(9, [4]))
    hidden = documents(9, [4]) | (torch.ones(9, 9).tril(-3) > 0)
    scores = (torch.einsum("sbhd,tbhd->bhst", q, k) / WIDTH**0.5).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(2))


def test_values_of_another_width():
    """As in multi-latent attention."""
    core = attention(config())
    q, k = torch.randn(2, 7, 1, HEADS, WIDTH, dtype=torch.float64)
    v = torch.randn(7, 1, HEADS, 5, dtype=torch.float64)
    scores = (torch.einsum("sbhd,tbhd->bhst", q, k) / WIDTH**0.5).masked_fill(documents(7, []), -torch.inf)
    torch.testing.assert_close(core(q, k, v, None), torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(2))
    with pytest.raises(UserError, match="--softmax-type off-by-one with --multi-latent-attention"):
        attention(config(softmax_type="off-by-one"))(q, k, v, None)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (4, 1)])
def test_a_window_that_looks_ahead_or_nowhere_is_refused(window):
    q = torch.randn(6, 1, HEADS, WIDTH)
    with pytest.raises(UserError, match="--window-size"):
        attention(config(window_size=window))(q, q, q, None)


def test_dropout_keeps_the_expectation_and_is_drawn_from_megatrons_generator():
    core = attention(config(attention_dropout=0.25))
    q, k = torch.randn(2, 4, 1, HEADS, WIDTH)
    v = torch.ones(4, 1, HEADS, WIDTH)
    torch.manual_seed(0)
    mean = torch.stack([core(q, k, v, None) for _ in range(2000)]).mean()
    assert abs(float(mean) - 1) < 0.02
    before = torch.get_rng_state()
    core(q, k, v, None)
    assert torch.equal(torch.get_rng_state(), before)
    core.config.sequence_parallel = True
    core(q, k, v, None)
    assert not torch.equal(torch.get_rng_state(), before)


# ---- the rule: what Megatron's code reads and ours does not stands at its default


def test_what_the_two_read():
    """A new Megatron that reads more fields fails here: honour them, or let them be refused."""
    assert local_layers.ATTENTION.unread() == {"context_parallel_size"}
    assert local_layers.NORM.unread() == {"layernorm_zero_centered_gamma", "memory_efficient_layer_norm"}
    for replacement in local_layers.REPLACEMENTS:
        assert replacement.honours <= replacement.read()


def test_nothing_else_that_is_replaced_reads_a_configuration():
    others = set(platform.replacements()) - set(local_layers.REPLACEMENTS)
    assert others and not any(replacement.unread() for replacement in others)


@pytest.mark.parametrize(
    ("make", "replacement"),
    [
        (lambda made: attention(made), local_layers.ATTENTION),
        (lambda made: WrappedTorchNorm(made, HEADS * WIDTH), local_layers.NORM),
    ],
)
def test_a_field_that_is_not_read_is_refused_away_from_its_default(make, replacement):
    make(config())
    for name in replacement.unread():
        made = config()
        default = next(field.default for field in dataclasses.fields(made) if field.name == name)
        setattr(made, name, not default if isinstance(default, bool) else default + 1)
        flag = {"layernorm_zero_centered_gamma": "--apply-layernorm-1p"}.get(name, f"--{name.replace('_', '-')}")
        with pytest.raises(UserError, match=f"^{flag} "):
            make(made)


def test_every_form_of_reading_is_found():
    def reads(self, config):
        return self.config.one, config.two, getattr(config, "three", 0), getattr(self.config, "four"), self.five  # noqa: B009

    assert fields_read(reads) == {"one", "two", "three", "four"}


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm(kind):
    made = config(normalization=kind)
    made.sequence_parallel = True
    norm = WrappedTorchNorm(made, 16, eps=1e-3)
    x = torch.randn(5, 16, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm.double()(x), expected)
    assert all(param.sequence_parallel for param in norm.parameters())


def test_a_norm_that_torch_has_not_is_refused():
    made = config()
    made.normalization = "L2Norm"
    with pytest.raises(UserError, match="--normalization L2Norm"):
        WrappedTorchNorm(made, 16)
