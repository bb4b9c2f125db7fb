"""State in host memory: the same losses to the bit, every byte there and back once a step, two batches on the device at most."""

import pytest
import torch

from megatron_opt.distributed.host_state import HostStates, Resting
from megatron_opt.distributed.planning import Layout as Sizes
from megatron_opt.distributed.rehearsal import rehearsal
from megatron_opt.engine_options import EngineOptions
from megatron_opt.optimizers.groups import default_group_configs
from megatron_opt.platform.pretended_gpu import OnGpu, cpu
from tests.distributed import cases as c
from tests.distributed.cases import case
from tests.distributed.pool import Pool, Run
from tests.distributed.test_waits import MODEL, NORMS, ONE

STEPS = 3
SMALL = ["--exchange-bucket-mb", "0.01"]  # several batches
SOPHIA = "--optimizer sophia --sophia-curvature-every 2".split()
WAYS = {
    "blocks": (c.TP2_DP2_DIST, [*c.SOAP_BLOCKS, "--matrix-mode", "group"]),
    "strips": (c.DP2_DIST, [*c.SOAP_STRIPS, "--matrix-mode", "sharded", "--bf16"]),
    "muon_h": (c.DP2X2_WITHIN, [*c.MUON_H, "--matrix-mode", "sharded"]),
    "mars": (c.DP2_DIST, ["--optimizer", "mars"]),
    "cautious": (c.TP2, ["--optimizer", "cautious", "--cautious-state-dtype", "int8"]),
    "sophia": (c.DP2_DIST, SOPHIA),
}
SHARES = {"none": [], "all": ["--optimizer-cpu-offload"],
          "half": ["--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5"]}  # fmt: skip
MADE = {
    (way, share): case(c.DENSE, [*flags, *SMALL, *more], layout, f"{way}-{share}", steps=STEPS, hook="offload")
    for way, (layout, flags) in WAYS.items()
    for share, more in SHARES.items()
    if share != "half" or way == "blocks"
}
OFFLOADED = [key for key in MADE if key[1] != "none"]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(list(MADE.values()))


@pytest.mark.parametrize(("way", "share"), OFFLOADED)
def test_nothing_else_changes(runs: dict[str, Run], way: str, share: str) -> None:
    plain, found = runs[f"{way}-none"], runs[f"{way}-{share}"]
    assert found.losses == plain.losses and found.grad_norms == plain.grad_norms
    assert sorted(found.state) == sorted(plain.state)
    for what, ours, theirs in [("weights", found.weights, plain.weights)] + [
        (key, found.state[key], plain.state[key]) for key in plain.state
    ]:
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), what


@pytest.mark.parametrize(("way", "share"), OFFLOADED)
def test_every_byte_comes_and_goes_once_a_step(runs: dict[str, Run], way: str, share: str) -> None:
    again = {"mars": (2, 1), "sophia": (4 / 3, 4 / 3)}.get(way, (1, 1))  # its sum reads state; an estimate after step 2
    for rank in runs[f"{way}-{share}"].ranks:
        of = rank["offload"]
        assert of["resting"] > 0 and len(of["batches"]) > 2
        assert of["moved"] == {
            "to the device": STEPS * again[0] * of["resting"],
            "to the host": STEPS * again[1] * of["resting"],
        }
        pairs = [sum(of["batches"][at : at + 2]) for at in range(len(of["batches"]))]
        assert max(of["batches"]) <= of["most"] <= max(pairs)
        assert of["most"] < of["resting"]
        if share == "half":
            assert abs(of["resting"] - of["state"] / 2) <= of["largest"] / 2
        else:
            assert of["resting"] == of["state"]
    for rank in runs[f"{way}-none"].ranks:
        assert rank["offload"]["resting"] == 0 and not any(rank["offload"]["moved"].values())


@pytest.mark.parametrize(("way", "share"), [("blocks", "all"), ("blocks", "half"), ("muon_h", "all")])
def test_what_rests_is_what_the_plan_says(runs: dict[str, Run], way: str, share: str) -> None:
    for rank in runs[f"{way}-{share}"].ranks:
        of = rank["offload"]
        assert of["of matrices"] == pytest.approx(of["planned"], abs=of["largest"] / 2 + of["numbers"])


@pytest.mark.parametrize("name", ["muon", "soap", "mars", "adamw"])
def test_a_gpu_steps_what_rests_on_the_host(name: str) -> None:
    """On tensors that say `cuda`: at rest on the CPU, in a step on the GPU, no wait of the host more, the same weights."""
    found = []
    for offload in (False, True):
        torch.manual_seed(1)
        options = EngineOptions(optimizer_cpu_offload=offload, exchange_bucket_mb=0.005)
        with rehearsal(MODEL, ONE, default_group_configs(name), meta=False, options=options) as made:
            for _ in range(2):
                made.step()
            assert made.step()[0].waits == {"copy to the host": NORMS}
            found.append([cpu(param).clone() for param in made.params])
            optimizer = made.optimizer
            states = [s for step in optimizer.matrix_steps for s in step.states.values()]
            states += [p.state for step in optimizer.element_steps for ps in step.slices.values() for p in ps]
            large = [tensor for state in states for tensor in state.values() if tensor.numel() > 1]
            assert large and all(isinstance(tensor, OnGpu) != offload for tensor in large)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_plan_is_made_of_it_too() -> None:
    from tests.distributed.test_planning import LLAMA_130M, _planned

    options = EngineOptions(optimizer_cpu_offload=True, optimizer_offload_fraction=0.25)
    (found,) = _planned(LLAMA_130M, Sizes(dp=8, distributed=True), "soap", options=options)
    assert found.plan.offloaded == 0.25


def test_batches_take_turns_in_two_buffers() -> None:
    host = HostStates(torch.device("cpu"), 1.0)
    states = [host.rest({"x": torch.full((n,), float(n)), "flag": torch.ones(1)}) for n in (3, 5, 2)]
    homes = [state["x"] for state in states]
    assert all(isinstance(state, Resting) and list(state.home) == ["x"] for state in states)
    places = []
    for number in host.stream([[state] for state in states]):
        assert states[number]["x"] is not homes[number]
        places.append(states[number]["x"].data_ptr())
        if number == 1:
            assert states[0]["x"] is homes[0] and float(homes[0][0]) == 4.0  # back
            states[1]["x"] = torch.zeros(5)  # a rule may put a tensor of its own there
        else:
            states[number]["x"].add_(1)
    assert places[0] == places[2] != places[1]
    assert [state["x"].tolist() for state in states] == [[4.0] * 3, [0.0] * 5, [3.0] * 2]
    assert all(state["x"] is home for state, home in zip(states, homes, strict=True))
    assert host.moved == {"to the device": 40, "to the host": 40} and host.most == 32
