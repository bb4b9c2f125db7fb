"""Several hosts, as network namespaces: one process's losses, and what a cut link and a dead host come to."""

import time

import pytest

from megatron_opt.training.samples import consumed
from tests.cluster import hosts
from tests.cluster.conftest import ITERATIONS, LIMIT
from tests.cluster.harness import compare, losses, resumes

pytestmark = pytest.mark.slow


@pytest.fixture
def network():
    if why := hosts.missing():
        pytest.skip(why)
    with hosts.Network(4) as made:
        yield made


@pytest.fixture
def nodes(network, job):
    """The agents of some hosts with a rank each, not yet started; all write into the first one's folder."""

    def make(nnodes, *more, count=2, last_call=2):
        runs = []
        for number in range(1, count + 1):
            # the namespaces share a host name, by which torchrun would tell whose the endpoint is
            conf = f"is_host={number == 1},join_timeout=300,last_call_timeout={last_call},keep_alive_interval=2"
            launcher = ("--nnodes", nnodes, "--nproc-per-node", "1", "--rdzv-endpoint", f"{network.address(1)}:29400",
                        "--rdzv-conf", conf, "--local-addr", network.address(number), "--max-restarts", "5")  # fmt: skip
            run = job(*more, launcher=launcher, prefix=("ip", "netns", "exec", network.host(number)),
                      env={"GLOO_SOCKET_IFNAME": hosts.INTERFACE})  # fmt: skip
            runs.append(run)
        for run in runs[1:]:  # one output folder, one checkpoint; the log of each host is its own
            run.flags = list(runs[0].flags)
        return runs

    return make


def close_to(reference, got, tolerance=1e-5):
    """Another number of ranks adds up in another order: equal within rounding, at every step."""
    assert [key for key in reference if key not in got] == []
    worst = max(abs(got[key][0] - loss) / loss for key, (loss, _) in reference.items())
    assert worst < tolerance, worst


def test_two_hosts_train_with_one_hosts_losses(nodes, reference):
    first, second = nodes("2")
    first.start()
    assert second.finish(LIMIT) == 0, second.tail()
    assert first.wait(LIMIT) == 0, first.tail()
    assert compare(reference, losses(first.folder)) == []


def test_a_link_cut_for_five_seconds_is_sat_out(network, nodes, reference):
    first, second = nodes("2")
    first.start(), second.start()
    first.until(lambda: first.iteration() >= 5, LIMIT, "five steps")
    network.cut(2)
    time.sleep(5)
    network.join(2)
    assert (first.wait(LIMIT), second.wait(LIMIT)) == (0, 0), first.tail()
    assert not first.events("restart", "hang")
    assert compare(reference, losses(first.folder)) == []


def test_a_lost_host_is_done_without(network, nodes, reference):
    """Its link is cut for good: the hang is noticed, the other host resumes alone with the same global batch."""
    first, second = nodes("1:2", "--hang-timeout", "10", "--log-samples")
    first.start(), second.start()
    first.until(lambda: first.events("save") and first.iteration() >= 7, LIMIT, "a checkpoint")
    network.cut(2)
    assert first.wait(LIMIT) == 0, first.tail()
    second.end()
    (hang,) = [entry for entry in first.events("hang") if entry["rank"] == 0][:1]
    assert hang["guilty"]
    assert first.events("restart")[-1]["world_size"] == 1
    assert first.iteration() == ITERATIONS
    close_to(reference, losses(first.folder))
    seen = consumed(first.folder, resumes(first.folder))
    assert [sorted(seen[n]) for n in sorted(seen)] == [list(range(8 * n, 8 * n + 8)) for n in range(ITERATIONS)]


def test_two_of_four_hosts_are_lost(nodes, reference):
    """Killed together: the other two go on from the checkpoint, every sample is seen once."""
    runs = nodes("2:4", "--log-samples", count=4, last_call=20)
    for run in runs:
        run.start()
    runs[0].until(lambda: runs[0].events("save") and runs[0].iteration() >= 7, LIMIT, "a checkpoint")
    assert runs[0].events("start")[-1]["world_size"] == 4
    for run in runs[2:]:
        run.end()
    assert (runs[0].wait(LIMIT), runs[1].wait(LIMIT)) == (0, 0), runs[0].tail()
    assert (
        runs[0].events("start", "restart")[-1]["world_size"] == 2
    )  # torchrun may not count a new meeting as a restart
    close_to(reference, losses(runs[0].folder))
    seen = consumed(runs[0].folder, resumes(runs[0].folder))
    assert [sorted(seen[n]) for n in sorted(seen)] == [list(range(8 * n, 8 * n + 8)) for n in range(ITERATIONS)]


def test_a_lost_host_is_taken_back(nodes, reference):
    """Killed and done without; started again, the other saves, meets it anew and both go on from there."""
    runs = nodes("1:2", "--log-samples", "--module", "tests.cluster.slow", last_call=10)
    first, second = runs
    for run in runs:
        run.env |= {"SLOW_RANK": "0", "SLOW_FROM": "0", "SLOW_SECONDS": "0.05"}
        run.start()

    def sizes():
        return [entry["world_size"] for entry in first.events("start", "restart")]

    first.until(lambda: first.events("save") and first.iteration() >= 7, LIMIT, "a checkpoint")
    second.end()
    first.until(lambda: sizes()[-1] == 1 and first.iteration() >= 12, LIMIT, "steps without the lost host")
    second.start()
    assert (first.wait(LIMIT), second.wait(LIMIT)) == (0, 0), first.tail()
    assert sizes() == [2, 1, 2]
    assert first.events("signal")[-1]["signal"] == "SIGTERM"  # how torchrun asks ranks to meet anew
    close_to(reference, losses(first.folder))
    seen = consumed(first.folder, resumes(first.folder))
    assert [sorted(seen[n]) for n in sorted(seen)] == [list(range(8 * n, 8 * n + 8)) for n in range(ITERATIONS)]


def test_a_killed_host_comes_back(nodes, reference):
    first, second = nodes("2")
    first.start(), second.start()
    first.until(lambda: first.events("save"), LIMIT, "a checkpoint")
    second.end()
    time.sleep(1)
    assert second.finish(LIMIT) == 0, second.tail()
    assert first.wait(LIMIT) == 0, first.tail()
    assert first.events("resume")
    assert compare(reference, losses(first.folder)) == []


def test_the_rendezvous_host_is_killed(nodes, reference):
    """Nobody can meet without it: the other agent ends, and the same two commands go on from the checkpoint."""
    first, second = nodes("2")
    first.start(), second.start()
    second.until(lambda: first.events("save"), LIMIT, "a checkpoint")
    first.end()
    assert second.wait(LIMIT) == 1, second.tail()
    first.start()
    assert second.finish(LIMIT) == 0, second.tail()
    assert first.wait(LIMIT) == 0, first.tail()
    assert compare(reference, losses(first.folder)) == []
