"""Network namespaces as hosts: addresses of their own, joined by a bridge in a namespace of its own."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field

INTERFACE = "host0"


def missing() -> str | None:
    """Why no namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"mo{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=30).returncode != 0:
        return "network namespaces cannot be made here"
    _ip("netns", "del", name)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@dataclass
class Network:
    """`count` hosts 10.77.0.1, 10.77.0.2, … on one bridge; nothing of it is reachable from outside."""

    count: int
    prefix: str = field(default_factory=lambda: f"mo{os.getpid()}")

    def __enter__(self) -> "Network":
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for number in range(1, self.count + 1):
            host = self.host(number)
            _ip("netns", "add", host)
            _ip(
                "-n",
                host,
                "link",
                "add",
                INTERFACE,
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                self.switch,
            )
            _ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", INTERFACE)
            _ip("-n", host, "link", "set", INTERFACE, "up")
            _ip("-n", host, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for name in [*(self.host(number) for number in range(1, self.count + 1)), self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)

    @property
    def switch(self) -> str:
        return f"{self.prefix}sw"

    def host(self, number: int) -> str:
        """Name of a host's namespace."""
        return f"{self.prefix}h{number}"

    def address(self, number: int) -> str:
        return f"10.77.0.{number}"

    def cut(self, number: int) -> None:
        """Take a host off the bridge; its connections stay open and silent."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def join(self, number: int) -> None:
        """Put it back."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "up")
