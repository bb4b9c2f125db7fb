"""Save, resume bit for bit, load on another layout by value; damaged and foreign checkpoints."""

import shutil
from typing import Any

import pytest
import torch

from tests.distributed import cases as c
from tests.distributed import recording
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_curve
from tests.distributed.pool import Pool, Run

TP2_EP2 = Layout.of("tp2-ep2", 4, tp=2, ep=2, etp=1, sp=True)
OFFLOADED = Layout.of("dp2-offloaded", 2, distopt=True, more=("--optimizer-cpu-offload", "--exchange-bucket-mb=0.01"))
NARROW = [*c.SOAP_BLOCKS, *"--soap-factor-precision bf16 --soap-moment-dtype bf16 --matrix-mode group".split()]
CODES = "--optimizer kron --kron-factor-precision bf16 --kron-moment-dtype int8".split()
ROUNDED = ("bf16", "int8", "narrow", "codes")  # another layout's rounding parts runs
MODELS = {
    "dense": [*c.DENSE, *c.MUON],
    "group": [*c.DENSE, *c.MUON, "--matrix-mode", "group"],
    "sharded": [*c.DENSE, *c.SOAP_ONE_SIDED, "--matrix-mode", "sharded"],
    "blocks": [*c.DENSE, *c.SOAP_BLOCKS, "--matrix-mode", "group"],
    "normuon": [*c.DENSE, *c.NORMUON, "--matrix-mode", "sharded"],
    "soap_h": [*c.DENSE, *c.SOAP_H, "--matrix-mode", "group"],
    "tied": [*c.TIED, *c.MUON],
    "moe": [*c.MOE, *c.MUON],
    "soap": [*c.DENSE, *c.SOAP],
    "adamw": [*c.DENSE, *c.ADAMW],
    "bf16": [*c.DENSE, *c.MUON, "--bf16"],
    "narrow": [*c.DENSE, *NARROW],
    "codes": [*c.DENSE, *CODES],
    "int8": [*c.DENSE, *c.ADAMW, "--adamw-state-dtype", "int8"],
}
PAIRS = [
    ("dense", c.ONE, c.TP2), ("dense", c.ONE, c.DP2_DIST), ("dense", c.TP2, c.ONE), ("dense", c.TP2, c.PP2),
    ("dense", c.PP2, c.VPP2), ("dense", c.VPP2, c.TP2_PP2), ("dense", c.TP2_PP2, c.DP2), ("dense", c.DP2, c.DP4_DIST),
    ("dense", c.DP2_DIST, c.TP2), ("dense", c.TP2_DP2_DIST, c.PP2), ("dense", c.TP4, c.TP2_DP2_DIST),
    ("tied", c.PP2, c.TP2), ("tied", c.DP2_DIST, c.PP2),
    ("moe", c.ONE, c.EP2), ("moe", c.EP2_DIST, c.DP2_DIST), ("moe", TP2_EP2, c.EP2_DIST), ("moe", c.EP2, c.PP2),
    ("soap", c.TP2, c.PP2), ("soap", c.DP2_DIST, c.TP2_DP2), ("adamw", c.TP2_DP2_DIST, c.VPP2),
    ("group", c.TP2_DP2_DIST, c.ONE), ("group", c.ONE, c.DP2), ("group", c.TP2, c.DP4_DIST),
    ("sharded", c.TP2_DP2, c.PP2), ("blocks", c.TP2_DP2, c.ONE), ("blocks", c.ONE, c.DP2_DIST), ("blocks", c.TP4, c.TP2),
    ("normuon", c.TP2_DP2_DIST, c.PP2), ("soap_h", c.TP2_DP2_DIST, c.ONE), ("soap_h", c.ONE, c.TP2),
    ("bf16", c.DP2_DIST, c.TP2_PP2), ("bf16", c.TP2, c.DP2), ("narrow", c.TP2_DP2_DIST, c.ONE), ("codes", c.TP2, c.PP2),
    ("dense", c.DP2X2, c.DP4_DIST), ("dense", c.DP4_DIST, c.DP2X2), ("soap", c.DP2X2_WITHIN, c.ONE),
    ("soap", c.TP2, OFFLOADED), ("soap", OFFLOADED, c.TP2), ("bf16", c.TP2, OFFLOADED),
    ("soap", c.TP2, c.DP2X2_WITHIN), ("moe", c.ONE, c.EP2X2), ("bf16", c.DP2X2, c.TP2),
]  # fmt: skip
RESUMED = [
    ("dense", c.ONE), ("dense", c.TP2_DP2_DIST), ("moe", c.EP2_DIST), ("soap", c.TP2), ("bf16", c.DP2_DIST),
    ("adamw", c.VPP2), ("int8", c.DP2_DIST), ("group", c.TP2_DP2_DIST), ("blocks", c.TP2), ("normuon", c.DP2_DIST),
    ("soap_h", c.TP2), ("bf16", c.DP2X2), ("soap", OFFLOADED), ("int8", OFFLOADED), ("narrow", c.TP2),
]  # fmt: skip
TOTAL, STOP = 10, 5


def _case(model: str, layout: Layout, what: str, **options: Any) -> Case:
    return case(
        [], MODELS[model], layout, f"{what}-{model}-{layout.name}", steps=TOTAL, hook="checkpoint", options=options
    )


def _saved(model: str, layout: Layout) -> str:
    return f"{model}-{layout.name}"


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    sources = dict.fromkeys([(m, a) for m, a, _ in PAIRS] + RESUMED)
    saving = [_case(m, layout, "save", save=_saved(m, layout), interval=STOP, stop=STOP) for m, layout in sources]
    whole = dict.fromkeys([(m, c.ONE) for m in MODELS if m not in ROUNDED] + RESUMED)
    found = pool.run([*saving, *(_case(m, layout, "whole") for m, layout in whole)])
    loading = [_case(m, b, f"load-{a.name}", load=_saved(m, a)) for m, a, b in PAIRS]
    resuming = [_case(m, layout, "resume", load=_saved(m, layout)) for m, layout in RESUMED]
    return found | pool.run([*loading, *resuming])


@pytest.mark.parametrize(("model", "layout"), RESUMED, ids=[f"{m}-{layout.name}" for m, layout in RESUMED])
def test_resume_is_bit_for_bit(runs: dict[str, Run], model: str, layout: Layout) -> None:
    whole, resumed = runs[f"whole-{model}-{layout.name}"], runs[f"resume-{model}-{layout.name}"]
    assert resumed.losses == whole.losses[STOP:]
    assert resumed.grad_norms == whole.grad_norms[STOP:]
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name


def test_the_first_step_after_a_resume_decays_as_the_checkpoint_says(pool: Pool, runs: dict[str, Run]) -> None:
    kept = [*c.ADAMW, "--weight-decay", "0", "--use-checkpoint-opt_param-scheduler"]
    options = {"load": _saved("adamw", c.VPP2)}
    resumed = pool.run([case(c.DENSE, kept, c.VPP2, "decay", steps=TOTAL, hook="checkpoint", options=options)])["decay"]
    assert resumed.losses == runs[f"whole-adamw-{c.VPP2.name}"].losses[STOP:]


@pytest.mark.parametrize(("model", "a", "b"), PAIRS, ids=[f"{m}-{a.name}-to-{b.name}" for m, a, b in PAIRS])
def test_any_layout_loads_any_other(runs: dict[str, Run], model: str, a: Layout, b: Layout) -> None:
    saved, loaded = runs[f"save-{model}-{a.name}"], runs[f"load-{a.name}-{model}-{b.name}"]
    assert len(loaded.losses) == TOTAL - STOP
    assert {rank["loaded_step"] for rank in loaded.ranks} == {STOP}
    weights = recording.whole([block for rank in loaded.ranks for block in rank["loaded_weights"]])
    _assert_equal(weights, saved.weights, "weights")
    state = saved.state
    for key in state:
        blocks = [block for rank in loaded.ranks for block in rank["loaded_state"].get(key, [])]
        _assert_equal(recording.whole(blocks), state[key], key)
    if model not in ROUNDED:
        reference = runs[f"whole-{model}-one"]
        tail = Run(
            reference.case,
            [
                {**rank, "losses": rank["losses"][STOP:], "grad_norms": rank["grad_norms"][STOP:]}
                for rank in reference.ranks
            ],
        )
        assert_same_curve(loaded, tail, steps=TOTAL - STOP)


def _assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    assert sorted(found) == sorted(wanted), what
    for name, value in wanted.items():
        assert torch.equal(found[name], value), (what, name)


def test_megatrons_own_checkpoint_gives_its_model(pool: Pool) -> None:
    own = case(
        c.DENSE,
        ["--optimizer", "adam"],
        c.TP2,
        "own",
        steps=TOTAL,
        hook="checkpoint",
        options={"save": "adam", "interval": STOP, "stop": STOP},
    )
    saved = pool.run([own])["own"]
    assert len(saved.losses) == STOP
    flags = [*c.DENSE, *c.MUON]
    loads = pool.run(
        [
            case(flags, [], layout, f"take-{layout.name}", steps=TOTAL, hook="checkpoint", options={"load": "adam"})
            for layout in (c.TP2, c.DP2_DIST)
        ]
    )
    log = "".join(path.read_text() for path in pool.home.glob("member*.log"))
    assert "written by Megatron's adam; the model is loaded and the optimizer's state starts anew" in log
    whole = pool.run([case(c.DENSE, ["--optimizer", "adam"], c.ONE, "adam-whole", steps=TOTAL)])["adam-whole"]
    for run in loads.values():
        assert {rank["loaded_step"] for rank in run.ranks} == {0}
        assert run.losses[0] == pytest.approx(whole.losses[STOP], rel=1e-5)


def _damage(pool: Pool, name: str, what: str) -> str:
    home = pool.home / "checkpoints"
    target = f"damaged-{what}"
    shutil.copytree(home / name, home / target)
    folder = home / target / f"iter_{STOP:07d}"
    if what == "truncated":
        largest = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        with open(largest, "r+b") as file:
            file.truncate(largest.stat().st_size // 2)
    elif what == "half-written":
        (folder / ".metadata").unlink()
    elif what == "garbled":
        (folder / ".metadata").write_bytes(b"no metadata")
    elif what == "gone":
        shutil.rmtree(folder)
    return target


DAMAGES = {
    "truncated": "no checkpoint under",
    "half-written": "no checkpoint under",
    "garbled": "no checkpoint under",
    "gone": "which is not there",
}


@pytest.fixture(scope="module")
def refused(pool: Pool, runs: dict[str, Run]) -> dict[str, Run]:
    name = _saved("dense", c.TP2)
    assert (pool.home / "checkpoints" / name).is_dir()
    made = [
        case(c.DENSE, c.MUON, c.TP2, what, steps=TOTAL, hook="checkpoint", options={"load": _damage(pool, name, what)})
        for what in DAMAGES
    ]
    made += [
        case(model, optimizer, c.TP2, what, steps=TOTAL, hook="checkpoint", options={"load": name})
        for what, model, optimizer in (
            ("other-optimizer", c.DENSE, c.ADAMW),
            ("other-options", c.DENSE, [*c.MUON, "--split-heads"]),
            ("other-momentum", c.DENSE, [*c.MUON, "--muon-momentum", "0.5"]),
            ("other-function", [*c.DENSE, "--norm-epsilon", "0.1", "--rotary-base", "100"], c.MUON),
            ("other-data", [*c.DENSE, "--seed", "5"], c.MUON),
            ("other-layers", [*c.DENSE, "--num-layers", "2"], c.MUON),
            ("other-width", [*c.DENSE, "--hidden-size", "64"], c.MUON),
            ("other-kind", [*c.GQA], c.MUON),
            ("other-precision", [*c.DENSE, "--bf16"], c.MUON),
        )
    ]
    return pool.run(made)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        *DAMAGES.items(),
        ("other-optimizer", "holds the state of adamw+muon"),
        ("other-options", "its --split-heads is False, this run's is True"),
        ("other-momentum", "other parameter groups or options"),
        (
            "other-function",
            "its --norm-epsilon is 1e-05, this run's is 0.1; its --rotary-base is 10000, this run's is 100",
        ),
        ("other-data", "its --seed is 1234, this run's is 5"),
        ("other-layers", "its --num-layers is 4, this run's is 2"),
        ("other-width", "its --hidden-size is 32, this run's is 64"),
        ("other-kind", "its --num-query-groups is 4, this run's is 2"),
        ("other-precision", "was trained in fp32, this run is in bf16"),
    ],
)
def test_what_cannot_be_loaded_is_said_on_every_rank(refused: dict[str, Run], what: str, words: str) -> None:
    run = refused[what]
    assert run.error is None
    assert all(said and words in said for said in run.user_errors), run.user_errors


def test_what_rank_0_alone_refuses_every_rank_refuses(pool: Pool) -> None:
    """Megatron's check of shards raises on rank 0, while the others go on to the next collective and wait there."""

    def made(name: str, hook: str, options: dict[str, Any], *flags: str) -> Case:
        model = [*c.DENSE, "--num-layers", "1", *flags]
        return case(model, c.ADAMW, c.DP2, name, steps=2, hook=hook, options=options)

    go_on, every = ("--on-save-failure", "continue"), {"interval": 1}
    runs = pool.run(
        [
            made("sound", "checkpoint", {"save": "sound", "interval": 1, "stop": 1}),
            made("refused-save", "one_rank_refuses", {"save": "refused", **every}),
            made("passed-over", "one_rank_refuses", {"save": "passed", **every}, *go_on),
        ]
    )
    runs |= pool.run([made("refused-load", "one_rank_refuses", {"load": "sound"})])
    assert len(runs["passed-over"].losses) == 2
    for name, said in (("refused-save", "could not be saved (rank 0: "), ("refused-load", "cannot be loaded: ")):
        assert runs[name].error is None
        for error in runs[name].user_errors:
            assert error and said in error and "is there twice" in error, error
