"""What torch's users do with an optimizer, and what is refused."""

import copy
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from megatron_opt.engine_options import EngineOptions
from megatron_opt.torch import Optimizer, ParamGroupConfig
from tests.torch import cases, ranks


def _two(name: str = "muon", **more: Any) -> tuple[cases.Model, Optimizer]:
    model = cases.make_model()
    return model, cases.make_optimizer(model, name, **more)


def _backward(model: nn.Module, step: int = 0) -> torch.Tensor:
    loss = cases.loss_of(model, cases.batch(step))
    loss.backward()
    return loss.detach()


def test_it_needs_no_megatron() -> None:
    script = (
        "import sys, torch; from megatron_opt.torch import Optimizer\n"
        "layer = torch.nn.Linear(8, 8); optimizer = Optimizer(layer, 'soap', lr=0.1)\n"
        "layer(torch.ones(2, 8)).sum().backward(); optimizer.step(); optimizer.state_dict()\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_kinds_and_splits_decide_the_groups() -> None:
    model, optimizer = _two()
    groups = {info.name: group for group in optimizer._engine.groups for info in group.infos}
    hidden = {name for name, group in groups.items() if group.optimizer == "muon"}
    assert hidden == cases.HIDDEN
    assert groups["output.weight"].weight_decay is True and groups["tok_embeddings.weight"].weight_decay is False
    assert groups["layers.0.norm.weight"].optimizer == groups["layers.0.proj.bias"].optimizer == "adamw"
    whole = Optimizer(model, "muon", lr=0.1)
    assert "layers.0.qkv.weight" in {i.name for g in whole._engine.groups for i in g.infos if g.optimizer == "muon"}
    assert "layers.0.qkv.weight" not in whole.describe() and "adamw" in whole.describe() and "rank" in whole.plan()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lm_head.weight", "output"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("embed_tokens._orig_mod.weight", "embedding"),
        ("layers.0.mlp.gate.weight", "router"),
        ("layers.0.mlp.gate_proj.weight", "hidden"),
        ("layers.0.moe.router.gate.weight", "router"),
        ("layers.0.attention.wo.weight", "hidden"),
        ("strange.weight", "output"),
    ],
)
def test_names_in_use_are_known(name: str, kind: str) -> None:
    named = [(name, nn.Parameter(torch.ones(4, 4))), ("h.weight", nn.Parameter(torch.ones(4, 4)))]
    optimizer = Optimizer(named, "muon", lr=0.1, kinds={"strange": "output", "h": "hidden"} if "str" in name else None)
    info = next(i for g in optimizer._engine.groups for i in g.infos if i.name != "h.weight")
    assert info.kind == kind and "_orig_mod" not in info.name


def test_stacked_experts_are_matrices_of_their_own() -> None:
    experts = nn.Parameter(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)))
    apart = [nn.Parameter(experts.detach()[i].clone()) for i in range(3)]
    one = Optimizer([("experts.w1", experts)], "muon", lr=0.1, split={"experts": "stack"})
    many = Optimizer([(f"experts.{i}", p) for i, p in enumerate(apart)], "muon", lr=0.1)
    experts.grad = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(2))
    for param, grad in zip(apart, experts.grad):
        param.grad = grad.clone()
    one.step()
    many.step()
    assert torch.equal(experts.detach(), torch.stack([p.detach() for p in apart]))
    kernel = nn.Conv2d(3, 5, 2, bias=False)
    flat = Optimizer(kernel, "muon", lr=0.1, split={"weight": "flatten"})
    assert flat._engine.groups[0].infos[0].shape == (5, 12)
    Optimizer(kernel, "adamw", lr=0.1)  # element-wise rules ask for no matrix


def test_schedulers_and_decay_of_a_group_are_followed() -> None:
    model, optimizer = _two("adamw", clip_grad=0.0)
    reference = cases.make_model()
    twin = cases.make_optimizer(reference, "adamw", clip_grad=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for step in range(3):
        for each in (model, reference):
            each.zero_grad()
            _backward(each, step)
        optimizer.step()
        schedule.step()
        for group in twin.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        twin.param_groups[0]["weight_decay"] = 0.5
        twin.step()
    assert schedule.get_last_lr()[0] == pytest.approx(1e-2 / 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters()))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[-1]["weight_decay"] == 0.0


def test_decay_shrinks_weights_as_its_formula_says() -> None:
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = Optimizer([("a.weight", weight)], "lion", lr=0.1, weight_decay=0.5)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 2.0 - 0.1 * (1.0 + 0.5 * 2.0)))


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    for name in ("adamw", "muon", "lion", "mars"):
        model, optimizer = _two(name)
        cases.train(model, optimizer, 0, 2)
        optimizer.zero_grad(set_to_none=True)
        _backward(model, 2)
        frozen = {"layers.1.up.weight", "layers.0.norm.weight", "output.weight"}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = {k: {a: b.clone() for a, b in s.items()} for k, s in optimizer.state.items()}
        for key, param in model.named_parameters():
            if key in frozen:
                param.grad = None
        optimizer.step()
        for key, param in model.named_parameters():
            assert torch.equal(param.detach(), before[key]) == (key in frozen), (name, key)
            if key in frozen:
                assert all(torch.equal(state[param][k], v) for k, v in optimizer.state[param].items()), (name, key)


def test_closures_zeroed_gradients_and_hooks() -> None:
    model, optimizer = _two()
    seen = []
    optimizer.register_step_post_hook(lambda *rest: seen.append(1))
    first = optimizer.step(lambda: _backward(model))
    assert isinstance(first, torch.Tensor) and seen == [1]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_clipping_is_the_rules_own() -> None:
    """Muon's matrices are not clipped, its partner's parameters by one norm over them."""
    plain, clipped = (_two("muon", clip_grad=clip) for clip in (0.0, 0.01))
    for model, optimizer in (plain, clipped):
        cases.train(model, optimizer, 0, 1)
    rest = [p for n, p in clipped[0].named_parameters() if p.ndim == 1 or "embeddings" in n or n == "output.weight"]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in rest]))  # type: ignore[arg-type]
    assert float(norm) > 0.01
    twins = zip(plain[0].named_parameters(), clipped[0].parameters(), strict=True)
    matrices = [(name, a, b) for (name, a), b in twins if a.ndim == 2 and name.startswith("layers")]
    assert len(matrices) > 5 and all(torch.equal(a, b) for _, a, b in matrices)
    state = {p: s for p, s in clipped[1].state.items() if "exp_avg" in s}
    torch.testing.assert_close(
        state[clipped[0].output.weight]["exp_avg"] / plain[1].state[plain[0].output.weight]["exp_avg"],
        torch.full((cases.VOCABULARY, cases.WIDTH), 0.01 / float(norm)), rtol=1e-3, atol=0.0,
    )  # fmt: skip
    assert clipped[1].grad_norm == pytest.approx(
        float(torch.stack([p.grad.square().sum() for p in clipped[0].parameters()]).sum().sqrt()),
        rel=1e-5,  # type: ignore[union-attr]
    )


def test_autocast_trains_and_a_grad_scaler_is_refused() -> None:
    model, optimizer = _two()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cases.loss_of(model, cases.batch(0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2 and all(p.dtype == torch.float32 for p in model.parameters())
    scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    for unscale in (False, True):
        optimizer.zero_grad()
        scaler.scale(cases.loss_of(model, cases.batch(1))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(TypeError, match="GradScaler"):
            scaler.step(optimizer)
        scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)  # type: ignore[attr-defined]
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_bf16_weights_have_main_copies_and_follow_the_model() -> None:
    model = cases.make_model().to(torch.bfloat16)
    optimizer = cases.make_optimizer(model, "adamw", lr=1e-5)
    cases.train(model, optimizer, 0, 3)
    main = next(f.main for f in optimizer._engine.param_shards() if f.view.name == "output.weight")
    assert main.dtype == torch.float32 and torch.equal(main.to(torch.bfloat16).view(-1), model.output.weight.view(-1))
    assert not torch.equal(main, main.to(torch.bfloat16).float())  # steps too small for bf16 are kept
    other = cases.make_model(5).to(torch.bfloat16)
    model.load_state_dict(other.state_dict())
    cases.train(model, optimizer, 3, 4)
    assert float((model.output.weight - other.output.weight).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_is_evaluated_at_its_average(dtype: torch.dtype) -> None:
    """x = y − lead, in the type of the model; y comes back bit for bit. Others are evaluated as they are."""
    for name in ("schedule_free", "adamw"):
        model = cases.make_model().to(dtype)
        optimizer = Optimizer(model, name, lr=1e-2)
        cases.train(model, optimizer, 0, 4)
        before = [p.detach().clone() for p in model.parameters()]
        mains = {f.view.name: f.main.clone().view(-1) for f in optimizer._engine.param_shards()}
        with optimizer.evaluating():
            during = [p.detach().clone() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        if name == "adamw":
            assert all(torch.equal(a, b) for a, b in zip(before, during))
            continue
        names = [key for key, _ in model.named_parameters()]
        place = names.index("layers.0.norm.weight")
        lead = optimizer.state[dict(model.named_parameters())["layers.0.norm.weight"]]["lead"]
        wanted = (mains["layers.0.norm.weight"] - lead.view(-1)).to(dtype)
        assert torch.equal(during[place].view(-1), wanted) and lead.any()


def test_weights_that_are_not_contiguous_are_trained() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    turned, plain = nn.Parameter(weight.clone().t().contiguous().t()), nn.Parameter(weight.clone())
    for param in (turned, plain):
        optimizer = Optimizer([("a.weight", param)], "muon", lr=0.1)
        for step in range(2):
            param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert not turned.is_contiguous() and torch.equal(turned, plain)


def test_a_look_at_the_state_does_not_bind_it_to_the_weights_of_then() -> None:
    model, optimizer = _two("muon_h")
    assert len(optimizer.state) == len(list(model.parameters()))
    model.load_state_dict({name: 3.0 * value for name, value in model.state_dict().items()})
    norms = {name: float(p.norm()) for name, p in model.named_parameters()}
    cases.train(model, optimizer, 0, 2)
    chosen = [pair for pair in model.named_parameters() if re.fullmatch(r"layers.*proj\.weight", pair[0])]
    assert chosen and all(float(param.norm()) == pytest.approx(norms[name], rel=1e-5) for name, param in chosen)


def test_gradients_may_be_given_up() -> None:
    """The same step without a copy of them; their memory then holds directions."""
    model, optimizer = _two(overwrite_grads=True)
    reference, twin = _two()
    for each, steps in ((model, optimizer), (reference, twin)):
        _backward(each)
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters()))
    given, kept = model.layers[0].up.weight.grad, reference.layers[0].up.weight.grad  # type: ignore[union-attr]
    assert not torch.equal(given, kept)  # type: ignore[arg-type]


def test_sophia_asks_for_its_curvature() -> None:
    model = cases.make_model()
    optimizer = Optimizer(model, "sophia", lr=1e-3, curvature_every=2)
    cases.train(model, optimizer, 0, 2)
    assert optimizer.curvature_due()
    with pytest.raises(ValueError, match="update_curvature"):
        cases.train(model, optimizer, 2, 3)
    optimizer.zero_grad()
    _backward(model)
    optimizer.update_curvature(100.0, squared=True)
    assert any(bool(s["hessian"].any()) for s in optimizer.state.values())
    cases.train(model, optimizer, 2, 3)
    assert not optimizer.curvature_due()


def test_groups_of_ones_own() -> None:
    model = cases.make_model()
    groups = [
        {"match": r"qkv\.weight", "optimizer": "soap", "lr_scale": 0.5},
        ParamGroupConfig(".*", "adamw", weight_decay=0.0),
    ]
    optimizer = Optimizer(model, groups=groups, lr=0.1, weight_decay=0.3)
    assert [(g["optimizer"], g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("soap", 0.5, 0.3), ("adamw", 1.0, 0.0),
    ]  # fmt: skip
    cases.train(model, optimizer, 0, 2)


W = [("a.weight", nn.Parameter(torch.ones(4, 4)))]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": (dict(name="muom"), "there is no optimizer 'muom'"),
    "no name": (dict(name=None), "give the name of an optimizer"),
    "field": (dict(momentun=0.9), "has no option 'momentun'"),
    "value": (dict(momentum=2.0), "^momentum is 2.0; it must be"),
    "partner": (dict(partner={"beta9": 1}), "has no option 'beta9'"),
    "no partner": (dict(name="adamw", partner={"beta1": 0.5}), "no partner"),
    "lr": (dict(lr=-1.0), "lr is -1.0"),
    "clip": (dict(clip_grad=float("nan")), "clip_grad is nan"),
    "both": (dict(groups=[]), "leave out the name"),
    "group": (dict(name=None, groups=[{"match": "x"}]), "give at least `match` and `optimizer`"),
    "empty group": (dict(name=None, groups=[ParamGroupConfig("xyz", "muon")]), "no group takes 1 parameters"),
    "kind": (dict(kinds={"a": "big"}), "there is no kind 'big'"),
    "unused": (dict(kinds={"zzz": "hidden"}), "takes no parameter"),
    "regex": (dict(split={"(": "stack"}), "not a regular expression"),
    "rows": (dict(split={"a": {"q": 1, "k": 2}}), "let them sum to the rows"),
    "split": (dict(split={"a": "pile"}), "'stack' or 'flatten'"),
    "twice": (dict(params=W + W), "was given before"),
    "same name": (dict(params=[*W, ("a.weight", nn.Parameter(torch.ones(2, 2)))]), "two parameters are called"),
    "no names": (dict(params=[W[0][1]]), "parameters need names"),
    "dicts": (dict(params=[{"params": [W[0][1]]}]), "given as rules"),
    "tensor": (dict(params=W[0][1]), "no list of"),
    "none": (dict(params=[]), "no parameter to train"),
    "double": (dict(params=[("a", nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))]), "torch.float64"),
    "half": (dict(params=[("a", nn.Parameter(torch.ones(2, 2, dtype=torch.float16)))]), "torch.float16"),
    "complex": (dict(params=[("a", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))]), "torch.complex64"),
    "meta": (dict(params=[("a", nn.Parameter(torch.ones(2, 2, device="meta")))]), "meta"),
    "sides": (dict(params=[("a", nn.Parameter(torch.ones(2, 2, 2)))]), "has 3 sides"),
    "vector": (
        dict(name=None, groups=[ParamGroupConfig(".*", "muon")], params=[("b", nn.Parameter(torch.ones(3)))]),
        "vectors",
    ),
    "mode": (dict(process_group=object()), "not initialized"),
    "average": (dict(engine=EngineOptions(ema_decay=0.9)), "AveragedModel"),
    "offload": (dict(engine=EngineOptions(optimizer_cpu_offload=True)), "CPUOffloadPolicy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str) -> None:
    more, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence) as found:
        Optimizer(**{"params": W, "name": "muon", "lr": 0.1, **more})
    assert "--" not in str(found.value) and "\n" not in str(found.value)


def test_what_cannot_be_done_later_is_refused() -> None:
    model, optimizer = _two()
    with pytest.raises(TypeError, match="cannot be added later"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    table = nn.Embedding(4, 4, sparse=True)
    sparse = Optimizer(table, "adamw", lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="is sparse"):
        sparse.step()
    model.to(torch.float64)
    _backward(model)
    with pytest.raises(ValueError, match=r"has become torch\.float64"):
        optimizer.step()


def test_ranks_refuse_alike() -> None:
    for found in ranks.run(cases.complaints, 2):
        assert found["partial"].startswith("ArgumentError: a.weight is placed as P(sum)")
        assert "sharded by Megatron-FSDP" in found["megatron-fsdp"]
        assert "leave" in found["uneven"] and "shard it evenly" in found["uneven"]
        assert "ranks disagree on the names" in found["names"]
        assert "DistributedDataParallel" in found["not averaged"]
        assert "full_state_dict" in found["one rank's file"]
        assert found["replicas' file"] == "True"
        assert "after the model is wrapped" in found["wrapped later"]
        assert found["replicated"] == "[0, 1, 2]"
