"""Claim: on a calibrated machine, optimizer time is predicted within 20% (median), state within 2%, peak memory within 10%.

`python benchmarks/cost_calibration.py --output DIR` calibrates the machine, then trains five optimizers on three sizes in
four layouts with made-up tokens, and prints measured beside predicted. `--layouts one` does a piece, with a calibration of
its own; what lies in DIR is not measured again, and `--table` prints all pieces. Run it on a machine that does nothing else.

Optimizer time is that of `optimizer.step()` on the slowest rank: the median of ordinary steps, and a refresh step in its
share. Peak memory is the tensors alive before the tenth step (on which SOAP refreshes) and the most that step adds.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OPTIMIZERS = ("adamw", "lion", "muon", "scion", "soap")
SIZES = {"tiny": (4, 128, 352, 4), "small": (4, 256, 704, 4), "medium": (8, 512, 1408, 8)}
LAYOUTS = {  # tp, pp, ranks, distributed optimizer
    "one": (1, 1, 1, False), "tp2": (2, 1, 2, False), "dp2-distopt": (1, 1, 2, True), "pp2": (1, 2, 2, False),
}  # fmt: skip
SEQUENCE, VOCABULARY, BATCH, MICROBATCHES = 128, 4096, 4, 2
EVICTED = 1 << 26  # elements of fp32, 256 MB
PROFILED = 10  # the step whose memory is traced, on which SOAP refreshes


def flags_of(size: str, optimizer: str, layout: str) -> dict[str, Any]:
    """The flags that describe a case to the cost model."""
    layers, hidden, ffn, heads = SIZES[size]
    tp, pp, ranks, distributed = LAYOUTS[layout]
    return {
        "num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": ffn, "num-attention-heads": heads,
        "seq-length": SEQUENCE, "vocab-size": VOCABULARY, "make-vocab-size-divisible-by": 1, "swiglu": True,
        "normalization": "RMSNorm", "disable-bias-linear": True, "position-embedding-type": "rope",
        "untie-embeddings-and-output-weights": True, "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp, "use-distributed-optimizer": distributed, "global-batch-size": BATCH,
        "micro-batch-size": BATCH * tp * pp // (MICROBATCHES * ranks), "transformer-impl": "local",
        "no-gradient-accumulation-fusion": True, "optimizer": optimizer,
    }  # fmt: skip


def build_model(size: str, pp: int, distributed: bool) -> Any:
    """One rank's Megatron model in its gradient buffers."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
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
        batch_p2p_sync=False, batch_p2p_comm=False, hidden_dropout=0.0, attention_dropout=0.0,
        finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, SEQUENCE,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
        pre_process=ps.is_pipeline_first_stage(), post_process=ps.is_pipeline_last_stage(),
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=False)
    return DistributedDataParallel(config, ddp, model)


class Case:
    """One optimizer on one model: its steps, timed and traced."""

    def __init__(self, size: str, name: str, layout: str) -> None:
        from megatron.core.optimizer import OptimizerConfig

        from megatron_opt.cost_model.flags import grouping
        from megatron_opt.distributed.build import build_optimizer

        _, pp, _, distributed = LAYOUTS[layout]
        self.model, self.flags = build_model(size, pp, distributed), flags_of(size, name, layout)
        config = OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0, use_distributed_optimizer=distributed)
        self.optimizer = build_optimizer(config, [self.model], grouping({"optimizer": name}))

    def forward_backward(self) -> float:
        """Seconds of a step's passes."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        micro = self.flags["micro-batch-size"]
        tokens = torch.randint(VOCABULARY, (micro, SEQUENCE))
        positions = torch.arange(SEQUENCE).expand(micro, -1)

        def forward(iterator: Any, model: Any) -> Any:
            return model(tokens, positions, None, labels=tokens), lambda output: (output.mean(), {})

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        start = time.perf_counter()
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(()), model=[self.model], num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE, micro_batch_size=micro, decoder_seq_length=SEQUENCE, forward_only=False,
        )  # fmt: skip
        return time.perf_counter() - start

    def step(self) -> float:
        """Seconds of the optimizer."""
        import torch.distributed as dist

        dist.barrier()
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """Bytes that this rank keeps between steps beside parameters and gradients."""
        steps, slices = self.optimizer.matrix_steps, self.optimizer.element_steps
        states = [state for step in steps for state in (*step.states.values(), *step.shared.values())]
        states += [piece.state for step in slices for pieces in step.slices.values() for piece in pieces]
        return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())

    def measure(self) -> list[float]:
        """Seconds of the optimizer (mean over its period) and of a step; bytes of state and at the peak."""
        import torch

        self.forward_backward()
        self.step()
        passes, times = [], []
        for _ in range(2):
            passes.append(self.forward_backward())
            times.append(self.step())
        kept = [(param, param.main_grad.clone()) for param in self.model.parameters()]
        while self.optimizer.step_number < PROFILED - 1:
            for param, grad in kept:  # a step leaves its directions in the gradients' place
                param.main_grad.copy_(grad)
            evict()
            times.append(self.step())
        del kept
        before = alive()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            self.forward_backward()
            refresh = self.step()
        ordinary = statistics.median(times)
        mean = ordinary + max(0.0, refresh - ordinary) / PROFILED if self.flags["optimizer"] == "soap" else ordinary
        return [mean, min(passes) + mean, float(self.state_bytes()), float(before + highest(trace))]


def evict() -> None:
    """Fill the caches with other data, as the passes of a training step do."""
    import torch

    torch.zeros(EVICTED).add_(1.0)


def alive() -> int:
    """Bytes of all tensors that Python can see, shared storage counted once."""
    import torch

    gc.collect()
    found = [item.untyped_storage() for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def highest(trace: Any) -> int:
    """Largest sum of what was allocated and not yet freed."""
    total = most = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def work(layout: str, optimizers: list[str], sizes: list[str], output: str) -> None:
    """Inside a rank: every optimizer and size of one layout; rank 0 writes the largest figures of all ranks."""
    import torch
    import torch.distributed as dist

    from megatron_opt import platform

    platform.activate()
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    tp, pp, _, _ = LAYOUTS[layout]
    dist.init_process_group("gloo" if platform.on_cpu() else "nccl")
    torch.set_num_threads(1)
    ps.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    file = Path(output)
    found = json.loads(file.read_text()) if file.exists() else []
    done = {(row["size"], row["optimizer"]) for row in found}
    for size, name in itertools.product(sizes, optimizers):
        if (size, name) in done:
            continue
        figures = torch.tensor(Case(size, name, layout).measure(), dtype=torch.float64)
        gc.collect()
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
        found.append({"layout": layout, "size": size, "optimizer": name, "measured": figures.tolist()})
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(layout: str, optimizers: str, sizes: str, folder: Path) -> None:
    """Calibrate, unless that was done, and launch the ranks of one layout for what is missing."""
    from megatron_opt.cost_model.calibrate import calibrate

    file, machine = folder / f"{layout}.json", folder / f"{layout}.yaml"
    if not machine.exists():
        machine.write_text(calibrate())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(LAYOUTS[layout][2]), __file__, "--worker", layout, "--output", str(file)]
    command += ["--optimizers", optimizers, "--sizes", sizes]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def predict(row: dict[str, Any], folder: Path) -> list[float]:
    """What is predicted of a row: optimizer, step, state, peak."""
    from megatron_opt.cost_model import step as steps
    from megatron_opt.cost_model.cluster import load

    layout = row["layout"]
    flags = flags_of(row["size"], row["optimizer"], layout)
    step = steps.predict(flags, load(str(folder / f"{layout}.yaml")), LAYOUTS[layout][2])
    gathered = step.traffic.seconds.get("data parameters", 0.0)  # inside optimizer.step() where nothing hides it
    peak = step.memory.total - step.memory.reserved
    return [step.optimizer.mean + gathered, step.seconds, step.optimizer.state_bytes, peak]


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for calibrations and figures")
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--sizes", default=",".join(SIZES))
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.optimizers.split(","), args.sizes.split(","), str(args.output))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    layouts = [
        layout for layout in args.layouts.split(",") if not args.table or (args.output / f"{layout}.json").exists()
    ]
    rows = []
    for layout in layouts:
        if not args.table:
            measure(layout, args.optimizers, args.sizes, args.output)
        rows += json.loads((args.output / f"{layout}.json").read_text())
    show(rows, args.output)


def show(rows: list[dict[str, Any]], folder: Path) -> None:
    """Measured, and predicted over measured, of every row; medians."""
    print("| layout | size | optimizer | optimizer ms | ratio | step ms | ratio | state MB | ratio | peak MB | ratio |")
    print("|---|---|---|" + "---:|" * 8)
    ratios = []
    for row in rows:
        measured = row["measured"]
        ratio = [p / m for p, m in zip(predict(row, folder), measured, strict=True)]
        ratios.append(ratio)
        scaled = [measured[0] * 1e3, measured[1] * 1e3, measured[2] / 1e6, measured[3] / 1e6]
        cells = " | ".join(f"{value:.2f} | {share:.3f}" for value, share in zip(scaled, ratio, strict=True))
        print(f"| {row['layout']} | {row['size']} | {row['optimizer']} | {cells} |")
    for what, values in zip(("optimizer time", "step time", "state bytes", "peak memory"), zip(*ratios), strict=True):
        errors = [abs(value - 1) for value in values]
        print(f"{what}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
