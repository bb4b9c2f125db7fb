"""The search: every layout counted, the best found, and published layouts among its first."""

import io
import re
import time

import pytest

from megatron_opt.cost_model import search as searching
from megatron_opt.cost_model.cluster import load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.search import SearchResult, candidates, search, table
from megatron_opt.cost_model.step import predict_layout
from tests.cost_model.published import LLAMA, MODELS

DEEPSEEK = (
    f"{LLAMA} --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 "
    "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --num-experts 256 --moe-ffn-hidden-size 2048 "
    "--moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 --moe-layer-freq ([0]*3+[1]*58) "
    "--seq-length 4096 --vocab-size 129280 --bf16"
)
# as it was trained: fp8, what SwiGLU reads kept in fp8, a token to 4 of 8 nodes, all-to-all under computation
DEEPSEEK_RUN = (
    f"{DEEPSEEK} --global-batch-size 15360 --fp8-format e4m3 --activation-func-fp8-input-store "
    "--moe-token-dispatcher-type flex --moe-router-num-groups 8 --moe-router-group-topk 4 "
    "--overlap-moe-expert-parallel-comm"
)
LLAMA_405B = MODELS["llama3-405b"].replace("--num-layers 128", "--num-layers 126") + " --bf16"
LLAMA_8B = MODELS["llama3-8b"] + " --bf16 --global-batch-size 128 --grad-reduce-in-bf16"
GPT_175B = MODELS["gpt-175b"] + " --bf16"


def found(words: str, machine: str, gpus: int, top: int = 10) -> SearchResult:
    return search(parse(words.split())[0], load(machine), gpus, top=top)


def rank(result: SearchResult, **sizes: int) -> int:
    """Place of the first layout with these sizes, from 1; 99 where there is none."""
    places = [
        place
        for place, step in enumerate(result.steps, 1)
        if all(getattr(step.layout, key) == value for key, value in sizes.items())
    ]
    return min(places, default=99)


@pytest.mark.parametrize(
    ("words", "machine", "gpus", "sizes", "place"),
    [
        # arXiv 2412.19437, section 3.2: 2,048 H800, PP16, EP64 over 8 nodes, no tensor parallelism
        (DEEPSEEK_RUN, "h800", 2048, {"tp": 1, "cp": 1, "pp": 16, "ep": 64}, 6),
        # arXiv 2407.21783, table 4: 16,384 H100; 8k sequences, and 131k with context parallelism
        (f"{LLAMA_405B} --global-batch-size 2048", "h100", 16384, {"tp": 8, "pp": 16}, 3),
        (f"{LLAMA_405B} --seq-length 131072 --global-batch-size 128", "h100", 16384, {"tp": 8, "pp": 16}, 3),
        # Megatron Bridge, performance summary 25.11: 405B on 1,024 H100 is TP8 PP8 CP2; bf16 weights beside FP8's would not fit
        (
            f"{LLAMA_405B} --fp8-format hybrid --fp8-param-gather --global-batch-size 512",
            "h100",
            1024,
            {"tp": 8, "pp": 8, "cp": 2},
            5,
        ),
        # NVIDIA's recipe of Llama 3 8B on one node: CP2
        (LLAMA_8B, "h100", 8, {"tp": 1, "pp": 1, "cp": 2}, 2),
        # arXiv 2104.04473, section 5.1: GPT 175B on 768 A100 is TP8 PP12; PP is tried in powers of two
        (f"{GPT_175B} --global-batch-size 1536", "a100", 1024, {"tp": 8, "pp": 8}, 10),
    ],
)
def test_published_layouts_are_among_the_first(
    words: str, machine: str, gpus: int, sizes: dict[str, int], place: int
) -> None:
    result = found(words, machine, gpus)
    assert rank(result, **sizes) <= place, table(result)


def test_deepseek_v3_takes_seconds_and_every_layout_is_counted() -> None:
    start = time.process_time()
    result = found(f"{DEEPSEEK} --global-batch-size 8192", "h100", 2048)
    assert time.process_time() - start < 20
    assert result.tried == len(result.steps) + sum(result.refused.values())
    assert result.steps[0].layout.pp > 1, "61 layers are cut unevenly"
    assert result.steps[0].traffic.exposed < 0.3 * result.steps[0].seconds
    shown = table(result)
    counts = [int(n.replace(",", "")) for n in re.findall(r"^ +([\d,]+)  ", shown.split("fell out:")[1], re.M)]
    assert sum(counts) + len(result.steps) == result.tried
    assert "--decoder-first-pipeline-num-layers" in shown or "--pipeline-model-parallel-layout" in shown


def test_bounds_never_hide_the_best() -> None:
    """Against predicting every candidate whole."""
    flags, _ = parse("--preset llama-130m --num-layers 4 --optimizer muon --global-batch-size 16 --bf16".split())
    machine = load("h100")
    result = search(flags, machine, 4, top=5)
    model, base = searching._base(flags, machine)
    group_configs = searching.flag_reader.grouping(flags)
    best: dict[tuple[int, ...], float] = {}
    for layout in candidates(model, base, machine, 4):
        if layout.problem(model) or layout.pp > 2:
            continue
        step = predict_layout(model, layout, machine, group_configs, "muon")
        if step.memory.total <= machine.memory:
            key = layout.tp, layout.cp, layout.pp, layout.ep
            best[key] = min(best.get(key, 1e9), step.seconds)
    expected = sorted(best.values())[:3]
    mine = [step.seconds for step in result.steps if step.layout.pp <= 2][:3]
    assert mine == pytest.approx(expected[: len(mine)]) and len(mine) > 1


def test_progress_is_one_line_that_is_wiped() -> None:
    stream = io.StringIO()
    flags, _ = parse(["--preset", "llama-7b", "--optimizer", "adamw"])
    search(flags, load("h100"), 64, progress=stream)
    text = stream.getvalue()
    assert "layouts that may fit" in text and "\n" not in text and text.endswith("\r")


def test_a_router_limited_to_nodes_sends_less_between_them() -> None:
    from megatron_opt.cost_model.traffic import expert_transfer

    flags, _ = parse(DEEPSEEK.split())
    model, machine = searching.Model.of(flags), load("h800")
    layout = Layout(2048, pp=16, ep=64, global_batch=8192, dtype="bf16", split=(3, *[4] * 14, 2))
    plain = expert_transfer(model, layout, machine)[0]
    once = expert_transfer(model, searching.replace(layout, dispatcher="flex"), machine)[0]
    limited = searching.replace(layout, dispatcher="flex", node_limit=4, expert_groups=8)
    assert expert_transfer(model, limited, machine)[0] < once < plain
    inside = expert_transfer(model, searching.replace(layout, ep=8), machine)[0]
    assert inside < expert_transfer(model, limited, machine)[0]
