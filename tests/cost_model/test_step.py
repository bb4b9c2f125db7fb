"""Predicted steps: what must grow with what, memory by hand, cluster files, search, command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.cli import main
from megatron_opt.cost_model import cluster as clusters
from megatron_opt.cost_model.cluster import Cluster, Link, interpolate, load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.report import as_dict, text
from megatron_opt.cost_model.search import search
from megatron_opt.cost_model.step import Step, predict, stage_seconds
from megatron_opt.errors import UserError

SEVEN = "--preset llama-7b --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

OFFLOAD = "--optimizer-cpu-offload"
COPIES = "--num-distributed-optimizer-instances 8"


def step(words: str, gpus: int = 64, machine: Cluster | None = None, exact: bool = True) -> Step:
    return predict(parse(words.split())[0], machine or load("h100"), gpus, exact=exact)


def test_parts_add_up() -> None:
    s = step(f"{SEVEN} --optimizer soap --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")
    parts = s.forward_backward + s.bubble + s.traffic.exposed + s.optimizer.mean
    assert s.seconds == pytest.approx(parts)
    assert s.ordinary < s.seconds < s.refresh_step
    every = s.optimizer.refresh_every
    assert s.seconds == pytest.approx(s.ordinary + (s.refresh_step - s.ordinary) / every)


def test_staggered_refreshes_even_the_steps_and_keep_the_mean() -> None:
    burst = step(f"{SEVEN} --optimizer soap")
    even = step(f"{SEVEN} --optimizer soap --soap-stagger true")
    assert even.seconds == pytest.approx(burst.seconds)
    assert even.refresh_step == pytest.approx(even.seconds)


@pytest.mark.parametrize(("kind", "passes"), [("gnb", 1), ("hutchinson", 2)])
def test_an_estimate_of_curvature_is_passes_over_the_batches_once_in_its_period(kind: str, passes: int) -> None:
    adamw = step(f"{SEVEN} --optimizer adamw")
    s = step(f"{SEVEN} --optimizer sophia --sophia-curvature {kind} --sophia-curvature-every 5")
    assert adamw.curvature == 0 and s.base == adamw.base
    assert s.seconds - s.ordinary == pytest.approx(passes * s.base / 5)
    assert s.refresh_step - s.ordinary == pytest.approx(passes * s.base)
    assert s.optimizer_flops == pytest.approx(passes * s.training_flops / 5)
    assert "once in 5 steps" in text(s) and as_dict(s)["seconds"]["optimizer"]["curvature"] == s.curvature


def test_bubble_is_stages_less_one_over_microbatches() -> None:
    """Where stages are equal; the last one's output layer makes it the slowest, and the others pass by faster."""
    words = f"{SEVEN} --optimizer adamw --pipeline-model-parallel-size 4"
    s = step(words)
    even, last = stage_seconds(s.model, s.layout, s.cluster)[0], stage_seconds(s.model, s.layout, s.cluster)[-1]
    assert s.bubble / s.forward_backward == pytest.approx(3 * even / last / s.layout.microbatches)
    assert 0.9 < even / last < 1
    v = step(f"{words} --num-virtual-stages-per-pipeline-rank 2")
    assert v.bubble == pytest.approx(s.bubble / 2)


def test_memory_of_adamw_by_hand() -> None:
    """bf16 with the distributed optimizer: 2 + 4 bytes a parameter, and 4 + 8 over the data-parallel ranks."""
    s = step(f"{SEVEN} --optimizer adamw", 64)
    n = s.model.total_parameters
    assert s.memory.parameters == 2 * n and s.memory.gradients == 4 * n
    assert s.memory.main_copies == pytest.approx(4 * n / 64)
    assert s.memory.optimizer_state == pytest.approx(8 * n / 64)
    averaged = step(f"{SEVEN} --optimizer adamw --ema-decay 0.999", 64)
    assert averaged.memory.optimizer_state == pytest.approx(12 * n / 64)
    assert averaged.optimizer.element_wise > s.optimizer.element_wise


def test_instances_of_the_distributed_optimizer_by_hand() -> None:
    """64 GPUs in 8 instances: main copies and states over 8 ranks, shards summed over 8 copies; owners' traffic at least."""
    one, eight = (step(f"{SEVEN} --optimizer adamw {more}") for more in ("", COPIES))
    n = one.model.total_parameters
    assert eight.memory.main_copies == pytest.approx(8 * one.memory.main_copies)
    assert eight.memory.optimizer_state == pytest.approx(8 * n / 8)
    assert one.traffic.sent["data gradients"] == pytest.approx(4 * n * 63 / 64)
    assert eight.traffic.sent["data gradients"] == pytest.approx(4 * n * 7 / 8)
    assert eight.traffic.sent["data gradients between instances"] == pytest.approx(4 * n / 8 * 2 * 7 / 8)
    assert eight.traffic.sent["data parameters"] == pytest.approx(2 * n * 7 / 8)
    # within a node NVLink, between nodes an eighth of the gradients: the network has less to do than in one ring of 64
    assert eight.traffic.seconds["data parameters"] < one.traffic.seconds["data parameters"]


def test_owners_across_instances_compute_once_and_send_to_all() -> None:
    across, within = (step(f"{SEVEN} --optimizer muon {COPIES} --matrix-instances {x}") for x in ("across", "within"))
    assert within.optimizer_flops == pytest.approx(8 * across.optimizer_flops)
    assert within.optimizer.state_bytes > 5 * across.optimizer.state_bytes
    hidden = 4 * sum(info.numel for info in across.plans[0][0].infos.values())
    assert across.optimizer.sent["updates to shards"] == pytest.approx(hidden / 64 * 8, rel=0.1)
    assert within.optimizer.sent["updates to shards"] == pytest.approx(hidden / 8 * 7 / 8, rel=0.1)
    for name in ("muon", "soap"):
        auto, other = (step(f"{SEVEN} --optimizer {name} {COPIES} {x}") for x in ("", "--matrix-instances within"))
        assert auto.plans[0][0].plan.instances == 1 and auto.optimizer.mean < 0.6 * other.optimizer.mean
    with pytest.raises(UserError, match="not divisible by --num-distributed-optimizer-instances 8"):
        step(f"{SEVEN} --optimizer muon {COPIES}", 12)


def test_state_in_host_memory_leaves_the_gpu_and_takes_the_link() -> None:
    """SOAP's 7B on 8 × 80 GB: all of the state on the host but two batches; what the link takes beyond the step's work shows."""
    words = f"{SEVEN} --optimizer soap --micro-batch-size 1"
    here, half, away = (step(f"{words} {x}", 8) for x in ("", f"{OFFLOAD} --optimizer-offload-fraction 0.5", OFFLOAD))
    state = here.memory.optimizer_state
    assert away.memory.optimizer_state == 0 and away.optimizer.host_bytes == pytest.approx(state)
    assert half.optimizer.host_bytes == pytest.approx(state / 2) == pytest.approx(half.memory.optimizer_state)
    assert away.memory.total < 70e9 < here.memory.total < 80e9
    way = state / away.cluster.host.bandwidth  # type: ignore[union-attr]
    assert way - away.optimizer.compute < away.optimizer.offload < 1.2 * way
    assert away.seconds - here.seconds == pytest.approx(away.optimizer.offload, rel=1e-3)
    assert "state in host memory" in text(away) and "state in host memory" not in text(here)
    fast = replace(away.cluster, host=Link(1e13, 0.0))
    assert step(f"{words} {OFFLOAD}", 8, fast).optimizer.offload < 0.01 * away.optimizer.offload
    with pytest.raises(UserError, match="section `host`"):
        step(f"{words} {OFFLOAD}", 8, replace(away.cluster, host=None))


def test_soap_in_bf16_fits_where_adamw_in_fp32_does() -> None:
    """7B on four H100, 2,048 tokens a micro-batch: SOAP in fp32 does not."""
    narrow = "--soap-factor-precision bf16 --soap-moment-dtype bf16"
    found = {
        name: step(f"{SEVEN} --seq-length 2048 --global-batch-size 64 --optimizer {name}", 4, exact=False).memory.total
        for name in ("adamw", "soap", f"soap {narrow}")
    }
    adamw, wide, small = found.values()
    assert small < adamw < load("h100").memory < wide


def test_without_the_distributed_optimizer_every_rank_keeps_all() -> None:
    s = step("--preset llama-130m --optimizer adamw", 8)
    assert s.memory.optimizer_state == 8 * s.model.total_parameters


def test_recomputation_trades_time_for_memory() -> None:
    none, full = (step(f"{SEVEN} --optimizer adamw {more}") for more in ("", "--recompute-granularity full"))
    assert full.memory.activations < 0.3 * none.memory.activations
    assert 1.2 < full.forward_backward / none.forward_backward < 1.4


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["adamw", "muon", "soap"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.floats(1.0, 8.0),
    st.floats(1.0, 8.0),
    st.floats(1.0, 8.0),
)
def test_a_better_machine_is_never_slower(name: str, tp: int, pp: int, flops: float, memory: float, net: float) -> None:
    words = f"{SEVEN} --optimizer {name} --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    base = load("h100")
    better = replace(
        base,
        passes=tuple((size, rate * memory) for size, rate in base.passes),
        network=Link(base.network.bandwidth * net, base.network.latency),
        node=Link(base.node.bandwidth * net, base.node.latency),
        rates={
            kind: {t: tuple((x, y * flops) for x, y in curve) for t, curve in by.items()}
            for kind, by in base.rates.items()
        },
    )
    assert step(words, 64, better, exact=False).seconds <= step(words, 64, base, exact=False).seconds * (1 + 1e-9)


def test_more_tokens_make_the_optimizer_cheaper_and_its_time_stays() -> None:
    small, large = (step(f"{SEVEN} --optimizer muon --global-batch-size {size}") for size in (64, 2048))
    assert small.optimizer.mean == pytest.approx(large.optimizer.mean)
    assert small.optimizer_share > 10 * large.optimizer_share


def test_exchange_counts_what_a_matrix_travels() -> None:
    """Two tensor-parallel ranks: half of every matrix comes to its owner in fp32, half of each owned one goes back."""
    s = step("--preset llama-130m --optimizer muon --tensor-model-parallel-size 2", 2)
    hidden = 134_217_728
    assert s.optimizer.sent["gradients to owners"] == pytest.approx(4 * hidden / 4, rel=0.02)  # by the fuller owner
    assert s.optimizer.sent["updates to shards"] == pytest.approx(4 * hidden / 4, rel=0.02)


def test_a_host_that_runs_ahead_counts_only_where_it_is_the_slower() -> None:
    s = step(f"{SEVEN} --optimizer muon")
    kernels = sum(s.optimizer.by_class.values()) + s.optimizer.element_wise
    assert s.optimizer.compute == max(kernels, s.optimizer.host)


def test_every_packaged_cluster_is_whole_and_sourced() -> None:
    assert set(clusters.names()) >= {"a100", "h100", "h200", "b200", "gb300"}
    for name in clusters.names():
        found = load(name)
        assert found.sources and found.memory > 1e9
        for kind, by_type in found.rates.items():
            for dtype, curve in by_type.items():
                rates = [rate for _, rate in curve]
                assert rates == sorted(rates), (name, kind, dtype)
                assert rates[-1] <= found.peak.get(dtype, found.peak["bf16"]) * (2 if kind == "solve" else 1)


def test_interpolation_meets_its_points_and_stays_between() -> None:
    curve = ((128.0, 1e12), (512.0, 4e12))
    assert interpolate(curve, 128) == 1e12 and interpolate(curve, 512) == pytest.approx(4e12)
    assert interpolate(curve, 256) == pytest.approx(2e12)
    assert interpolate(curve, 1) == 1e12 and interpolate(curve, 1e6) == 4e12


def test_unknown_gpu_and_too_many_devices() -> None:
    with pytest.raises(UserError, match="no cluster 'h300'"):
        load("h300")
    with pytest.raises(UserError, match="has 8"):
        step(SEVEN, 64, replace(load("h100"), devices=8))
    with pytest.raises(UserError, match="no number of devices"):
        step(SEVEN, 0)


@pytest.mark.parametrize("gpus", [64, 256, 1024])
def test_search_ranks_layouts_that_fit_and_counts_the_rest(gpus: int) -> None:
    flags, _ = parse(["--preset", "llama-7b", "--optimizer", "muon"])
    machine = load("h100")
    found = search(flags, machine, gpus)
    times = [s.seconds for s in found.steps]
    assert found.steps and times == sorted(times)
    assert all(s.memory.total <= machine.memory and s.layout.world == gpus for s in found.steps)
    assert sum(found.refused.values()) > 0 and all(found.examples.values())
    with pytest.raises(UserError, match="--global-batch-size"):
        search({k: v for k, v in flags.items() if k != "global-batch-size"}, machine, gpus)


def test_search_says_when_nothing_fits(capsys: pytest.CaptureFixture) -> None:
    assert (
        main(
            [
                "cost",
                "search",
                "--cluster",
                "a100",
                "--gpus",
                "8",
                "--preset",
                "llama-7b",
                "--num-layers",
                "256",
                "--optimizer",
                "adamw",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "no layout fits" in out and "memory" in out


def test_command_prints_the_breakdown_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "step.json"
    words = f"cost step --cluster h100 --gpus 64 {SEVEN} --optimizer soap --json {file} --plan --log-progress"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    for part in (
        "forward and backward",
        "exchange with owners",
        "refreshes, mean",
        "fits in 80.00 GB",
        "--log-progress",
    ):
        assert part in out
    content = json.loads(file.read_text())
    s = step(f"{SEVEN} --optimizer soap")
    assert content["seconds"]["step"] == s.seconds and content == json.loads(json.dumps(as_dict(s)))
    assert "DOES NOT FIT" in text(step("--preset llama-7b --optimizer soap", 1))


@pytest.mark.parametrize(
    "words",
    [
        "cost step --cluster h300 --gpus 8 --preset llama-7b",
        "cost step --cluster h100 --gpus -8 --preset llama-7b",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --optimizer sap",
        "cost step --cluster h100 --gpus 8 --hidden-size 64",
        "cost step --cluster h100 --gpus 8 --from /nonexistent",
        "cost search --cluster h100 --gpus 8 --preset llama-7b --top 0",
        "cost step --cluster h100 --gpus eight --preset llama-7b",
        "cost step --cluster h100 --gpus 100000000000 --preset llama-7b",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --num-layers 1.5",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --micro-batch-size 0",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --bf16 maybe",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --bf16 --fp16",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --matrix-mode some",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --num-query-groups 7 --group-query-attention",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --num-experts 4 --moe-router-topk 9",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --optimizer muon --muon-num-ns-steps abc",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --recompute-granularity selective --recompute-modules x",
        "cost step --cluster h100 --gpus 8 --preset llama-7b --json /proc/x/y",
        "cost",
        "cost tables --cluster h100 --output /tmp/x --optimizers sap",
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
