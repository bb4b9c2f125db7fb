"""What one rank's optimizer step asks of a GPU: kernel launches, bytes, waits of the host, and the host's own time.

    python benchmarks/launches.py [--model llama-7b] [--tp 8] [--dp 64] [--rules muon soap …] [--ranks 0 100 511] [--reference]

The rank's step runs on tensors that say `cuda` and compute nothing (`megatron_opt/distributed/rehearsal.py`): no GPU, no other
ranks, no memory. Every operation of torch's that is no view counts as one launch, multi-tensor ones as their tensors need; a
decomposition of torch's is many launches on a GPU and counts as one. Host time includes the counting, so that it is an upper bound.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from megatron_opt.distributed.planning import Layout
from megatron_opt.distributed.rehearsal import rehearsal
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.optimizers.groups import default_group_configs
from megatron_opt.presets import names, read

REFRESH = ("soap", "shampoo")
VOCABULARY = 32000
RULES = ["adamw", "mars", "cautious", "lion", "muon", "scion", "soap", "shampoo", "kron", "muon_h"]


def measure(model: ModelSpec, layout: Layout, optimizer: str, rank: int, native: bool) -> dict[str, dict]:
    """Counts of an ordinary step and, where there is one, of a step with a refresh."""
    results = {}
    with rehearsal(model, layout, default_group_configs(optimizer), rank, native=native) as made:
        made.step()  # states are made, first bases found
        made.optimizer.step_number = 2  # SOAP's slices ask once more in the second
        for kind in ("step", "refresh") if optimizer in REFRESH else ("step",):
            if kind == "refresh":
                made.optimizer.step_number = 9
            count, seconds = made.step()
            results[kind] = {
                "launches": count.total,
                "copies": count.launches["aten::copy_"] + count.launches["aten::_foreach_copy_"],
                "collectives": count.launches["collective"],
                "megabytes": round(count.bytes / 1e6, 1),
                "waits": count.waits.total(),
                "host_ms": round(1e3 * seconds, 1),
                "most": count.launches.most_common(6),
            }
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="kernel launches, bytes and waits of one rank's optimizer step")
    parser.add_argument("--model", choices=names(), default="llama-7b", help="a preset")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dp", type=int, default=64)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--ranks", nargs="+", type=int, help="which ranks; the one that launches most is shown")
    parser.add_argument("--reference", action="store_true", help="without our CUDA kernels")
    parser.add_argument("--json", type=Path, help="write all counts here too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = ModelSpec.of(read(args.model) | {"padded-vocab-size": VOCABULARY})
    layout = Layout(tp=args.tp, dp=args.dp, distributed=True)
    ranks = args.ranks or sorted({0, layout.tp * layout.dp // 3, layout.tp * layout.dp - 1})
    print(f"{args.model}, TP{args.tp}×DP{args.dp}, distributed optimizer, bf16, ranks {ranks}\n")
    print("| rule | step | launches | of them copies | collectives | MB moved | waits | host ms |")
    print("|---|---|---|---|---|---|---|---|")
    everything = {}
    for optimizer in args.rules:
        by_rank = {rank: measure(model, layout, optimizer, rank, not args.reference) for rank in ranks}
        everything[optimizer] = by_rank
        for kind in by_rank[ranks[0]]:
            most = max((counts[kind] for counts in by_rank.values()), key=lambda count: count["launches"])
            cells = [most[key] for key in ("launches", "copies", "collectives", "megabytes", "waits", "host_ms")]
            print(f"| {optimizer} | {kind} | {' | '.join(f'{cell:,}' for cell in cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
