"""An agent that makes and removes networks of both kinds, ports, floating IPs, published ports, rules and limits,
eight at once, and has bad luck.

    python -m tests.net.churn DIRECTORY INSTALLATION SEED CYCLES

Desired state lies in DIRECTORY/desired before it is applied, as an agent's last copy does; a rerun reconciles it first
and goes on. Bad luck: every so many steps in the kernel one fails, or the whole process is killed as by kill -9; now
and then a dnsmasq dies. Exit code 0: all cycles done and the last reconcile found nothing to do.
"""

import fcntl
import os
import pickle
import random
import signal
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from net.errors import NetError
from net.ipam import UNKNOWN
from net.kernel import dnsmasq, netns, taps
from net.kernel.netns import NetlinkError, Netns
from net.plan import names
from net.plan.model import Allow, Limits, Network, NodeNetworks, Peer, Published
from net.plane import Plane
from tests.net.machines import make_network, make_port

AT_ONCE = 8
STEPS = (
    "entry",
    "change_link",
    "mark",
    "raise_loopback",
    "create",
    "move_link",
    "delete_link",
    "nft",
)
FUNCTIONS = ((netns, "create_namespace"), (netns, "remove_namespace"), (taps, "create_tap"))


class Agent:
    def __init__(self, directory: Path, installation: str, seed: int) -> None:
        self.plane = Plane(installation, directory)
        self.file = directory / "desired"
        self.done = directory / "done"
        self.lock, self.applying = threading.Lock(), threading.Lock()
        self.random = random.Random(seed)
        self.installation = installation
        self.unlucky = True
        self.networks: dict[int, Network] = pickle.loads(self.file.read_bytes()) if self.file.exists() else {}

    def jinx(self) -> None:
        for name in STEPS:
            setattr(Netns, name, self._unlucky(getattr(Netns, name)))
        for module, name in FUNCTIONS:
            setattr(module, name, self._unlucky(getattr(module, name)))

    def _unlucky(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            luck = self.random.random() if self.unlucky else 1
            if more.get("json"):  # a look asks nft some hundred times
                luck = min(10 * luck, 0.999)
            if luck < 0.0005:
                os.kill(os.getpid(), signal.SIGKILL)
            if luck < 0.005:
                raise NetlinkError(105, "No buffer space available (injected)")
            result = function(*arguments, **more)
            if luck > 0.9995 and self.unlucky:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step

    def desired(self) -> NodeNetworks:
        peers = (Peer("n1", IPv4Address("10.9.9.1")), Peer("n2", IPv4Address("10.9.9.2")))
        return NodeNetworks(
            self.installation, "n1", tuple(self.networks.values()), peers, IPv4Address("10.9.9.1")
        )

    def set(self, slot: int, network: Network | None) -> None:
        """The server's word: durable before anybody acts on it."""
        with self.lock:
            if network is None:
                self.networks.pop(slot, None)
            else:
                self.networks[slot] = network
            beside = self.file.with_suffix(".new")
            beside.write_bytes(pickle.dumps(self.networks))
            beside.rename(self.file)
        self.insist(self.apply)

    def apply(self) -> Any:
        """What is desired now: one at a time, so that nobody applies what is no longer true."""
        with self.applying:
            with self.lock:
                wanted = self.desired()
            return self.plane.apply(wanted)

    def insist(self, function: Callable[..., Any], *arguments: Any) -> Any:
        for tries_left in range(20, -1, -1):
            try:
                return function(*arguments)
            except (NetError, NetlinkError):
                if not tries_left:
                    raise
        return None

    def lan(self, slot: int, number: int) -> None:
        """A guest on the node's own bridge, its address the LAN's or known."""
        port = replace(
            make_port(2, "n1", f"10.{100 + slot}.{number % 200}.0/24"), uuid=f"lan-{slot}-{number}"
        )
        port = replace(port, address=UNKNOWN[slot + 2] if number % 2 else port.address)
        port = replace(port, allowed=(Allow("any"),) if number % 3 else None)
        network = make_network(
            port, name=f"lan-{slot}-{number}", block="0.0.0.0/0", bridge="br0", router_node=""
        )
        self.set(100 + slot, network)
        name = self.insist(self.plane.create_tap, port)
        with Path("/dev/net/tun").open("r+b", buffering=0) as held:
            fcntl.ioctl(held, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))
            self.insist(self.plane.adopt_tap, network, port)
            self.set(100 + slot, replace(network, ports=(replace(port, limits=Limits(packets_in=9)),)))
        self.insist(self.plane.remove_tap, port)
        self.set(100 + slot, None)

    def cycle(self, slot: int, number: int) -> None:
        if number % 4 == 0:
            self.lan(slot, number)
        block = f"10.{100 + slot}.{number % 200}.0/24"
        port, far = make_port(2, "n1", block), make_port(3, "n2", block)
        network = make_network(
            port, far, name=f"{slot}-{number}", block=block, vni=1 + slot * 1000 + number % 1000
        )
        if number % 3:  # with IPv6, translated or routed
            six = IPv6Network(f"{'fd42' if number % 2 else '2001'}:db8:{slot}:{number % 200}::/64")
            network = replace(network, netblock6=six, slaac=number % 5 == 0)
        alone = bool(network.netblock6) and number % 4 == 1
        if alone:
            port, far = (replace(p, address=UNKNOWN[n]) for n, p in enumerate((port, far), 2))
            network = replace(network, ports=(port, far), netblock=UNKNOWN, gateway=UNKNOWN[1])
        self.set(slot, network)
        name = self.insist(self.plane.create_tap, port)
        with Path("/dev/net/tun").open("r+b", buffering=0) as held:
            fcntl.ioctl(held, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))
            self.insist(self.plane.adopt_tap, network, port)
            floating = replace(port, floating=None if alone else IPv4Address(f"10.9.9.{100 + slot}"))
            if number % 2:
                web = (Published("tcp", 8000 + slot, 80), Published("udp", 9000 + 8 * slot, 53, 4))
                rules = (Allow("tcp", ((80, 80), (443, 443))), Allow("icmp", (), IPv4Network("10.0.0.0/8")))
                limits = Limits(bytes_in=10**6, packets_out=1000)
                floating = replace(floating, published=web, allowed=rules, limits=limits)
            self.set(slot, replace(network, ports=(floating, far)))
            if self.random.random() < 0.2:
                for running in dnsmasq.running(names.namespace(self.installation, network.vni)):
                    os.kill(running.pid, signal.SIGKILL)
            if self.random.random() < 0.3:
                self.insist(self.plane.remove_tap, port)
                self.set(slot, replace(network, ports=(far,)))
        self.set(slot, None)
        with self.lock, self.done.open("ab") as counted:
            counted.write(b".")


def main() -> int:
    directory, installation, seed, cycles = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    agent = Agent(directory, installation, seed)
    agent.jinx()
    agent.insist(agent.apply)
    start = agent.done.stat().st_size if agent.done.exists() else 0

    def work(slot: int) -> None:
        for number in range(start + slot, cycles, AT_ONCE):
            agent.cycle(slot, number)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(AT_ONCE)))
    agent.unlucky = False
    agent.apply()
    return 0 if agent.apply() == [] else 3


if __name__ == "__main__":
    sys.exit(main())
