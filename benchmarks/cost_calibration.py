"""Claim: on a calibrated machine, optimizer time is predicted within 20% (median) and state bytes within 2%.

`python benchmarks/cost_calibration.py --cluster machine.yaml` (a file of `megatron-opt cost calibrate`) steps five
optimizers on three sizes in four layouts with made-up gradients, and prints measured beside predicted. On a CPU the time
is the slowest rank's own processor time, so that other processes on the machine do not count; waiting is left out there.
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

OPTIMIZERS = ("adamw", "lion", "muon", "scion", "soap")
SIZES = {"tiny": (4, 128, 352, 4), "small": (4, 256, 704, 4), "medium": (8, 512, 1408, 8)}
LAYOUTS = {  # tp, pp, ranks, distributed optimizer
    "one": (1, 1, 1, False), "tp2": (2, 1, 2, False), "dp2-distopt": (1, 1, 2, True), "pp2": (1, 2, 2, False),
}  # fmt: skip
STEPS = 10


def flags_of(size: str, optimizer: str, layout: str) -> dict[str, Any]:
    """The flags that describe a case to the cost model."""
    layers, hidden, ffn, heads = SIZES[size]
    tp, pp, _, distributed = LAYOUTS[layout]
    return {
        "num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": ffn, "num-attention-heads": heads,
        "seq-length": 128, "vocab-size": 4096, "make-vocab-size-divisible-by": 1, "swiglu": True,
        "normalization": "RMSNorm", "disable-bias-linear": True, "position-embedding-type": "rope",
        "untie-embeddings-and-output-weights": True, "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp, "use-distributed-optimizer": distributed, "global-batch-size": 4,
        "transformer-impl": "local", "optimizer": optimizer,
    }  # fmt: skip


def build_model(size: str, pp: int, distributed: bool) -> list[Any]:
    """One rank's Megatron model in its gradient buffers, with made-up gradients beside them."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    layers, hidden, ffn, heads = SIZES[size]
    config = TransformerConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        use_cpu_initialization=True, pipeline_dtype=torch.float32, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        tensor_model_parallel_size=ps.get_tensor_model_parallel_world_size(), pipeline_model_parallel_size=pp,
        batch_p2p_sync=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), 4096, 128, position_embedding_type="rope",
        share_embeddings_and_output_weights=False, pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(config, ddp, model)
    generator = torch.Generator().manual_seed(ps.get_pipeline_model_parallel_rank())
    for param in wrapped.parameters():
        param.made_up = torch.randn(param.main_grad.shape, generator=generator) * 1e-3
    return [wrapped]


def fill_gradients(chunks: list[Any]) -> None:
    """Fresh gradients: a step leaves its directions in their place."""
    for chunk in chunks:
        for param in chunk.parameters():
            param.main_grad.copy_(param.made_up)


def state_bytes(optimizer: Any) -> int:
    """Bytes that this rank keeps between steps beside parameters and gradients."""
    states = [state for step in optimizer.matrix_steps for state in (*step.states.values(), *step.shared.values())]
    states += [p.state for step in optimizer.element_steps for pieces in step.slices.values() for p in pieces]
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())


def work(layout: str, optimizers: list[str], sizes: list[str], output: str) -> None:
    """Inside a rank: every optimizer and size of one layout; rank 0 writes the slowest rank's figures."""
    import torch
    import torch.distributed as dist

    from megatron_opt import platform

    platform.activate()
    from megatron.core import parallel_state as ps
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_opt.cost_model.flags import grouping
    from megatron_opt.distributed.build import build_optimizer

    tp, pp, _, distributed = LAYOUTS[layout]
    dist.init_process_group("gloo" if platform.on_cpu() else "nccl")
    torch.set_num_threads(1)
    ps.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    clock = time.process_time if platform.on_cpu() else time.perf_counter
    found = []
    for size in sizes:
        for name in optimizers:
            chunks = build_model(size, pp, distributed)
            config = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=distributed)
            optimizer = build_optimizer(config, chunks, grouping({"optimizer": name}))
            fill_gradients(chunks)
            optimizer.step()
            times, wall = [], []
            for _ in range(STEPS):  # SOAP's period of ten is covered once
                fill_gradients(chunks)
                dist.barrier()
                begin, start = clock(), time.perf_counter()
                optimizer.step()
                times.append(clock() - begin)
                wall.append(time.perf_counter() - start)
            mean = sum(times) / len(times) if name == "soap" else statistics.median(times)
            figures = torch.tensor([mean, statistics.median(wall), float(state_bytes(optimizer))], dtype=torch.float64)
            dist.all_reduce(figures, op=dist.ReduceOp.MAX)
            found.append({"layout": layout, "size": size, "optimizer": name, "measured": figures.tolist()})
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(layout: str, optimizers: list[str], sizes: list[str]) -> list[dict[str, Any]]:
    """Launch the ranks of one layout."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(LAYOUTS[layout][2]), __file__, "--worker", layout, "--output", str(file)]
        command += ["--optimizers", ",".join(optimizers), "--sizes", ",".join(sizes)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(file.read_text())


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", help="cluster file of this machine")
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write all figures as JSON")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--sizes", default=",".join(SIZES))
    args = parser.parse_args()
    optimizers, sizes = args.optimizers.split(","), args.sizes.split(",")
    if args.worker:
        work(args.worker, optimizers, sizes, args.output)
        return
    from dataclasses import replace

    from megatron_opt.cost_model.cluster import Link, load
    from megatron_opt.cost_model.step import predict

    cluster = load(args.cluster)
    if cluster.shared_cores:  # processor time: no waiting for the other rank's messages, no turns on shared cores
        still = Link(cluster.node.bandwidth, 0.0)
        cluster = replace(cluster, shared_cores=1 << 20, node=still, network=still)
    rows = []
    print(
        f"{'layout':<12} {'size':<7} {'optimizer':<9} {'ms':>9} {'predicted':>9} {'ratio':>6} {'state kB':>10} {'ratio':>6}"
    )
    for layout in args.layouts.split(","):
        for row in measure(layout, optimizers, sizes):
            step = predict(flags_of(row["size"], row["optimizer"], layout), cluster, LAYOUTS[layout][2])
            seconds, _, state = row["measured"]
            row |= {"predicted": step.optimizer.mean, "state": step.optimizer.state_bytes}
            row |= {"ratio": step.optimizer.mean / seconds, "state_ratio": step.optimizer.state_bytes / state}
            rows.append(row)
            print(
                f"{layout:<12} {row['size']:<7} {row['optimizer']:<9} {seconds * 1e3:>9.2f} {row['predicted'] * 1e3:>9.2f} "
                f"{row['ratio']:>6.2f} {state / 1e3:>10.1f} {row['state_ratio']:>6.3f}"
            )
    errors = [abs(row["ratio"] - 1) for row in rows]
    worst = max(abs(row["state_ratio"] - 1) for row in rows)
    print(f"median error of optimizer time {statistics.median(errors):.1%}; largest error of state bytes {worst:.2%}")
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
