"""Machines and guests for tests: namespaces of this process's own threads, on a switch of their own.

A `Space` is a thread that stands in a network and a mount namespace of its own, with its own /run: whatever is called
in it, and every process that it starts, is on that machine. Nothing of it has a name in the machine that runs the
tests; when the thread ends, all is gone. A `Guest` has a network stack of its own behind a tap, as a guest in qemu.
"""

import ctypes
import fcntl
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Self, TypeVar

from net import ipam
from net.kernel.netns import Netns
from net.plan.model import Network, NodeNetworks, Peer, Port
from net.plane import Plane

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWNET, _FS, _PRIVATE, _REC = 0x20000, 0x40000000, 0x200, 1 << 18, 1 << 14
HEADER = b"\0" * 10  # virtio-net's, without offloads


def _syscall(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Space:
    """A machine of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, initializer=self._enter)
        self.tid: int = self.call(threading.get_native_id)
        self.mounts: int = self.call(lambda: Path("/proc/thread-self/ns/mnt").stat().st_ino)
        self.sh("ip link set lo up")

    def _enter(self) -> None:
        _syscall(_libc.unshare(_FS))
        _syscall(_libc.unshare(_NEWNS | _NEWNET))
        _syscall(_libc.mount(b"none", b"/", None, _PRIVATE | _REC, None))
        _syscall(_libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._executor.submit(function, *arguments).result(timeout=240)

    def sh(self, command: str, *, check: bool = True, timeout_s: float = 60) -> str:
        """Runs a shell command here and returns what it prints."""

        def run() -> str:
            done = subprocess.run(
                command, shell=True, capture_output=True, text=True, timeout=timeout_s, cwd="/"
            )
            if check and done.returncode != 0:
                raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
            return done.stdout + done.stderr

        return self.call(run)

    def works(self, command: str) -> bool:
        def run() -> bool:
            return (
                subprocess.run(command, shell=True, capture_output=True, timeout=60, cwd="/").returncode == 0
            )

        return self.call(run)

    def popen_quietly(self, command: str) -> subprocess.Popen[str]:
        """A process that goes on beside the test; `communicate` gives what it printed."""
        start = lambda: subprocess.Popen(command.split(), stdout=-1, stderr=-2, text=True, cwd="/")  # noqa: E731
        return self.call(start)

    @contextmanager
    def sniffing(self, pattern: str, dev: str = "switch") -> Iterator[set[str]]:
        """Afterwards: the source addresses of packets that came by."""
        command = ["timeout", "60", "tcpdump", "--immediate-mode", "-lni", dev, pattern]
        start = lambda: subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd="/")  # noqa: E731
        sources: set[str] = set()
        with self.call(start) as process:
            assert process.stderr and process.stdout
            while "listening" not in process.stderr.readline():
                assert process.poll() is None
            yield sources
            time.sleep(0.2)
            process.terminate()
            sources |= {line.split()[2] for line in process.stdout.read().splitlines() if " IP" in line}

    @contextmanager
    def sniffing_inside(self, namespace: str, dev: str) -> Iterator[bytearray]:
        """Afterwards: every byte that a device of a namespace on this machine saw."""
        seen = bytearray()
        with self.call(Netns, namespace) as space:

            def opened() -> socket.socket:
                with space.entered():
                    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
                    raw.bind((dev, 0))
                    return raw

            with self.call(opened) as raw:
                raw.setblocking(False)
                yield seen
                with suppress(BlockingIOError):
                    while True:
                        seen += raw.recv(65536)

    def processes(self) -> list[int]:
        """Of this machine, this process excepted."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int(path.name) != os.getpid() and (path / "ns/mnt").stat().st_ino == self.mounts:
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def power_off(self) -> None:
        """Every process dies at once, and the namespaces with them."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._executor.shutdown()


@dataclass
class Node:
    """A machine with a Plane."""

    name: str
    address: IPv4Address
    space: Space
    plane: Plane

    def apply(self, desired: NodeNetworks) -> Any:
        return self.space.call(self.plane.apply, replace(desired, node=self.name, underlay=self.address))

    def remove_all(self) -> None:
        """Everything of its installation goes, guests' taps too."""
        self.space.call(self.plane.remove_all)

    def counters(self, network: Network) -> dict[str, dict[str, int]]:
        """Dropped frames by tap and reason."""
        listed = self.inside(network, f"nft -j list counters table bridge sf-{self.plane.installation}")
        found: dict[str, dict[str, int]] = {}
        for counter in (e["counter"] for e in json.loads(listed)["nftables"] if "counter" in e):
            tap, _, reason = counter["name"].rpartition("-")
            found.setdefault(tap, {})[reason] = counter["packets"]
        return found

    def inside(self, network: Network, command: str, *, check: bool = True) -> str:
        return self.space.sh(f"ip netns exec {self.plane.namespace(network)} {command}", check=check)


UNDERLAY = IPv4Network("10.9.9.0/24")
OUTSIDE = IPv4Address("198.51.100.1")


class Cluster:
    """Nodes n1, n2, … on one switch (10.9.9.0/24), whose gateway .254 is the world (198.51.100.1)."""

    def __init__(self, state: Path, nodes: int = 1, *, mtu: int = 1500) -> None:
        self.installation = secrets.token_hex(4)
        self._stack = ExitStack()
        self._state = state
        self.mtu = mtu
        try:
            self.world = self._stack.enter_context(Space())
            self.world.sh("ip link add switch address 02:aa:00:00:00:fe type bridge && ip link set switch up")
            self.world.sh(f"ip addr add 10.9.9.254/24 dev switch; ip addr add {OUTSIDE}/32 dev lo")
            self.world.sh(f"ip link set switch mtu {mtu}")
            self.nodes = [self.add_node(f"n{i + 1}") for i in range(nodes)]
        except BaseException:
            self._stack.close()
            raise

    def add_node(self, name: str) -> Node:
        address = UNDERLAY[int(name[1:])]
        space, mac = self._stack.enter_context(Space()), f"02:aa:00:00:00:{int(name[1:]):02x}"
        space.sh(
            f"ip link add eth0 address {mac} mtu {self.mtu} type veth peer name {name} netns {self.world.tid}"
            f" && ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        )
        self.world.sh(f"ip link set {name} mtu {self.mtu} master switch up")
        space.sh(f"ip route add default via {UNDERLAY[254]}")
        return Node(name, address, space, Plane(self.installation, self._state / name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def desired(self, *networks: Network, **more: Any) -> NodeNetworks:
        peers = tuple(Peer(node.name, node.address) for node in self.nodes)
        return NodeNetworks(self.installation, "", networks, peers, **more)

    def apply(self, *networks: Network, **more: Any) -> NodeNetworks:
        """On every node, the networks that concern it."""
        desired = self.desired(*networks, **more)
        for node in self.nodes:
            node.apply(replace(desired, networks=tuple(n for n in networks if concerns(n, node.name))))
        return desired

    @contextmanager
    def guest(self, network: Network, port: Port) -> Iterator["Guest"]:
        node = next(node for node in self.nodes if node.name == port.node)
        with Guest(node, network, port) as guest:
            yield guest

    @contextmanager
    def guests(self, network: Network, *ports: Port) -> Iterator[tuple["Guest", ...]]:
        """One at each of these ports of a network that is applied now."""
        self.apply(network)
        with ExitStack() as stack:
            yield tuple(stack.enter_context(self.guest(network, port)) for port in ports)


def concerns(network: Network, node: str) -> bool:
    return network.router_node == node or any(port.node == node for port in network.ports)


def make_port(host: int, node: str, block: str = "10.42.0.0/24", **more: Any) -> Port:
    name = f"{block}-{host}-{node}"
    mac = f"02:00:00:{IPv4Network(block).network_address.packed[2]:02x}:{host >> 8:02x}:{host & 255:02x}"
    return Port(name, mac, IPv4Network(block)[host], f"guest{host}", node, **more)


def make_network(*ports: Port, name: str = "lan", block: str = "10.42.0.0/24", **more: Any) -> Network:
    netblock = IPv4Network(block)
    more = {"vni": ipam.random_vni([]), "router_node": "n1", "ports": ports, **more}
    return Network(uuid=name, name=name, netblock=netblock, gateway=netblock[1], **more)


class Guest:
    """A guest's network stack behind its tap, as qemu would hold it: frames are pumped between the two."""

    def __init__(self, node: Node, network: Network, port: Port) -> None:
        self.node, self.network, self.port = node, network, port
        self.received: list[bytes] = []
        self.name = node.space.call(node.plane.create_tap, port)
        self._tap = node.space.call(_open_tap, self.name)
        self.space = Space()
        self._nic = self.space.call(_open_tap, "eth0")
        self.space.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
        self.space.sh(f"ip link set eth0 address {port.mac} mtu {network.mtu_bytes} up")
        self._stop, self._stopped = os.pipe()
        self._pump = threading.Thread(target=self._run, daemon=True)
        self._pump.start()
        node.space.call(node.plane.adopt_tap, network, port)

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._tap, self._nic, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop:
                    return
                try:
                    frame = os.read(fd, 70_000)
                    if fd == self._tap:
                        self.received.append(frame[10:])
                    os.write(self._nic if fd == self._tap else self._tap, frame)
                except OSError:  # one of the two is down or gone, as a cable that is pulled
                    time.sleep(0.002)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stopped, b"x")
        self._pump.join()
        for fd in (self._tap, self._nic, self._stop, self._stopped):
            os.close(fd)
        self.space.power_off()

    def send(self, frame: bytes) -> None:
        """A frame past the guest's own stack."""
        os.write(self._tap, HEADER + frame)

    def static(self) -> None:
        """Addresses without DHCP."""
        self.space.sh(f"ip addr add {self.port.address}/{self.network.netblock.prefixlen} dev eth0")
        self.space.sh(f"ip route add default via {self.network.gateway}")

    def dhcp(self, timeout_s: float = 20) -> dict[int, bytes]:
        """Asks for a lease (RFC 2131), configures the interface, returns the options of the answer."""
        options = self.space.call(_lease, self.port.mac, timeout_s)
        length = int(IPv4Address(options[1])).bit_count()
        self.space.sh(f"ip addr add {IPv4Address(options[0])}/{length} dev eth0")
        if 3 in options:
            self.space.sh(f"ip route add default via {IPv4Address(options[3])}")
        return options

    def pings(self, address: object, *, size: int = 56, tries: int = 5) -> bool:
        """Whether one of some pings is answered; never fragmented."""
        return any(self.space.works(f"ping -n -c 1 -W 1 -M do -s {size} {address}") for _ in range(tries))

    def reaches_not(self, address: object) -> bool:
        return not self.space.works(f"ping -n -c 2 -i 0.2 -W 1 {address}")


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    return fd


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, target: str, kind: int, payload: bytes) -> bytes:
    return packed(target) + packed(source) + struct.pack("!H", kind) + payload


def ipv4(source: object, target: object, protocol: int, payload: bytes) -> bytes:
    addresses = IPv4Address(str(source)).packed + IPv4Address(str(target)).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + addresses
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def arp(operation: int, mac: str, address: object, target: object) -> bytes:
    sender, wanted = IPv4Address(str(address)).packed, IPv4Address(str(target)).packed
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + packed(mac) + sender + b"\0" * 6 + wanted


def dhcp_frame(mac: str, transaction: bytes, options: bytes) -> bytes:
    body = b"\1\1\6\0" + transaction + b"\0" * 20 + packed(mac) + b"\0" * 10 + b"\0" * 192
    body += b"\x63\x82\x53\x63" + options + b"\xff"
    return ethernet(
        mac, "ff:ff:ff:ff:ff:ff", 0x0800, ipv4("0.0.0.0", "255.255.255.255", 17, udp(68, 67, body))
    )


def _lease(mac: str, timeout_s: float) -> dict[int, bytes]:
    transaction, deadline = os.urandom(4), time.monotonic() + timeout_s
    wanted = b"\x37\x08\x01\x03\x06\x0c\x0f\x1a\x77\x79"
    ask = b"\x35\x01\x01" + wanted
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as raw:
        raw.bind(("eth0", 0))
        raw.settimeout(0.5)
        while time.monotonic() < deadline:
            raw.send(dhcp_frame(mac, transaction, ask))
            again = time.monotonic() + 1
            while time.monotonic() < again:
                try:
                    frame = raw.recv(2048)
                except TimeoutError:
                    continue
                if frame[23] != 17 or frame[34:38] != b"\0\x43\0\x44" or frame[46:50] != transaction:
                    continue
                options = {0: frame[58:62], **_options(frame[282:])}
                if options[53] == b"\x05":
                    return options
                if options[53] == b"\x02":
                    request = b"\x35\x01\x03\x32\x04" + options[0] + b"\x36\x04" + options[54] + wanted
                    if ask != request:
                        ask = request
                        break
    raise AssertionError("no lease by DHCP")


def _options(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        found[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return found
