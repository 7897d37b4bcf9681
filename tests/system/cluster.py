"""Several machines on one: joined with the real commands, with real libvirtd, dnsmasq, nftables, and guests in qemu.

All of them have a firewall that forwards nothing, and bridge-nf-call-iptables on. The first is the server; the world is
a further machine, which is also the switch between them.
"""

import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from scripts.private_libvirtd import PrivateHost
from tests.system.machine import Machine, within

WORLD = "10.77.0.254"


class Cluster:
    """n1 (server), n2, … on one switch. `settings` are every machine's; `image` is pushed as tiny:1.

    prepare: is handed each machine before anything of sf runs on it.
    """

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        image: Path,
        names: Sequence[str] = ("n1", "n2", "n3"),
        prepare: Callable[["Cluster", Machine], object] = lambda cluster, machine: None,
        **settings: str,
    ) -> None:
        self.world = stack.enter_context(PrivateHost(libvirtd=False))
        self.net(self.world, "ip link add br0 type bridge; ip link set br0 up")
        self.net(self.world, f"ip address add {WORLD}/24 dev br0")
        self.key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        self.nodes: dict[str, Machine] = {}
        for name in names:
            home = directory / name
            home.mkdir()
            own = {
                "SF_ACCEL": "tcg",
                "SF_NODE_NAME": name,
                "SF_MESH_ADDRESS": f"10.77.0.{name[1]}",
                "SF_UPLINK": "eth0",
                "SF_FLOATING_POOL": "10.77.0.192/28",
                "SF_AGENT_LISTEN": "10.77.0.1:13001",
                **settings,
            }
            self.nodes[name] = Machine(stack.enter_context(PrivateHost()), home, **own)
            self.plug(name)
            prepare(self, self.nodes[name])
            stack.callback(self._stop, name)
        self.server = self.nodes["n1"]
        self.server.sf("image", "push", str(image), "tiny:1")
        self.server.start()
        for name in names[1:]:
            (token,) = [self.server.listed("node", "token")]
            self.nodes[name].start("agent", "--join", token["url"], "--token", token["token"])
        within(60, lambda: len(self.alive()) == len(names), "all nodes are there")

    def _stop(self, name: str) -> None:
        if self.nodes[name].server is not None and (self.nodes[name].host.directory / "pid").exists():
            self.nodes[name].signal()

    @staticmethod
    def net(host: PrivateHost, script: str) -> None:
        """A shell script in a machine's network namespace, with this machine's processes in sight."""
        command = ["nsenter", "-t", str(host.pid), "-n", "sh", "-ec", script]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def plug(self, name: str) -> None:
        """Give a machine that was just switched on its cable and its firewall."""
        node = self.nodes[name].host
        self.net(
            self.world,
            f"ip link del {name} 2>/dev/null || true\n"
            f"ip link add {name} type veth peer name eth0 netns /proc/{node.pid}/ns/net\n"
            f"ip link set {name} master br0 up",
        )
        self.net(
            node,
            f"ip address add 10.77.0.{name[1]}/24 dev eth0; ip link set eth0 up\n"
            f"ip route add default via {WORLD}\n"
            "sysctl -qw net.bridge.bridge-nf-call-iptables=1 || true\n"
            "iptables -P FORWARD DROP",
        )

    def alive(self) -> list[str]:
        return [node["name"] for node in self.server.listed("node", "ls") if node["state"] == "created"]

    def create(self, name: str, node: str, network: str) -> None:
        words = ["--image", "tiny:1", "--network", network, "--memory", "128", "--on", node]
        self.server.sf("instance", "create", name, *words, "--ssh-key", f"{self.key}.pub")

    def ready(self, *names: str) -> None:
        for name in names:
            address = self.server.instance(name)["interfaces"][0]["ipv4"]
            within(150, lambda n=name: self.server.ready_line(n), f"{name} is ready")  # type: ignore[misc]
            assert self.server.ready_line(name).split()[2:] == [name, address]

    def router(self, network: str = "lan") -> str:
        """The node that the server lets route."""
        return str(self.server.listed("network", "show", network)["router_node"])

    def gateways(self, network: str = "lan") -> list[str]:
        """The nodes whose namespace of the network really has the gateway's address."""
        vni = self.server.listed("network", "show", network)["vxlan_id"]
        found = []
        for name, node in self.nodes.items():
            if not (node.host.directory / "pid").exists():
                continue
            listed = node.host.run(["ip", "netns", "list"]).stdout.split()
            (space,) = [space for space in listed if space.endswith(f"-{vni:06x}")] or [""]
            if space:
                shown = node.host.run(["ip", "-n", space, "-4", "-o", "address"]).stdout
                found += [name] if " 10.42.0.1/" in shown else []
        return found

    def inside(self, name: str, command: str, network: str = "lan") -> subprocess.CompletedProcess[str]:
        """Run a command in a guest, by ssh from its network's router."""
        vni = self.server.listed("network", "show", network)["vxlan_id"]
        node = self.nodes[self.router(network)].host
        (space,) = [s for s in node.run(["ip", "netns", "list"]).stdout.split() if s.endswith(f"-{vni:06x}")]
        address = self.server.instance(name)["interfaces"][0]["ipv4"]
        options = [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "ConnectTimeout=20",
            "LogLevel=ERROR",
        ]
        ssh = ["ssh", "-i", str(self.key), *(word for o in options for word in ("-o", o)), f"root@{address}"]
        return node.run(["ip", "netns", "exec", space, *ssh, command], check=False)

    def from_world(self, address: str) -> bool:
        return self.world.run(["ping", "-c", "1", "-W", "1", address], check=False).returncode == 0

    def floating(self, name: str) -> str:
        return str(self.server.instance(name)["interfaces"][0]["floating"])
