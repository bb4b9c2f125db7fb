"""QK-clip: the paper's scaling in float64, on every layout that of one process; its bound; what it logs and leaves alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import cases as c
from tests.distributed import recording
from tests.distributed.cases import case
from tests.distributed.compare import assert_same_curve, assert_same_state
from tests.distributed.pool import Pool, Run

HEADS, STEPS = 4, 6
LATENT = "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 12".split()
SMALL = [*c.DENSE, "--num-layers", "2"]
GROUPS = ["--group-query-attention", "--num-query-groups", "2"]
# name -> model, optimizer, threshold, alpha
MODELS = {
    "mha": ([*SMALL], c.MUON, 0.9, 0.5),
    "gqa": ([*SMALL, *GROUPS, "--add-qkv-bias", "--attention-output-gate"], c.ADAMW, 0.9, 0.3),
    "heads": ([*SMALL, *GROUPS, "--split-heads"], c.MUON, 1.1, 0.5),
    "mla": ([*SMALL, *LATENT], c.MUON, 0.85, 0.4),
    "mla-q": ([*SMALL, *LATENT, "--q-lora-rank", "24", "--qk-layernorm"], c.ADAMW, 0.79, 0.5),
}
DEEP = {
    "dense": [*c.DENSE, *c.MUON],
    "tied-soap": [*c.TIED, *c.SOAP],
    "gqa": [*c.GQA, *c.ADAMW],
    "mla": [*c.DENSE, *LATENT, *c.MUON],
    "hybrid": [*c.HYBRID, *c.MUON],
    "moe": [*c.MOE, *c.MUON],
    "moe-mla": [*c.MOE, *LATENT, *c.MUON],
}
LAYOUTS = [
    ("dense", c.TP2), ("dense", c.VPP2), ("dense", c.DP2_DIST), ("dense", c.TP2_DP2_DIST),
    ("tied-soap", c.PP2), ("gqa", c.TP4), ("mla", c.PP2_DP2_DIST), ("hybrid", c.PP2),
    ("moe", c.EP2X2), ("moe-mla", c.EP2_DIST),
]  # fmt: skip


def clip(threshold: float, alpha: float = 0.5) -> list[str]:
    return ["--qk-clip", "--qk-clip-threshold", str(threshold), "--qk-clip-alpha", str(alpha)]


CLIP = clip(0.9)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
EVALUATE = "--eval-interval 2 --eval-iters 1".split()
STILL = ["--num-layers", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    made = []
    for name, (model, optimizer, threshold, alpha) in MODELS.items():
        made.append(case([*model, *clip(threshold, alpha)], optimizer, c.ONE, name, steps=1, hook="logits"))
    made.append(case([*SMALL, "--log-max-attention-logit"], c.MUON, c.ONE, "logged", steps=1, hook="logits"))
    for name in DEEP:
        made.append(case(CLIP, DEEP[name], c.ONE, f"{name}-one", steps=STEPS, hook="logits"))
    made += [
        case(CLIP, DEEP[name], layout, f"{name}-{layout.name}", steps=STEPS, hook="logits") for name, layout in LAYOUTS
    ]
    again = {"microbatches": 4}
    made.append(case([*c.DENSE, *STILL, *CLIP], c.ADAMW, c.ONE, "again", steps=1, hook="logits", options=again))
    made.append(case([*c.DENSE, *RECOMPUTE, *CLIP], c.MUON, c.ONE, "recompute", steps=STEPS, hook="logits"))
    made.append(
        case(
            [*c.DENSE, *EVALUATE, *CLIP, "--valid-data-path", pool.data],
            c.MUON,
            c.ONE,
            "evaluated",
            steps=STEPS,
            hook="logits",
        )
    )
    made.append(
        case(
            [*c.DENSE, *CLIP],
            [*c.MUON, "--bf16", "--overlap-param-gather", "--overlap-grad-reduce"],
            c.DP2_DIST,
            "bf16",
            steps=4,
            hook="images",
        )
    )
    made.append(case([*c.DENSE, *CLIP], c.MUON_H, c.ONE, "kept norm", steps=1))
    saved = {"save": "clipped", "interval": 3, "stop": 3}
    made.append(
        case(
            [*c.GQA, *CLIP],
            [*c.MUON, "--bf16"],
            c.TP2_DP2_DIST,
            "stopped",
            steps=STEPS,
            hook="checkpoint",
            options=saved,
        )
    )
    made.append(case([*c.GQA, *CLIP], [*c.MUON, "--bf16"], c.TP2_DP2_DIST, "whole", steps=STEPS))
    found = pool.run(made)
    loaded = case(
        [*c.GQA, *CLIP],
        [*c.MUON, "--bf16"],
        c.TP2_DP2_DIST,
        "resumed",
        steps=STEPS,
        hook="checkpoint",
        options={"load": "clipped"},
    )
    return found | pool.run([loaded])


def rows(pool: Pool, name: str) -> list[dict]:
    """What a run logged, by step."""
    (path,) = Path(pool.home).glob(f"*/output-{name}/metrics.jsonl")
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "train"]


def largest(run: Run, step: int = 0) -> list[Tensor]:
    """max softmax logit of each head by layer, float64, as worked out from the attentions' inputs on one process."""
    return list(run.ranks[0]["logits"][step].values())


@pytest.mark.parametrize("name", MODELS)
def test_one_step_is_the_papers(runs: dict[str, Run], name: str) -> None:
    """Section 2.1 and algorithm 1 of arXiv 2507.20534, with Megatron's exponent α and its choice for shared keys."""
    model, _, threshold, alpha = MODELS[name]
    groups = 2 if GROUPS[0] in model else HEADS
    clipped, free = runs[name].weights, recording.whole(runs[name].ranks[0]["before"])
    expected, counts = {n: w.double().clone() for n, w in free.items()}, []
    for layer, logits in enumerate(largest(runs[name])):
        prefix = f"decoder.layers.{layer}.self_attention."
        counts += (logits > threshold).tolist()
        for h in range(HEADS):
            g = h // (HEADS // groups)
            gamma = min(1.0, threshold / float(logits.view(groups, -1)[g].max()))
            for kind in ("weight", "bias"):
                d, names = 8, [f"{prefix}linear_qkv.{kind}.q", f"{prefix}linear_qkv.{kind}.k"]
                if "--split-heads" in model:
                    names, h_row, g_row = [f"{names[0]}{h}", f"{names[1]}{g}"], 0, 0
                else:
                    h_row, g_row = h * d, g * d
                if names[0] in expected:
                    expected[names[0]][h_row : h_row + d] *= gamma**alpha
                    if h % (HEADS // groups) == 0:
                        expected[names[1]][g_row : g_row + d] *= gamma ** (1 - alpha)
            query = next(
                (n for n in (f"{prefix}linear_q_proj.weight", f"{prefix}linear_q_up_proj.weight") if n in free), None
            )
            if query:
                expected[query][h * 12 : h * 12 + 8] *= gamma**alpha
                expected[query][h * 12 + 8 : h * 12 + 12] *= gamma
                expected[f"{prefix}linear_kv_up_proj.weight.k"][h * 8 : h * 8 + 8] *= gamma ** (1 - alpha)
    assert 0 < sum(counts) < len(counts), largest(runs[name])  # the threshold tells heads apart
    assert expected.keys() == clipped.keys()
    if name == "mha":
        assert all(torch.equal(w, free[n]) for n, w in runs["logged"].weights.items()), "maxima alone change nothing"
    for matrix, value in expected.items():
        torch.testing.assert_close(clipped[matrix].double(), value, rtol=1e-5, atol=1e-7, msg=matrix)
        same = torch.equal(clipped[matrix], free[matrix])
        assert same or matrix.rpartition(".")[2].strip("0123456789") in ("q", "k", "weight"), matrix


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=lambda value: getattr(value, "name", value))
def test_a_layout_repeats_one_process(runs: dict[str, Run], pool: Pool, name: str, layout: c.Layout) -> None:
    found, reference = runs[f"{name}-{layout.name}"], runs[f"{name}-one"]
    assert_same_curve(found, reference, steps=STEPS)
    assert_same_state(found, reference)
    for mine, whole in zip(rows(pool, f"{name}-{layout.name}"), rows(pool, f"{name}-one"), strict=True):
        assert mine["attention"]["clipped"] == whole["attention"]["clipped"]
        assert mine["attention"]["max_by_layer"] == pytest.approx(whole["attention"]["max_by_layer"], rel=1e-5)


def test_the_same_batch_is_below_the_threshold_after_a_step(runs: dict[str, Run]) -> None:
    """With a learning rate of 0, QK-clip alone has changed the weights."""
    ranks = runs["again"].ranks
    (before,), (after,) = largest(runs["again"]), list(ranks[0]["logits_after"].values())
    assert before.max() > 0.9 * 1.05 and after.max() <= 0.9 * (1 + 1e-5)
    torch.testing.assert_close(after, before.clamp(max=0.9), rtol=1e-5, atol=0)


def test_the_log_has_maxima_and_heads(runs: dict[str, Run], pool: Pool) -> None:
    for step, row in enumerate(rows(pool, "dense-one")):
        logits = torch.stack(largest(runs["dense-one"], step))
        found = row["attention"]
        assert found["max_logit"] == pytest.approx(float(logits.max()), rel=1e-5)
        assert list(found["max_by_layer"].values()) == pytest.approx(logits.amax(1).tolist(), rel=1e-5)
        assert found["clipped_heads"] == int((logits > 0.9).sum()) and found["heads"] == logits.numel()
        assert [heads for heads in found["clipped"].values()] == [
            h for row in logits if (h := (row > 0.9).nonzero().view(-1).tolist())
        ]
    (logged,) = rows(pool, "logged")
    assert logged["attention"].keys() == {"max_logit", "max_by_layer"}
    assert sum(row["attention"]["clipped_heads"] for row in rows(pool, "dense-one")) > 0


@pytest.mark.parametrize("name", ["recompute", "evaluated"])
def test_recomputing_and_evaluating_change_nothing(runs: dict[str, Run], pool: Pool, name: str) -> None:
    assert runs[name].losses == runs["dense-one"].losses
    assert all(torch.equal(w, runs["dense-one"].weights[n]) for n, w in runs[name].weights.items())
    assert [r["attention"] for r in rows(pool, name)] == [r["attention"] for r in rows(pool, "dense-one")]


def test_model_weights_are_the_scaled_main_copies(runs: dict[str, Run]) -> None:
    assert runs["bf16"].error is None and all(math.isfinite(loss) for loss in runs["bf16"].losses)
    assert all(same for rank in runs["bf16"].ranks for _, same in rank["images"])


def test_a_resumed_run_is_the_whole_one(runs: dict[str, Run]) -> None:
    assert runs["resumed"].losses == runs["whole"].losses[3:]
    assert all(torch.equal(w, runs["whole"].weights[n]) for n, w in runs["resumed"].weights.items())


def test_a_rule_that_keeps_norms_is_refused(runs: dict[str, Run]) -> None:
    (said,) = runs["kept norm"].user_errors
    assert said and "gives every weight its first norm back" in said and "--optimizer-groups" in said
