"""Who is called slow: over a window, against the median of the same pipeline stage, once."""

import time

from megatron_opt.training.stragglers import OwnTime, Watch


def test_named_once_until_it_is_over():
    watch = Watch(1.5, window=4)
    assert watch.see(2, [0.2, 0.2, 0.5], [0, 0, 0]) == {}  # the window is not full
    ((rank, (mine, usual)),) = watch.see(2, [0.2, 0.2, 0.5], [0, 0, 0]).items()
    assert rank == 2 and abs(mine - 0.25) < 1e-9 and abs(usual - 0.1) < 1e-9
    assert watch.see(4, [0.4, 0.4, 1.0], [0, 0, 0]) == {}  # said already
    assert watch.see(4, [0.4, 0.4, 0.4], [0, 0, 0]) == {}
    assert list(watch.see(4, [0.4, 0.4, 1.0], [0, 0, 0])) == [2]


def test_stages_are_compared_within_themselves_and_noise_is_not_named():
    watch = Watch(1.5, window=1)
    assert watch.see(1, [0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1]) == {}
    assert list(watch.see(1, [0.1, 0.1, 0.9, 0.3], [0, 0, 1, 1])) == [2]
    assert watch.see(1, [1e-4, 1e-4, 5e-4, 1e-4], [0, 0, 0, 0]) == {}
    assert watch.see(1, [0.1, 0.9], [0, 1]) == {}  # nobody to compare with
    assert Watch(0, window=1).see(1, [0.1, 9.0], [0, 0]) == {}


def test_own_time_leaves_waiting_out():
    own = OwnTime()
    wait = own.timed(own.timed(time.sleep))  # nested calls count once

    class Training:
        @staticmethod
        def train_step():
            time.sleep(0.05)
            wait(0.2)

    import torch.distributed as dist

    kept = {name: getattr(dist, name) for name in dir(dist)}
    work = dist.Work.wait
    try:
        own.install(Training)
        Training.train_step()
    finally:
        for name, value in kept.items():
            setattr(dist, name, value)
        dist.Work.wait = work
    assert 0.04 < own.take() < 0.15 and own.take() == 0
