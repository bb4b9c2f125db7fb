"""Transformer Engine's layers on CPU: from the same weights the losses of the local layers, on layouts, in FP8 too."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.pool import Pool, Run

PACKAGES = Path(sys.prefix) / "transformer-engine"  # by `make setup`
pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"requirements-te.txt is not installed in {PACKAGES}")

TE = ["--transformer-impl", "transformer_engine"]
CP2 = Layout.of("cp2", 2, more=("--context-parallel-size=2",))
CP2_TWICE = Layout.of("cp2-twice", 2, distopt=True, more=(*CP2.flags[-1:], *c.ACROSS))
FP8 = [*c.DENSE, *TE, "--bf16", "--fp8-format", "hybrid", "--hidden-size", "64"]
TENSORWISE = [*FP8, "--fp8-recipe", "tensorwise"]
DELAYED = [*FP8, "--fp8-recipe", "delayed", "--fp8-amax-history-len", "4", "--fp8-amax-compute-algo", "max"]
MLA = [
    *c.DENSE,
    *"--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8".split(),
]
CLIPPED = [*c.GQA, "--qk-clip", "--qk-clip-threshold", "0.9"]  # by the maxima that the attention records
MODELS = {"dense": c.DENSE, "gqa": c.GQA, "gpt2": c.GPT2, "moe": c.MOE, "mla": MLA, "clipped": CLIPPED}
MODELS["clipped-mla"] = [*MLA, "--qk-clip", "--qk-clip-threshold", "0.8"]
STOP = 3  # steps of a run that a checkpoint ends
# name, model, its flags with Transformer Engine, layout
EXACT = [
    ("dense-one", "dense", [], c.ONE),
    ("dense-cp2", "dense", [], CP2),
    ("dense-cp2-twice", "dense", [], CP2_TWICE),
    ("gqa-tp2-sp", "gqa", [], c.SP2),
    ("gpt2-one", "gpt2", [], c.ONE),
    ("moe-grouped-ep2", "moe", ["--moe-grouped-gemm"], c.EP2),
    ("mla-one", "mla", [], c.ONE),
    ("clipped-cp2", "clipped", [], CP2),
    ("clipped-mla-tp2-sp", "clipped-mla", [], c.SP2),
]


def _case(name: str, flags: Sequence[str], layout: Layout) -> Case:
    return case(flags, c.MUON, layout, name, steps=6)


def _saving(name: str, flags: Sequence[str], folder: Path, layout: Layout = c.ONE) -> Case:
    """The first steps of a run, to a checkpoint of its name."""
    options = {"save": str(folder / name), "interval": STOP, "stop": STOP}
    return case(flags, c.MUON, layout, name, steps=6, hook="checkpoint", options=options)


def _loading(name: str, source: str, flags: Sequence[str], folder: Path, layout: Layout = c.ONE) -> Case:
    """The other steps, from a checkpoint."""
    return case(flags, c.MUON, layout, name, steps=6, hook="checkpoint", options={"load": str(folder / source)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    local = Pool(tmp_path_factory.mktemp("local"), 2)
    emulated = Pool(tmp_path_factory.mktemp("emulated"), 2, PACKAGES, transformer_engine=True)
    wanted = [_case(name, [*MODELS[model], *TE, *flags], layout) for name, model, flags, layout in EXACT]
    wanted += [_case("tensorwise", TENSORWISE, c.ONE), _case("tensorwise-dp2", TENSORWISE, c.DP2_DIST)]
    wanted += [_case("delayed", DELAYED, c.ONE), _case("tensorwise-tp2", TENSORWISE, c.TP2)]
    wanted += [_case("bf16", [*c.DENSE, *TE, "--bf16", "--hidden-size", "64"], c.ONE)]
    folder = tmp_path_factory.mktemp("checkpoints")
    try:
        saved = [_saving("local-saved", c.DENSE, folder), _saving("local-moe-saved", c.MOE, folder)]
        made = local.run([*saved, _saving("local-bf16-saved", [*c.DENSE, "--bf16", "--hidden-size", "64"], folder)])
        wanted += [_loading("local-to-te", "local-saved", [*c.DENSE, *TE], folder)]
        wanted += [_loading("local-to-te-moe", "local-moe-saved", [*c.MOE, *TE, "--moe-grouped-gemm"], folder, c.EP2)]
        wanted += [_loading("local-to-delayed", "local-bf16-saved", DELAYED, folder)]
        wanted += [_saving("te-saved", [*c.DENSE, *TE], folder), _saving("delayed-saved", DELAYED, folder)]
        wanted += [_saving("te-moe-saved", [*c.MOE, *TE, "--moe-grouped-gemm"], folder)]
        made |= emulated.run(wanted)
        made |= emulated.run([_loading("delayed-resumed", "delayed-saved", DELAYED, folder)])
        emulated.close()
        references = [_case(f"local-{name}", list(model), c.ONE) for name, model in MODELS.items()]
        references += [_loading("te-to-local", "te-saved", c.DENSE, folder)]
        references += [_loading("te-to-local-moe", "te-moe-saved", c.MOE, folder, c.EP2)]
        references += [_case("local-bf16", [*c.DENSE, "--bf16", "--hidden-size", "64"], c.ONE)]
        yield made | local.run(references)
    finally:
        local.close()
        emulated.close()


@pytest.mark.parametrize("name, model", [(name, model) for name, model, _, _ in EXACT])
def test_losses_and_norms_are_the_local_layers(runs: dict[str, Run], name: str, model: str) -> None:
    ours, theirs = runs[name], runs[f"local-{model}"]
    assert ours.losses == pytest.approx(theirs.losses, rel=4e-6)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-4)


def test_latent_attention_is_clipped(runs: dict[str, Run]) -> None:
    clipped, free = runs["local-clipped-mla"].losses, runs["local-mla"].losses
    assert clipped[0] == free[0] and abs(clipped[-1] - free[-1]) > 1e-4


def test_bf16_is_the_local_layers(runs: dict[str, Run]) -> None:
    ours, theirs = runs["bf16"].losses, runs["local-bf16"].losses
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)
    # a rounding of bf16 grows from step to step: local layers on TP2 are 3e-4 from one process
    assert ours == pytest.approx(theirs, rel=5e-4)


def test_fp8_is_near_bf16_and_another_number(runs: dict[str, Run]) -> None:
    for name in ("tensorwise", "delayed"):
        assert runs[name].losses == pytest.approx(runs["bf16"].losses, rel=5e-3)
        assert runs[name].losses != runs["bf16"].losses


def test_tensorwise_fp8_does_not_depend_on_data_parallelism(runs: dict[str, Run]) -> None:
    assert runs["tensorwise-dp2"].losses == pytest.approx(runs["tensorwise"].losses, rel=1e-6)
    assert runs["tensorwise-tp2"].losses == pytest.approx(runs["tensorwise"].losses, rel=2e-3)  # scales of shards


@pytest.mark.parametrize(
    "name, model",
    [("te-to-local", "dense"), ("te-to-local-moe", "moe"), ("local-to-te", "dense"), ("local-to-te-moe", "moe")],
)
def test_a_checkpoint_goes_on_in_the_other_layers(runs: dict[str, Run], name: str, model: str) -> None:
    """Weights and Muon's state, as if nothing had happened.

    Transformer Engine's layers have an `_extra_state` besides, which begins anew; experts in one grouped product on two ranks.
    """
    found, whole = runs[name], runs[f"local-{model}"]
    assert found.losses == pytest.approx(whole.losses[STOP:], rel=4e-6)
    assert found.grad_norms == pytest.approx(whole.grad_norms[STOP:], rel=1e-4)


def test_a_bf16_checkpoint_of_local_layers_goes_on_in_fp8(runs: dict[str, Run]) -> None:
    """Its scales begin as those of a new run do."""
    actual, whole = runs["local-to-delayed"].losses, runs["local-bf16"].losses
    assert actual == pytest.approx(whole[STOP:], rel=5e-3) and actual != whole[STOP:]


def test_delayed_scaling_resumes_as_if_uninterrupted(runs: dict[str, Run]) -> None:
    """Scales and histories are in Transformer Engine's own pickled state."""
    assert runs["delayed-saved"].losses == runs["delayed"].losses[:STOP]
    assert runs["delayed-resumed"].losses == runs["delayed"].losses[STOP:]


@pytest.mark.slow
def test_instances_of_several_context_parallel_ranks(tmp_path: Path) -> None:
    """Two instances of two ranks that share each sequence, and two of ranks with sequences of their own."""
    layouts = [
        Layout.of(
            f"cp{cp}-{owners[1].rpartition('=')[2]}", 4, distopt=True, more=(f"--context-parallel-size={cp}", *owners)
        )
        for cp in (2, 4)
        for owners in (c.ACROSS, c.WITHIN)
    ]
    emulated, local = Pool(tmp_path / "emulated", 4, PACKAGES, transformer_engine=True), Pool(tmp_path / "local", 1)
    try:
        found = emulated.run([_case(layout.name, [*c.DENSE, *TE], layout) for layout in layouts])
        (one,) = local.run([_case("one", c.DENSE, c.ONE)]).values()
    finally:
        emulated.close()
        local.close()
    for run in found.values():
        assert run.losses == pytest.approx(one.losses, rel=4e-6)
        assert run.grad_norms == pytest.approx(one.grad_norms, rel=1e-4)
