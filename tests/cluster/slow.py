"""The training job with a rank that dawdles: SLOW_RANK sleeps SLOW_SECONDS in each forward pass from SLOW_FROM on."""

import os
import sys
import time

from megatron_opt import pretrain
from megatron_opt.training import batches

forward_step = batches.forward_step


def dawdling(*args, **kwargs):
    """One microbatch, late."""
    from megatron.training import get_args

    if os.environ["SLOW_RANK"] == os.environ["RANK"] and get_args().curr_iteration >= int(os.environ["SLOW_FROM"]):
        time.sleep(float(os.environ["SLOW_SECONDS"]))
    return forward_step(*args, **kwargs)


batches.forward_step = dawdling
code = pretrain.main()
sys.stdout.flush()
os._exit(code)
