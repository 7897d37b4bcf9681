"""A laptop: a network namespace of its own from which nothing but the API's port of one machine is reached."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.private_libvirtd import PrivateHost
from tests.system.cluster import Cluster
from tests.system.machine import ROOT, Machine

SERVER = "10.78.0.1"
URL = f"https://{SERVER}:13000"


class Laptop:
    """`sf` somewhere else. `plug` first; the server listens on all its addresses, with TLS."""

    def __init__(self, host: PrivateHost, home: Path) -> None:
        self.host, self.home = host, home
        self.variables = {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(home),
            "SF_STATE_DIR": str(home / "none"),
            "NO_COLOR": "1",
        }

    def plug(self, server: Machine) -> None:
        """A cable to the server, whose firewall lets the API's port through and no other."""
        Cluster.net(
            self.host,
            f"ip link add eth0 type veth peer name lap netns /proc/{server.host.pid}/ns/net\n"
            "ip address add 10.78.0.2/24 dev eth0; ip link set eth0 up",
        )
        Cluster.net(
            server.host,
            f"ip address add {SERVER}/24 dev lap; ip link set lap up\n"
            "iptables -A INPUT -i lap -p tcp --dport 13000 -j ACCEPT; iptables -A INPUT -i lap -j DROP",
        )

    @contextmanager
    def network(self) -> Iterator[None]:
        """This thread is in the laptop's network meanwhile, and so is what it connects and starts."""
        libc = ctypes.CDLL(None, use_errno=True)
        mine, its = Path("/proc/thread-self/ns/net"), Path(f"/proc/{self.host.pid}/ns/net")
        with mine.open() as home, its.open() as there:
            assert not libc.setns(there.fileno(), 0x40000000), os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert not libc.setns(home.fileno(), 0x40000000)

    def argv(self, *words: str) -> list[str]:
        return self.host.inside(["env", *(f"{n}={v}" for n, v in self.variables.items()), *words])

    def run(self, *words: str, code: int = 0, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(self.argv(*words), input=given, capture_output=True, timeout=240)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout!r}\n{done.stderr.decode()}"
        return done

    def sf(self, *words: str, code: int = 0, given: bytes = b"") -> str:
        return self.run("sf", *words, code=code, given=given).stdout.decode()

    @staticmethod
    def fingerprint(server: Machine) -> str:
        """What `sf serve` printed."""
        return re.findall(r"--fingerprint (b3:[0-9a-f]{64})", (server.home / "serve.log").read_text())[-1]
