"""Messages between ranks: named fields come back as they went, integers too; what does not fit is refused."""

import pytest
import torch

from megatron_opt.optimizers.message import Message

MIXED = Message(
    {
        "begun": ((1,), torch.bool),
        "bases": ((2, 3, 3), torch.float32),
        "none": ((0, 3), torch.float32),
        "order": ((2, 3), torch.int32),
        "wide": ((3,), torch.float64),
    }
)
SUMS = Message({"squares": ((2,), torch.float64), "factors": ((2, 3, 3), torch.float64)})


def values(message, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).mul(2**30).to(dtype)
        for name, (shape, dtype) in message.fields.items()
    }


@pytest.mark.parametrize("message", [MIXED, SUMS], ids=["mixed", "sums"])
def test_fields_come_back_bit_for_bit(message):
    given = values(message, 0)
    column = message.pack(**given)
    assert column.shape == (len(message), 1) and column.dtype == message.dtype
    found = message.unpack(column.clone())
    assert list(found) == list(message.fields)
    for name, value in given.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_integers_beyond_the_floats_own_stay():
    message = Message({"order": ((3,), torch.int32), "x": ((1,), torch.float32)})
    order = torch.tensor([2**24 + 1, 2**31 - 1, -1], dtype=torch.int32)
    assert torch.equal(message.unpack(message.pack(order=order, x=torch.ones(1)))["order"], order)


def test_messages_of_one_type_add_up_field_by_field():
    first, second = values(SUMS, 1), values(SUMS, 2)
    total = SUMS.unpack(SUMS.pack(**first) + SUMS.pack(**second))
    assert all(torch.equal(total[name], first[name] + second[name]) for name in first)


@pytest.mark.parametrize(
    "change", [{"more": torch.ones(1)}, {"squares": torch.ones(3).double()}, {"squares": torch.ones(2)}]
)
def test_other_fields_shapes_and_types_are_refused(change):
    with pytest.raises(ValueError, match=r"wanted"):
        SUMS.pack(**(values(SUMS, 0) | change))
