"""Claim: Muon here does no work twice, is exact on every layout, and is ahead of Megatron-Core's own Muon.

`python benchmarks/sharded_step.py` trains one small model from the same weights on the same tokens with both, layout by
layout, and prints per layout, number of layers and implementation: the optimizer step's wall time (median; slowest rank)
and processor time (mean over ranks), bytes that a rank sends in it (most), optimizer state of a rank (most), and how far
the losses are from the same implementation's on one process. Megatron-Core's Muon needs the extra `peers`
(emerging-optimizers). Ours run on the native kernels where those are built, which the first line says;
`MEGATRON_OPT_KERNELS=native` refuses to run without them. Growth over layers, in a few minutes on two cores:

    python benchmarks/sharded_step.py --layouts one tp4 tp2-dp2 tp2-dp4 --layers 8 16 32 64 --hidden 64 --steps 4 \\
        --kinds "ours, distributed optimizer" "core, duplicated" "core, distributed"
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYOUTS = {"one": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "dp2": (1, 2), "tp2-dp2": (2, 2), "tp2-dp4": (2, 4)}  # tp, dp
OURS = {
    "ours": ("auto", False),
    "ours, distributed optimizer": ("auto", True),
    "ours, group": ("group", True),
    "ours, sharded": ("sharded", False),
}
CORE = {
    "core, duplicated": "duplicated",
    "core, distributed": "distributed",
    "core, blockwise": "blockwise",
    "core, layer-wise": "duplicated",
}
VOCAB, SEQUENCE, BATCH = 512, 32, 8
LR = 3e-3


class Counter:
    """Bytes that this rank sends, as a ring would: what collectives move, whoever calls them."""

    def __init__(self) -> None:
        self.bytes = 0.0

    def install(self) -> None:
        """Count in torch.distributed's functions."""
        import torch.distributed as dist

        def wrap(name: str, cost: Any) -> None:
            original = getattr(dist, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                size = dist.get_world_size(kwargs.get("group"))
                self.bytes += cost(size, *args, **kwargs)
                return original(*args, **kwargs)

            setattr(dist, name, counted)

        def volume(tensor: Any) -> int:
            return int(tensor.numel() * tensor.element_size())

        def exchange(n: int, out: Any, message: Any, out_splits: Any = None, in_splits: Any = None, **_: Any) -> float:
            return volume(message)  # what goes to oneself is not in the message

        wrap("all_reduce", lambda n, t, *a, **k: 2 * (n - 1) / n * volume(t))
        wrap("all_gather_into_tensor", lambda n, out, *a, **k: (n - 1) / n * volume(out))
        wrap("reduce_scatter_tensor", lambda n, out, t, *a, **k: (n - 1) / n * volume(t))
        wrap("all_gather", lambda n, out, t, *a, **k: (n - 1) * volume(t))
        wrap("broadcast", lambda n, t, *a, **k: volume(t) * (n - 1) / n)
        wrap("all_to_all_single", exchange)


def make_model(tp: int, layers: int, hidden: int, distributed: bool, layer_wise: bool) -> tuple[Any, Any]:
    """One rank's model with weights that do not depend on the layout, wrapped for data parallelism."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_opt.training.initialization import initialize

    config = TransformerConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=4, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tp, init_method_std=0.05,
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        VOCAB,
        SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    initialize([model], config, 1, "megatron")
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=False)
    if layer_wise:
        from megatron.training.training import wrap_model_chunks_with_ddp

        return config, wrap_model_chunks_with_ddp([model], config, ddp, use_layer_wise_distributed_optimizer=True)[0]
    return config, DistributedDataParallel(config, ddp, model)


def make_optimizer(kind: str, model: Any) -> Any:
    """Muon of one implementation with the same hyperparameters."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    common: dict[str, Any] = {"lr": LR, "weight_decay": 0.1, "clip_grad": 0.0}
    if kind in OURS:
        from megatron_opt.distributed.build import build_optimizer
        from megatron_opt.engine_options import EngineOptions
        from megatron_opt.optimizers.groups import default_group_configs

        mode, distributed = OURS[kind]
        options = {"muon": {"momentum": 0.95, "fp32_matmul_prec": "high"}}
        config = OptimizerConfig(optimizer="adam", use_distributed_optimizer=distributed, **common)
        return build_optimizer(config, [model], default_group_configs("muon", options), EngineOptions(matrix_mode=mode))
    layer_wise = kind.endswith("layer-wise")
    config = OptimizerConfig(
        optimizer="muon",
        muon_momentum=0.95,
        muon_fp32_matmul_prec="high",
        muon_scale_mode="shape_scaling",
        muon_tp_mode=CORE[kind],
        use_layer_wise_distributed_optimizer=layer_wise,
        **common,
    )
    return get_megatron_optimizer(config, [model])


def state_bytes(optimizer: Any) -> int:
    """Bytes of this rank's optimizer state, main copies left out."""
    import torch

    if hasattr(optimizer, "matrix_steps"):
        held = [s for step in optimizer.matrix_steps for s in (*step.states.values(), *step.shared.values())]
        held += [p.state for step in optimizer.element_steps for pieces in step.slices.values() for p in pieces]
        return sum(t.numel() * t.element_size() for state in held for t in state.values())
    total = 0
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in each.optimizer.state.values():
            total += sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
    return total


def measure(kind: str, tp: int, layers: int, args: argparse.Namespace, counter: Counter) -> dict[str, Any]:
    """Losses and the optimizer step's costs of one implementation on this layout."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    torch.manual_seed(0)
    distributed = OURS[kind][1] if kind in OURS else kind.endswith("layer-wise")
    _, model = make_model(tp, layers, args.hidden, distributed, kind.endswith("layer-wise"))
    optimizer = make_optimizer(kind, model)
    dp, rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    draw = torch.Generator().manual_seed(7)
    positions = torch.arange(SEQUENCE).expand(BATCH // dp, -1)
    losses, wall, processor, sent = [], [], [], []
    for _ in range(args.steps):
        tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=draw).chunk(dp)[rank]
        model.zero_grad_buffer()
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        model.finish_grad_sync()
        shown = loss.detach().double().clone()
        dist.all_reduce(shown, group=ps.get_data_parallel_group())
        losses.append(float(shown) / dp)
        dist.barrier()
        before, clock, cpu = counter.bytes, time.perf_counter(), time.process_time()
        optimizer.step()
        wall.append(time.perf_counter() - clock)
        processor.append(time.process_time() - cpu)
        sent.append(counter.bytes - before)
    results = {
        "wall": statistics.median(wall[1:]),
        "processor": statistics.median(processor[1:]),
        "sent": sent[-1],
        "state": state_bytes(optimizer),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    merged = {key: max(g[key] for g in gathered) for key in ("wall", "sent", "state")}
    return {**merged, "processor": statistics.mean(g["processor"] for g in gathered), "losses": losses}


def worker(args: argparse.Namespace) -> None:
    """All implementations and numbers of layers on one layout, in one process group."""
    import torch
    import torch.distributed as dist

    from megatron_opt import platform

    torch.set_num_threads(1)
    platform.activate()
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tp, _ = LAYOUTS[args.worker]
    counter = Counter()
    counter.install()
    dist.init_process_group("gloo")
    ps.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    results: dict[str, Any] = {}
    for layers in args.layers:
        kinds = results[str(layers)] = {}
        for kind in args.kinds:
            try:
                kinds[kind] = measure(kind, tp, layers, args, counter)
            except Exception as error:  # what a peer refuses is a line of the table
                kinds[kind] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"}
    if dist.get_rank() == 0:
        Path(args.result).write_text(json.dumps(results))
    dist.barrier()


HEADER = f"{'layers':>6} {'layout':<9}{'implementation':<29}{'wall ms':>9}{'cpu ms':>9}{'sent MiB':>10}{'state MiB':>11}  loss off"


def lines(layout: str, results: dict[str, dict[str, Any]], one: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each number of layers and implementation; losses against those of one process."""
    made = []
    for layers, kinds in results.items():
        for kind, values in kinds.items():
            start = f"{layers:>6} {layout:<9}{kind:<29}"
            if "error" in values:
                made.append(start + values["error"])
                continue
            known = one[layers].get(kind, {}).get("losses")
            off = (
                max(abs(a - b) / abs(b) for a, b in zip(values["losses"], known, strict=True))
                if known
                else float("nan")
            )
            made.append(
                f"{start}{1e3 * values['wall']:>9.1f}{1e3 * values['processor']:>9.1f}"
                f"{values['sent'] / 2**20:>10.2f}{values['state'] / 2**20:>11.2f}  {off:.1e}"
            )
    return made


def main() -> None:
    """Start the ranks of each layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["one", "tp2", "tp4", "dp2", "tp2-dp2"])
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", choices=[*OURS, *CORE], default=[*OURS, *CORE], help="implementations")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    from megatron_opt.kernels.dispatch import native_available

    print(
        f"{'native' if native_available() else 'reference (plain torch)'} kernels, width {args.hidden}\n{HEADER}",
        flush=True,
    )
    one: dict[str, dict[str, Any]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for layout in dict.fromkeys(["one", *args.layouts]):
        tp, dp = LAYOUTS[layout]
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp * dp), __file__,
                 "--layers", *map(str, args.layers), "--hidden", str(args.hidden), "--steps", str(args.steps),
                 "--worker", layout, "--result", str(result), "--kinds", *args.kinds],
                check=True, env=environment, timeout=1800,
            )  # fmt: skip
            results = json.loads(result.read_text())
        one = one or results
        print("\n".join(lines(layout, results, one)), flush=True)


if __name__ == "__main__":
    main()
