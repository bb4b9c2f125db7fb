"""`megatron-opt train`: torchrun with this machine's rank count, thread count, signals and exit codes filled in.

Exit code: 0 trained, 2 bad input, 128+n saved and left on signal n (143 SIGTERM, 138 SIGUSR1), 1 anything else.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opt.errors import UserError, number

TARGET = "megatron_opt.pretrain"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SHUTDOWN_SECONDS = 120
RESTARTS = 3
BAD_INPUT = 2
SAVED = (143, 138)  # left on SIGTERM or SIGUSR1 with a checkpoint


@dataclass(frozen=True)
class Machine:
    """What this host gives to a job."""

    cores: int
    gpus: int


def machine() -> Machine:
    """Cores that this process may use (affinity and container quota) and GPUs that torch sees."""
    import torch

    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as stream:
            quota, period = stream.read().split()
        if quota != "max":
            cores = max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return Machine(cores=cores, gpus=torch.cuda.device_count())


def _size(flags: dict[str, str], name: str, default: int = 1) -> int:
    try:
        value = int(flags.get(name, default))
    except ValueError:
        raise UserError(f"--{name} wants a whole number, not {flags[name]!r}.") from None
    if name in flags and value < 1:
        raise UserError(f"--{name} is {value}; it must be at least 1.")
    return value


def effective_flags(argv: Sequence[str]) -> dict[str, str]:
    """The training flags with a preset's among them, each with its first value."""
    from megatron_opt.training.arguments import expand

    words = expand(argv)
    flags: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            flags[key] = value if equals else ("" if following.startswith("--") else following)
    return flags


def rank_count(host: Machine, flags: dict[str, str]) -> int:
    """Ranks for a run on this host alone: as many as fit the model's layout and divide the global batch.

    A GPU holds one rank, a core too; fewer cores than the layout wants are shared, GPUs are not.
    """
    shard = 1
    for name in ("tensor", "pipeline", "context"):
        shard *= _size(flags, f"{name}{'-model' if name != 'context' else ''}-parallel-size")
    devices = host.gpus or host.cores
    if host.gpus and shard > host.gpus:
        raise UserError(
            f"the layout wants {shard} ranks a model copy and this machine has {host.gpus} GPUs; "
            "lower the parallel sizes, or use several nodes by --nnodes."
        )
    copies = max(1, devices // shard)
    micro, batch = _size(flags, "micro-batch-size"), _size(flags, "global-batch-size", 0)
    while copies > 1 and batch and batch % (micro * copies):
        copies -= 1
    return copies * shard


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Train on this machine, or on this node of several; every flag not listed here goes to "
        "megatron_opt.pretrain (see `python -m megatron_opt.pretrain --help`).",
    )

    def told(name: str, default: str | None = None) -> str | None:
        return os.environ.get(f"PET_{name}", default)  # torchrun's own variables, which Kubernetes operators set

    parser.add_argument(
        "--nproc-per-node",
        type=number(1, 1e5, whole=True),
        default=told("NPROC_PER_NODE"),
        help="ranks on this node (default: from GPUs or cores)",
    )
    parser.add_argument("--nnodes", default=told("NNODES", "1"), help="nodes, N or MIN:MAX (default 1)")
    parser.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", default=told("RDZV_ENDPOINT"), help="meeting point of the nodes (c10d)"
    )
    parser.add_argument(
        "--rdzv-id", default=told("RDZV_ID", "megatron_opt"), help="name of the job at the meeting point"
    )
    parser.add_argument(
        "--rdzv-conf", default=told("RDZV_CONF", ""), help="key=value,… for the rendezvous, as torchrun takes it"
    )
    parser.add_argument("--local-addr", help="this node's address, where its name does not resolve")
    parser.add_argument(
        "--max-restarts",
        type=number(0, 1e6, whole=True),
        default=told("MAX_RESTARTS"),
        help=f"times a dead rank is answered by a restart (default {RESTARTS} with --save, else 0)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=number(0, 1e6, whole=True),
        default=SHUTDOWN_SECONDS,
        help=f"seconds that ranks get to save after a signal (default {SHUTDOWN_SECONDS})",
    )
    parser.add_argument("--module", default=TARGET, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the torchrun command and exit")
    return parser


_TORCHRUNS = (
    "nproc", "node-rank", "master-addr", "master-port", "rdzv-backend", "standalone", "signals-to-handle", "run-path",
    "no-python", "start-method", "log-dir", "redirects", "tee", "monitor-interval", "role",
)  # fmt: skip


def _check(own: argparse.Namespace, training: Sequence[str]) -> None:
    """Refuse what torchrun would answer by a traceback, and its flags that this command sets or leaves alone."""
    counts = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", str(own.nnodes))
    if not counts or (counts[2] and int(counts[1]) > int(counts[2])):
        raise UserError(f"--nnodes is {own.nnodes!r}; it must be a number of nodes, N or MIN:MAX.")
    if own.rdzv_endpoint is not None:
        host, colon, port = str(own.rdzv_endpoint).rpartition(":")
        if not (host if colon else port) or (
            colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)
        ):
            raise UserError(f"--rdzv-endpoint is {own.rdzv_endpoint!r}; it must be HOST:PORT, such as node1:29500.")
    for pair in filter(None, str(own.rdzv_conf).split(",")):
        if not re.fullmatch(r"[\w-]+=.+", pair.strip()):
            raise UserError(f"--rdzv-conf has {pair!r}; it must be key=value,….")
    if own.module == TARGET:
        for word in training:
            name = word.split("=")[0].removeprefix("--").replace("_", "-")
            if word.startswith("--") and name in _TORCHRUNS:
                raise UserError(
                    f"--{name} is torchrun's and no flag here; see megatron-opt train --help for those that are."
                )


def torchrun_arguments(own: argparse.Namespace, training: Sequence[str], host: Machine) -> list[str]:
    """The command line for torchrun."""
    flags = effective_flags(training) if own.module == TARGET else {}
    ranks = own.nproc_per_node
    if ranks is None:
        ranks = rank_count(host, flags) if own.nnodes == "1" else (host.gpus or 1)
    restarts = own.max_restarts
    if restarts is None:
        restarts = RESTARTS if "save" in flags else 0
    words = [
        "--nnodes",
        own.nnodes,
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(restarts),
        "--signals-to-handle",
        SIGNALS,
        "--shutdown-timeout",
        str(own.shutdown_timeout),
    ]
    if own.rdzv_endpoint:
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", own.rdzv_endpoint, "--rdzv-id", own.rdzv_id]
        words += ["--rdzv-conf", own.rdzv_conf] if own.rdzv_conf else []
    elif own.nnodes == "1":
        words.append("--standalone")
    else:
        raise UserError(f"--nnodes {own.nnodes} needs --rdzv-endpoint HOST:PORT, where the nodes meet.")
    words += ["--local-addr", own.local_addr] if own.local_addr else []
    return [*words, "-m", own.module, *training]


def _exit_code(failures: Sequence[int]) -> int:
    """One code for the run from the codes of its failed ranks (negative: killed by that signal)."""
    if BAD_INPUT in failures:
        return BAD_INPUT
    saved = [code for code in failures if code in SAVED]
    return saved[0] if saved and len(saved) == len(failures) else 1


def launch(words: Sequence[str]) -> int:
    """Run torchrun in this process; bad input is not restarted, and a restart meets in a store of its own."""
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    restarts = [-1]  # of the ranks that run now

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group) -> RunResult:  # type: ignore[no-untyped-def]
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.FAILED:
                _note_deaths({rank: failure.exitcode for rank, failure in result.failures.items()}, restarts[0])
            if result.state == WorkerState.FAILED and any(
                failure.exitcode == BAD_INPUT for failure in result.failures.values()
            ):
                self._remaining_restarts = 0
            return result

        def _rendezvous(self, worker_group) -> None:  # type: ignore[no-untyped-def]
            restarts[0] += 1
            # torch 2.14 keeps one store over restarts, where new ranks read the addresses of their dead predecessors
            handler = worker_group.spec.rdzv_handler
            for name in ("_bootstrap_store_info", "_shared_tcp_store_server"):
                if hasattr(handler, name):
                    setattr(handler, name, None)
            super()._rendezvous(worker_group)

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run.run(run.parse_args(list(words)))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code = _exit_code(list(codes.values()))
        if code == 1:
            first = error.get_first_failure()[1]
            how = f"was killed by signal {-first.exitcode}" if first.exitcode < 0 else f"left with {first.exitcode}"
            print(
                f"megatron-opt train: local rank {first.local_rank} {how} (process {first.pid}); "
                "its own message stands above.",
                file=sys.stderr,
            )
        return code
    except SignalException as signalled:
        return 128 + int(signalled.sigval)
    return 0


def _note_deaths(codes: dict[int, int], restart: int) -> None:
    """The run's event log tells which ranks ended how; bad input and saved runs have told it themselves."""
    from megatron_opt.training import events

    ended = -int(signal.SIGTERM)  # by the agent, because of another
    if any(code != ended for code in codes.values()):
        codes = {rank: code for rank, code in codes.items() if code != ended}
    how = {
        str(rank): f"was killed by signal {-code}" if code < 0 else f"left with {code}"
        for rank, code in sorted(codes.items())
        if code not in (BAD_INPUT, *SAVED)
    }
    if how:
        events.record("rank_died", ranks=how, restart=restart)


def _note_failure(code: int, own: argparse.Namespace, training: Sequence[str]) -> None:
    """The run's event log tells that nobody will start it again; fewer nodes may go on with --nnodes MIN:MAX."""
    from megatron_opt.training import events

    folder = effective_flags(training).get("output-dir")
    if code not in (0, *SAVED) and ":" not in own.nnodes and folder and os.path.isdir(folder):
        events.open_log(folder)
        events.record("failed", code=code)


def _open_log(training: Sequence[str]) -> None:
    from megatron_opt.training import events

    folder = effective_flags(training).get("output-dir")
    events.open_log(folder, make=False)  # the ranks make it, once their flags are good


def main(argv: list[str], prog: str = "megatron-opt train") -> int:
    """Start the ranks of this node and wait for them."""
    own, training = _parser(prog).parse_known_args(argv)
    if training[:1] == ["--"]:
        training = training[1:]
    _check(own, training)
    host = machine()
    words = torchrun_arguments(own, training, host)
    ranks = int(words[words.index("--nproc-per-node") + 1])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, host.cores // ranks)))
    if own.dry_run:
        print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} torchrun", *words)
        return 0
    _open_log(training)
    code = launch(words)
    _note_failure(code, own, training)
    return code
