"""Three machines with a server and a member of etcd each, in namespaces with one switch between them."""

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cli.cloud.api import Api, trusting
from scripts.private_libvirtd import PrivateHost
from tests.system.boot_sector import boot_sector
from tests.system.cluster import WORLD, Cluster
from tests.system.machine import Machine, within

NAMES = ("n1", "n2", "n3")
STATE = "etcd://" + ",".join(f"10.77.0.{name[1]}:2379" for name in NAMES)


class Three(Cluster):
    """n1, n2, n3; `world` is where clients are, and the switch. The nodes' guests are played, and say nothing.

    config: each machine's settings, as written for n1; then each server has an agent of its own, and none is played.
    libvirtd: with real guests; tiny:1 says SF-GUEST-READY and halts.
    """

    def __init__(
        self, stack: ExitStack, directory: Path, config: str = "", *, libvirtd: bool = False
    ) -> None:
        self.world = stack.enter_context(PrivateHost(libvirtd=False))
        self.net(self.world, "ip link add br0 type bridge; ip link set br0 up")
        self.net(self.world, f"ip address add {WORLD}/24 dev br0")
        self.nodes, self.directory = {}, directory
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        for name in NAMES:
            home, here = directory / name, f"10.77.0.{name[1]}"
            home.mkdir()
            told = {"SF_ACCEL": "tcg", "SF_NODE_NAME": name, "SF_STORE": (directory / "store").as_uri()}
            if config:
                own = re.sub(r"(listen = .)10[.]77[.]0[.]1:", rf"\g<1>{here}:", config)
                (home / "config.toml").write_text(own)
                told["SF_CONFIG"] = str(home / "config.toml")
            else:
                told |= {"SF_STATE": STATE, "SF_GUESTS": "no", "SF_LISTEN": f"{here}:13000"}
                told["SF_FLOATING_POOL"] = "10.77.0.192/28"
            self.nodes[name] = Machine(stack.enter_context(PrivateHost(libvirtd=libvirtd)), home, **told)
            self.plug(name)
            self.member(name)
        (directory / "disk").write_bytes(boot_sector("SF-GUEST-READY and halts"))
        push = ("image", "push", str(directory / "disk"), "tiny:1", "--input-format", "raw")
        self.nodes["n1"].sf(*push)
        for name in NAMES:  # what makes the installation comes to the second and third through the state
            self.nodes[name].start()
        for name in () if config else NAMES:
            (token,) = [self.nodes[name].listed("node", "token")]
            self.agent(name, token["url"], token["token"])
        within(90, self.all_live, "all nodes are there")
        auth = self.nodes["n3"].state / "auth"
        self.key, self.ca = (auth / "local-key").read_text(), (auth / "ca.crt").read_text()

    def member(self, name: str) -> None:
        machine, here = self.nodes[name], f"http://10.77.0.{name[1]}"
        argv = [
            "etcd",
            f"--name={name}",
            f"--data-dir={machine.home}/etcd",
            "--logger=zap",
            "--unsafe-no-fsync",
        ]
        argv += [f"--listen-client-urls={here}:2379", f"--advertise-client-urls={here}:2379"]
        argv += [f"--listen-peer-urls={here}:2380", f"--initial-advertise-peer-urls={here}:2380"]
        argv += ["--initial-cluster=" + ",".join(f"{n}=http://10.77.0.{n[1]}:2380" for n in NAMES)]
        with (machine.home / "etcd.log").open("ab") as log:
            self.members[name] = machine.host.popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def agent(self, name: str, url: str = "", token: str = "") -> None:
        machine, pid = self.nodes[name], self.nodes[name].home / "node/pid"
        pid.unlink(missing_ok=True)
        argv = machine.module("tests.system.played", str(machine.home / "node"), name, url, token)
        with (machine.home / "agent.log").open("ab") as log:
            self.agents[name] = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        within(60, lambda: pid.exists() and pid.read_text(), f"the agent of {name} has started")

    def kill(self, what: str, name: str) -> None:
        """kill -9 of one process in the machine, or the machine's only link down."""
        machine = self.nodes[name]
        if what == "link":
            self.net(self.world, f"ip link set {name} down")
        elif what == "server":
            machine.signal(signal.SIGKILL)
        elif what == "member":
            machine.host.run(["pkill", "-9", "-x", "etcd"])  # sees the machine's own processes alone
            self.members[name].wait(30)
        else:
            machine.host.run(["kill", "-9", (machine.home / "node/pid").read_text()])
            self.agents[name].wait(30)

    def mend(self, what: str, name: str) -> None:
        if what == "link":
            self.net(self.world, f"ip link set {name} up")
        elif what == "server":
            self.nodes[name].start()
        elif what == "member":
            self.member(name)
        else:
            self.agent(name)

    def all_live(self) -> bool:
        done = self.nodes["n1"].sf("node", "ls", "--format", "json", check=False).stdout
        return done.count('"created"') == len(NAMES)

    def routes(self, network: str) -> list[str]:
        """The nodes that route for it now, as they say themselves."""
        return [n for n in NAMES if network in (self.nodes[n].home / "node/routes").read_text().split()]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """This thread is in the world's network meanwhile."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as home:
            with Path(f"/proc/{self.world.pid}/ns/net").open() as there:
                assert not libc.setns(there.fileno(), 0x40000000), os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert not libc.setns(home.fileno(), 0x40000000)

    def api(self, *but: str) -> Api:
        urls = ",".join(f"https://10.77.0.{name[1]}:13000" for name in NAMES if name not in but)
        return Api((urls, "system", self.key), trusting(self.ca))
