"""A small model, its training, and what ranks of the tests do with them."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from megatron_opt.optimizers import registry
from megatron_opt.torch import Optimizer
from tests import apart

VOCABULARY, WIDTH = 48, 16
HIDDEN = {
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in ("qkv.weight.q", "qkv.weight.k", "qkv.weight.v", "proj.weight", "up.weight", "down.weight")
}  # logical matrices of the model that a matrix rule trains
SPLIT = {r"qkv\.": {"q": 16, "k": 16, "v": 16}}
# name -> options that make one process and many agree as far as fp32 goes
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "lion": ("lion", {}),
    "muon": ("muon", {"fp32_matmul_prec": "high"}),
    "scion": ("scion", {"fp32_matmul_prec": "high"}),
    "soap": ("soap", {"precondition_frequency": 2, "factor_precision": "fp64", "precondition_1d": False}),
    "kron": ("kron", {"update_probability": 1.0}),
    "muon_h": ("muon_h", {"fp32_matmul_prec": "high"}),
    "mars": ("mars", {"clip_scope": "global"}),
}


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # a bias of keys would have a gradient of noise
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    """A decoder of two blocks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(hidden) for _ in range(2))
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)  # type: ignore[no-any-return]


def make_model(seed: int = 1, hidden: int = 27) -> Model:
    """27 is no multiple of any number of ranks; tensor parallelism wants one."""
    torch.manual_seed(seed)
    return Model(hidden)


def make_optimizer(params: Any, case: str, **more: Any) -> Optimizer:
    name, options = RULES[case]
    decay = 0.0 if registry.known(name).projects else 0.1
    common = {"lr": 1e-2, "weight_decay": decay, "clip_grad": 1.0, "split": SPLIT}
    return Optimizer(params, name, **{**common, **options, **more})


def batch(step: int, sequences: int = 8) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, 12), generator=torch.Generator().manual_seed(step))


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: Any, optimizer: Any, first: int, last: int, share: slice = slice(None)) -> list[float]:
    """Steps first … last − 1 of the one sequence of batches."""
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step)[share])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights, collective over DTensors' ranks."""
    found = {name.removeprefix("module."): param.detach() for name, param in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).float().clone() for name, p in found.items()}


def whole_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state by parameter and key."""
    found = optimizer.full_state_dict()
    names = {key: name for group in found["param_groups"] for key, name in zip(group["params"], group["param_names"])}
    return {f"{names[at]}:{key}": t for at, state in found["state"].items() for key, t in state.items()}


# What ranks do


def shard(model: Model, layout: str) -> Any:
    """The model as a layout holds it."""
    size = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout in ("fsdp", "columns"):
        side: Any = lambda param: Shard(1) if param.ndim == 2 and param.shape[1] % size == 0 else Shard(0)  # noqa: E731
        for part in (*model.layers, model):
            fully_shard(part, shard_placement_fn=side if layout == "columns" else None)
        return model
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        return model
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    if layout == "fsdp+tp":
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh["dp"])
    return model


def tensor_parallel(model: Model, mesh: Any) -> None:
    """Megatron's way: the MLP's first matrix cut by columns of its output, the second by its input; the head by vocabulary."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    parallelize_module(model, mesh, {"output": ColwiseParallel(output_layouts=Replicate())})


def repeat(case: str, layout: str, steps: int, **more: Any) -> dict[str, Any]:
    """Train on the same batch on every rank, whose mean is exact: what differs from one process is the optimizer's alone."""
    model = shard(make_model(hidden=28 if "tp" in layout else 27), layout) if layout != "one" else make_model(hidden=28)
    optimizer = make_optimizer(model.named_parameters(), case, **more)
    losses = train(model, optimizer, 0, steps)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kept = {n.removeprefix("module."): (g.full_tensor() if isinstance(g, DTensor) else g) for n, g in grads.items()}
    return {
        "losses": losses,
        "weights": weights_of(model),
        "state": whole_state(optimizer),
        "norm": optimizer.grad_norm,
        "grads": kept,
    }


def split_batches(case: str, steps: int) -> dict[str, Any]:
    """DDP on shares of every batch; which matrices this rank's rules were given."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(make_model())
    optimizer = make_optimizer(model, case)
    computed: list[str] = []
    for each in optimizer._engine.group_optimizers:
        if registry.known("muon") is type(each):
            each.update = _noting(each.update, computed)
    losses = train(model, optimizer, 0, steps, slice(rank * 8 // size, (rank + 1) * 8 // size))
    return {"losses": losses, "computed": computed, "weights": weights_of(model)}


def trainer(folder: Path, rule: str, steps: int = 8, **more: Any) -> Any:
    """Hugging Face's Trainer of a small Llama, four rows a step over all ranks."""
    transformers = apart.transformers()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    rows = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        logging_steps=1, report_to=[], use_cpu=True, max_grad_norm=0.0, seed=1,
        **{"save_strategy": "steps" if "save_steps" in more else "no", **more},
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    precise = {"fp32_matmul_prec": "high"} if rule == "muon" else {}
    optimizer = Optimizer(model, rule, lr=1e-2, weight_decay=0.1, clip_grad=1.0, **precise)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))


def logged(trained: Any) -> list[float]:
    """Losses of a Trainer's steps."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def trainers_under_ddp(folder: str) -> dict[str, Any]:
    """Muon; AdamW, saved at step 4, and resumed from there."""
    found: dict[str, Any] = {}
    for name, rule, more in (
        ("muon", "muon", {}), ("adamw", "adamw", {"save_steps": 4}), ("resumed", "adamw", {"save_steps": 4}),
    ):  # fmt: skip
        made = trainer(Path(folder) / f"{name}-ddp", rule, ddp_backend="gloo", **more)
        computed: list[str] = []
        for each in made.optimizer._engine.group_optimizers:
            if rule == "muon" and registry.known("muon") is type(each):
                each.update = _noting(each.update, computed)
        made.train(resume_from_checkpoint=f"{folder}/adamw-ddp/checkpoint-4" if name == "resumed" else None)
        assert isinstance(made.model_wrapped, DistributedDataParallel)
        found[name] = {"losses": logged(made), "computed": computed, "weights": weights_of(made.model)}
    return found


def _noting(update: Callable[..., Any], computed: list[str]) -> Callable[..., Any]:
    """A rule's update that notes which matrices it is given."""

    def noted(grads: Any, *rest: Any) -> Any:
        computed.extend(info.name for info in rest[-1])
        return update(grads, *rest)

    return noted


Work = tuple[str, str, int, dict[str, Any]]  # rule, layout, steps, more of the optimizer's arguments


def repeat_all(work: list[Work]) -> list[dict[str, Any]]:
    """`repeat` of several, one after another."""
    return [repeat(case, layout, steps, **more) for case, layout, steps, more in work]


def _stored(model: nn.Module, optimizer: Optimizer, way: str) -> dict[str, Any]:
    """What torch.distributed.checkpoint is given: the optimizer itself, or what torch's helper makes of it."""
    if way == "stateful":
        return {"model": model.state_dict(), "optimizer": optimizer}
    options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def save(case: str, way: str, folder: str, steps: int) -> dict[str, Any]:
    """Train, save; the state as it is, and the losses of one more step."""
    model = make_model() if not dist.is_initialized() else shard(make_model(), "fsdp")
    optimizer = make_optimizer(model, case)
    train(model, optimizer, 0, steps)
    dcp.save(_stored(model, optimizer, way), checkpoint_id=folder, no_dist=not dist.is_initialized())
    return {"state": whole_state(optimizer), "losses": train(model, optimizer, steps, steps + 3)}


def load(case: str, way: str, folder: str, steps: int) -> dict[str, Any]:
    """Other weights, no state, another learning rate; all three from the folder, then the same steps as after `save`."""
    model = make_model(2) if not dist.is_initialized() else shard(make_model(2), "fsdp")
    optimizer = make_optimizer(model, case)
    optimizer.param_groups[0]["lr"] = 7.0
    stored = _stored(model, optimizer, way)
    dcp.load(stored, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(stored["model"])
    if way != "stateful":
        options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
        set_optimizer_state_dict(model, optimizer, stored["optimizer"], options=options)
    return {"state": whole_state(optimizer), "losses": train(model, optimizer, steps, steps + 3)}


def all_of(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """One function, several times, on the same ranks."""
    return [function(*call) for call in calls]


def titan_loop(folder: str) -> dict[str, Any]:
    """As torchtitan trains: bf16 by FSDP's policy, accumulated microbatches, a warm-up, an interval checkpoint."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = make_model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.layers, model):
        fully_shard(part, mp_policy=policy)
    optimizer = make_optimizer(model, "muon")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    losses, rates = [], []
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        for tokens in batch(step % 3).chunk(2):
            loss = loss_of(model, tokens) / 2
            loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(2 * float(loss.detach()))
        rates.append(optimizer.param_groups[0]["lr"])
        if step == 5:
            dcp.save(_stored(model, optimizer, "flat") | {"schedule": schedule.state_dict()}, checkpoint_id=folder)
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    return {"losses": losses, "rates": rates, "held": held, "all": sum(p.numel() for p in model.parameters())}


def complaints() -> dict[str, str]:
    """What is refused on several ranks, by what was tried."""
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    found = {}

    def tried(what: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"

    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    tried("partial", lambda: Optimizer([("a.weight", partial)], "muon", lr=0.1))
    marked: Any = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)]))
    marked.megatron_fsdp_dist_index = None  # as Megatron-FSDP leaves it on its parameters
    tried("megatron-fsdp", lambda: Optimizer([("a.weight", marked)], "muon", lr=0.1))
    rank = dist.get_rank()
    alone = DTensor.from_local(torch.ones(4 - rank, 4), mesh, [Shard(0)], shape=(7, 4), stride=(4, 1))
    other = DTensor.from_local(torch.ones(2 + rank, 4), mesh, [Shard(0)], shape=(5, 4), stride=(4, 1))
    assert Optimizer([("a.weight", nn.Parameter(alone))], "muon", lr=0.1)
    tried("uneven", lambda: Optimizer([("a.weight", nn.Parameter(other))], "muon", lr=0.1))
    names = [(f"a{rank}.weight", nn.Parameter(torch.ones(4, 4)))]
    tried("names", lambda: Optimizer(names, "muon", lr=0.1))
    model = make_model()
    optimizer = make_optimizer(model, "muon")
    tried("not averaged", lambda: train(model, optimizer, 0, 1, slice(4 * rank, 4 * rank + 4)))
    saved = DistributedDataParallel(make_model())
    whole = make_optimizer(saved, "muon")
    train(saved, whole, 0, 1)
    tried("one rank's file", lambda: torch.save(whole.state_dict(), "/dev/null"))
    replicas = make_optimizer(saved, "adamw")
    train(saved, replicas, 0, 2)
    file = io.BytesIO()
    torch.save(replicas.state_dict(), file)
    file.seek(0)
    lone = make_model()
    alone_again = make_optimizer(lone, "adamw", process_group=dist.new_group([rank], use_local_synchronization=True))
    alone_again.load_state_dict(torch.load(file, weights_only=True))
    lone.load_state_dict(saved.module.state_dict())
    found["replicas' file"] = str(train(lone, alone_again, 2, 4) == train(saved, replicas, 2, 4))
    before = make_model()
    early = make_optimizer(before, "adamw")
    fully_shard(before)
    early.param_groups[0]["params"] = list(before.parameters())[: len(early.param_groups[0]["params"])]
    tried("wrapped later", early.step)
    tied = distribute_tensor(torch.arange(30.0).view(5, 6), mesh, [Shard(0)])
    from megatron_opt.torch.shards import local_axes

    rows, cols = local_axes("", tied)
    assert torch.equal(tied.to_local(), torch.arange(30.0).view(5, 6)[rows][:, cols])
    found["replicated"] = str(local_axes("", distribute_tensor(torch.ones(3), mesh, [Replicate()]))[0].tolist())
    return found
