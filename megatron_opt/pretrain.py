"""`torchrun … -m megatron_opt.pretrain FLAGS`: Megatron-LM's pretrain() with this project's optimizers."""

import os
import sys
import warnings
from collections.abc import Sequence

from megatron_opt.errors import UserError
from megatron_opt.training import signals


def run(argv: Sequence[str]) -> None:
    """Train as the flags say; bad input raises UserError before anything is written."""
    signals.die_with_launcher()
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer-engine).*")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # one process needs no launcher
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0")
    from megatron_opt import platform

    platform.activate()
    from megatron_opt.training import arguments

    args = arguments.parse(argv)
    from megatron_opt.training.job import train

    train(args)
    import torch

    if torch.distributed.is_initialized():  # gloo's threads may otherwise abort the process at its end
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 trained (also when the loss diverged), 2 bad input, 1 any other failure."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = f" [rank {rank}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"megatron_opt.pretrain{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit as leaving:
        return signals.exit_code(leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code)))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # other ranks may wait in a collective; torchrun ends them when this one is gone
    sys.exit(code)
