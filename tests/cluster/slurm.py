"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd of the test's own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "squeue")
NODES = ("n1", "n2")


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Daemons and their configuration below one folder."""

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self) -> None:
        """Start everything and wait for both nodes to be idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # a requeued job waits until its credentials have expired, which takes two minutes by default
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={_free_port()}", "SlurmUser=root",
            "AuthType=auth/munge", f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=20", "CredType=cred/munge",
            f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder}/ctld.pid", f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmctldLogFile={self.folder}/ctld.log", f"SlurmdLogFile={self.folder}/%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU", "SchedulerType=sched/backfill", "MpiDefault=none", "ReturnToService=2",
            "JobRequeue=1", "KillWait=60", "SlurmdTimeout=20", "InactiveLimit=0", "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE", "SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1",
            *(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=2" for name in NODES),
            f"PartitionName=low Nodes={','.join(NODES)} Default=YES State=UP PriorityTier=1 GraceTime=60 OverSubscribe=NO",
            f"PartitionName=high Nodes={','.join(NODES)} State=UP PriorityTier=2",
        ]  # fmt: skip
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "state").mkdir(exist_ok=True)
        names = ("socket", "pid", "log", "seed")
        files = [
            f"--{'log-file' if n == 'log' else 'pid-file' if n == 'pid' else 'seed-file' if n == 'seed' else n}"
            f"={self.folder}/munge.{n}"
            for n in names
        ]
        self._daemon("munged", ["munged", "--foreground", "--force", f"--key-file={key}", *files])
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)
            self._daemon(name, ["slurmd", "-D", "-N", name])
        self._until(lambda: self.states() == {"IDLE"}, "idle nodes")

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def fail(self, name: str) -> None:
        """Take a node's power: its daemon, the steps it runs and their processes."""
        import psutil

        spool = str(self.folder / f"spool-{name}")
        steps = [
            process
            for process in psutil.process_iter(["name"])
            if process.info["name"] == "slurmstepd"
            and any(spool in str(c.laddr) for c in process.net_connections(kind="unix"))
        ]
        tasks = [child for step in steps for child in step.children(recursive=True)]
        daemon = self.daemons.pop(name)
        for process in (daemon.pid, *(step.pid for step in steps), *(task.pid for task in tasks)):
            _kill(process)
        daemon.wait(timeout=30)

    def restore(self, name: str) -> None:
        """Power again."""
        self._daemon(name, ["slurmd", "-D", "-N", name])

    def environment(self, **more: str) -> dict[str, str]:
        """Where clients find this cluster."""
        kept = {n: v for n, v in os.environ.items() if not n.startswith("SLURM")}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def run(self, *command: str, **more: str) -> str:
        """Output of a client command."""
        done = subprocess.run(
            command, env=self.environment(**more), capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def states(self) -> set[str]:
        """States of the nodes, flags cut off."""
        try:
            text = self.run("sinfo", "--noheader", "--Node", "-o", "%T")
        except AssertionError:
            return set()
        return {line.strip("*~#$@+-").upper() for line in text.split()}

    def job_state(self, job: str) -> str:
        """A job's state word."""
        text = self.run("scontrol", "show", "job", job)
        return next(w.partition("=")[2] for w in text.split() if w.startswith("JobState="))

    def _until(self, condition, what: str, seconds: float = 90.0) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + seconds
        while not condition():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise AssertionError(f"{name} ended:\n{self.log(name)}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.log('ctld')}\n{self.log('n1')}")
            time.sleep(0.3)

    def log(self, name: str) -> str:
        """End of a daemon's logs."""
        found = [self.folder / f"{name}.{suffix}" for suffix in ("log", "out")]
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in found if path.is_file())

    def stop(self) -> None:
        """End all daemons and what they started."""
        import psutil

        for daemon in self.daemons.values():
            members = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            for process in [*members]:
                _kill(process.pid)
            _kill(daemon.pid)
            daemon.wait(timeout=30)
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                _kill(process.pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
