"""Any options in their ranges give finite numbers or a sentence with a flag; rules pickle and deep-copy."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.kron import UpdateSchedule

NAMES = sorted(registry.optimizers())
SHAPES = ((6, 4), (3, 8), (5,))


def _values(item):
    """Everything that an option takes, its limits and values near them often."""
    meta = item.metadata
    if choices := meta.get("choices"):
        return st.sampled_from([word for word in choices if word != "custom"])
    if isinstance(item.default, bool):
        return st.booleans()
    low = meta["low"] if meta["low"] is not None else math.nextafter(meta["above"], math.inf)
    high = meta["high"] if meta["high"] is not None else math.nextafter(meta["below"], -math.inf)
    if isinstance(item.default, int):
        return st.one_of(st.integers(low, min(high, low + 8)), st.integers(low, high), st.just(high))
    spread = st.floats(math.log(max(low, 1e-30)), math.log(high)).map(lambda x: min(max(math.exp(x), low), high))
    return st.one_of(st.floats(low, high), spread, st.sampled_from([low, high, item.default]))


def _options(name):
    items = [
        each for each in dataclasses.fields(registry.optimizers()[name].Config) if not isinstance(each.default, tuple)
    ]
    return st.fixed_dictionaries({}, optional={item.name: _values(item) for item in items})


def _drop_without_effect(name, options):
    """Options without those that another one leaves without effect."""
    fields = registry.optimizers()[name].Config.__dataclass_fields__
    kept = dict(options)
    for key in options:
        other, value = fields[key].metadata.get("needs") or ("", None)
        if other and options.get(other, fields[other].default) != value:
            del kept[key]
    return kept


def _gradients(seed, shape, scale):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn((4, *shape), generator=generator)
    wide[2] = 0.0  # a step without a gradient
    wide[3, ..., 0] = 0.0
    return wide * scale


def _all_finite(name, options, scale):
    optimizer = registry.build(name, options)
    for number, shape in enumerate(SHAPES):
        if isinstance(optimizer, MatrixOptimizer):
            if len(shape) == 1 and not optimizer.vectors:
                continue
            info = MatrixInfo(f"layers.{number}.weight", shape)
            state = optimizer.init_state(torch.full(shape, 0.1), info)
            found = [
                optimizer.update([g.clone()], [state], step, [info])[0]
                for step, g in enumerate(_gradients(number, shape, scale), 1)
            ]
        else:
            param = torch.full(shape, 0.1)
            state = optimizer.init_state(param)
            found = [param]
            for step, g in enumerate(_gradients(number, shape, scale), 1):
                optimizer.update([param], [g.clone()], [state], step, 1e-3, 0.1)
        for tensor in (*found, *state.values()):
            assert tensor.isfinite().all(), (name, options, scale, shape)


@pytest.mark.parametrize("name", NAMES)
def test_options_anywhere_in_their_ranges_give_finite_numbers(name):
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(_options(name), st.sampled_from([1.0, 1e-6, 1e3]))
    def holds(options, scale):
        try:
            _all_finite(name, _drop_without_effect(name, options), scale)
        except UserError as error:
            assert str(error).startswith(f"--{name}-".replace("_", "-")), error

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_each_limit_alone_gives_finite_numbers(name):
    for item in dataclasses.fields(registry.optimizers()[name].Config):
        if isinstance(item.default, bool | str | tuple):
            continue
        for key in ("low", "high"):
            if (limit := item.metadata[key]) is not None:
                options = {item.name: limit}
                if needs := item.metadata["needs"]:
                    options[needs[0]] = needs[1]
                _all_finite(name, options, 1.0)


@given(st.floats(1e-9, 1.0), st.integers(0, 10**12), st.integers(1, 3000))
@example(0.03, 10**12, 1)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_krons_schedule_is_a_share_of_the_steps(final, flat_start, steps):
    schedule = UpdateSchedule(final, flat_start)
    updates = [schedule(step) for step in range(1, steps + 1)]
    flat = min(flat_start, steps)
    assert updates[:flat] == list(range(1, flat + 1))
    assert all(b in (0, last + 1) for last, b in zip(_running(updates), updates))


def _running(numbers):
    last = 0
    for number in numbers:
        yield last
        last = max(last, number)


@pytest.mark.parametrize("wrong", [((1.0, 2.0),), ((1.0, 2.0, math.inf),), ((1.0, 2.0, "x"),), ((9.0, 9.0, 9.0),)])
def test_custom_coefficients_that_diverge_or_are_none_are_refused(wrong):
    with pytest.raises(UserError, match=r"^--muon-custom-coefficients "):
        registry.build("muon", dict(coefficient_type="custom", custom_coefficients=wrong))


@pytest.mark.parametrize("name", NAMES)
def test_rules_and_their_classes_pickle_and_deep_copy(name):
    cls = registry.optimizers()[name]
    assert pickle.loads(pickle.dumps(cls)) is cls and copy.deepcopy(cls) is cls
    optimizer = registry.build(name, {})
    if isinstance(optimizer, MatrixOptimizer):  # also after a step, with what it has learnt of its matrices
        info = MatrixInfo("layers.0.weight", (6, 4))
        state = optimizer.init_state(torch.ones(6, 4), info)
        optimizer.update([torch.ones(6, 4)], [state], 1, [info])
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(twin) is cls and twin.config == optimizer.config
        if isinstance(optimizer, MatrixOptimizer):
            grad, states = torch.randn(6, 4), [state, copy.deepcopy(state)]
            (mine,), (its,) = (r.update([grad.clone()], [s], 2, [info]) for r, s in zip((optimizer, twin), states))
            assert torch.equal(mine, its)
            state = states[0]
