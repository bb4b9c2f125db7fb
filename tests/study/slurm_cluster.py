"""A real Slurm of two nodes on this machine, for the time of a test."""

import os
import shutil
import socket
import subprocess
import time

CONFIGURATION = """\
ClusterName=study
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=3
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def missing():
    """Why no cluster can be started here; empty when it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Starts munged, slurmctld and two slurmd in a short-named folder; `stop` ends exactly those."""

    def __init__(self, folder):
        self.folder = folder
        port, port1, port2 = _free_ports(3)
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0], folder=folder, port=port, port1=port1, port2=port2
            )
        )
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.environment = dict(os.environ) | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes = []

    def start(self):
        f = self.folder
        self._run(
            "munged",
            "--foreground",
            "--force",
            "-S",
            f"{f}/munge.socket",
            f"--key-file={f}/munge.key",
            f"--pid-file={f}/munged.pid",
            f"--log-file={f}/munged.log",
            f"--seed-file={f}/munged.seed",
        )
        end = time.monotonic() + 20
        while not (f / "munge.socket").exists() and time.monotonic() < end:
            time.sleep(0.05)
        self._run("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._run("slurmd", "-D", "-N", node)
        while time.monotonic() < end + 40:
            done = subprocess.run(["sinfo", "-h", "-o", "%t %D"], env=self.environment, capture_output=True, text=True)
            if done.stdout.split() == ["idle", "2"]:
                return
            time.sleep(0.2)
        raise RuntimeError((f / "slurmctld.log").read_text()[-2000:])

    def _run(self, *words):
        self._processes.append(
            subprocess.Popen(words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def stop(self):
        subprocess.run(["scancel", "--me"], env=self.environment, capture_output=True)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
