"""The training job with one batch gone bad: the loss of iteration SPIKE_AT is SPIKE times what it was, once a run."""

import os
import sys
from pathlib import Path

from megatron_opt import pretrain
from megatron_opt.training import batches

loss_function = batches.loss_function


def spoiled(*args, **kwargs):
    """The loss, spoiled at one position of the data."""
    from megatron.training import get_args

    loss, count, report = loss_function(*args, **kwargs)
    args = get_args()
    position = args.consumed_train_samples // args.global_batch_size + 1
    if position == int(os.environ["SPIKE_AT"]):
        factor = float(os.environ["SPIKE"])
        report = {"lm loss": report["lm loss"] * loss.new_tensor([factor, 1.0])}
        loss = loss * factor
        Path(os.environ["SPIKE_MARK"]).touch()
    return loss, count, report


batches.loss_function = spoiled
code = pretrain.main()
sys.stdout.flush()
os._exit(code)
