"""The kernel's side of the data plane: namespaces, and changes of links, addresses, routes, FDB, neighbours.

The one module with pyroute2.

A netlink socket belongs to the namespace in which it was made, whichever thread uses it later. So a thread steps into
a namespace (setns(2) concerns the calling thread alone), makes the socket and steps out again: no process is spawned.
"""

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError as NetlinkError

from net.errors import Failed
from net.kernel import libnft, rtnetlink
from net.plan import names, ruleset
from net.plan.facts import Entry, Kind, Link, Table, sysctl
from net.plan.names import VXLAN_PORT

DIRECTORY = Path("/run/netns")  # where ip-netns(8) looks for them
_CLONE_NEWNET = 0x40000000
_MS_BIND, _MNT_DETACH = 0x1000, 2
_NOARP, _PERMANENT, _NODAD = 0x40, 0x80, 2
_SELF, _MASTER, _PROXY = 2, 4, 8
_PROTO_KERNEL, _PROTO_STATIC, _SCOPE_LINK = 2, 4, 253

_HERE = b"/proc/thread-self/ns/net"
_GETGEN, _GEN_ID = struct.pack("=LHHLLL", 20, 10 << 8 | 16, 1, 1, 0, 0), struct.pack("=HH", 8, 1)
_libc = ctypes.CDLL(None, use_errno=True)
_listed: dict[str, dict[str, tuple[bytes, dict[tuple[str, str], Table]]]] = {}
"""Namespace → listing → of which generation, and what it said: listing and parsing are most of a look's work."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise Failed(f"{what}: {os.strerror(number)}")


@contextmanager
def _coming_home() -> Iterator[None]:
    """The calling thread stands in this namespace again afterwards, wherever it went."""
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        back = _libc.setns(home, _CLONE_NEWNET)
        os.close(home)
        _check(back, "the way home from a namespace is shut")


def list_namespaces(prefix: str) -> list[str]:
    """Those that are a prefix and a VNI in hex."""
    pattern = prefix + "[0-9a-f]" * 6
    return sorted(path.name for path in DIRECTORY.glob(pattern)) if DIRECTORY.is_dir() else []


def is_namespace(name: str) -> bool:
    """False for a plain file under that name: its maker was killed before it was mounted, or by a reboot."""
    return (DIRECTORY / name).stat().st_dev != DIRECTORY.stat().st_dev


def create_namespace(name: str) -> None:
    """Makes a network namespace and gives it its name under /run/netns, as `ip netns add` does."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = DIRECTORY / name
    path.touch(mode=0o444)
    with _coming_home():
        _check(_libc.unshare(_CLONE_NEWNET), "a network namespace cannot be made")
        _check(_libc.mount(_HERE, bytes(path), b"none", _MS_BIND, None), f"{path} cannot be mounted")


def remove_namespace(name: str) -> None:
    """Takes the name away; the namespace goes with its last process. Twice is once."""
    path = DIRECTORY / name
    while _libc.umount2(bytes(path), _MNT_DETACH) == 0:
        pass
    path.unlink(missing_ok=True)
    _listed.pop(name, None)


def announce(dev: str, address: str) -> None:
    """A gratuitous ARP request (RFC 5227, section 3): who cached another MAC for the address learns ours."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((dev, 0))
        mac, ip = raw.getsockname()[4], IPv4Address(address).packed
        arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, ip, b"\0" * 6, ip)
        raw.send(b"\xff" * 6 + mac + b"\x08\x06" + arp)


def listening() -> frozenset[tuple[str, int]]:
    """(protocol, port) on which something of the calling thread's namespace listens (proc(5), /proc/net/tcp)."""
    found = set()
    for name, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        with suppress(FileNotFoundError):
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
            words = (line.split() for line in lines)
            found |= {(name[:3], int(word[1].rpartition(":")[2], 16)) for word in words if word[3] == state}
    return frozenset(found)


def traffic(namespace: str) -> dict[str, tuple[int, int]]:
    """Bytes that came by and left by each device of a namespace (proc(5), /proc/net/dev). Raises NetError."""
    with Netns(namespace) as inside, inside.entered():
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    words = (line.replace(":", " ").split() for line in lines)
    return {word[0]: (int(word[1]), int(word[9])) for word in words}


class Netns:
    """An open network namespace: HOST is the one in which the calling thread stands. Use it with `with`."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.fd = os.open(DIRECTORY / name if name else _HERE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Failed(f"namespace {name} cannot be opened: {error.strerror}") from error
        try:
            with self.entered():
                self._reading = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        except BaseException:
            os.close(self.fd)
            raise
        self._changing: IPRoute | None = None  # made when first needed: most namespaces are only read
        self._names: dict[int, str] = {}
        self._indices: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._changing is not None:
            self._changing.close()
        self._reading.close()
        os.close(self.fd)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and every process that it starts, stands in this namespace meanwhile."""
        with _coming_home():
            _check(_libc.setns(self.fd, _CLONE_NEWNET), f"namespace {self.name} cannot be entered")
            yield

    # What is there

    def links(self) -> dict[str, Link]:
        """Every device but loopback."""
        found = rtnetlink.links(self._reading)
        self._names = {index: link.name for index, link in found.items()}
        return {link.name: link for link in found.values() if link.name != "lo"}

    def link(self, name: str) -> Link | None:
        """One device, without its master."""
        found = rtnetlink.find(self._reading, name)
        return found[1] if found else None

    def entries(self, sysctls: Iterable[str]) -> Iterator[Entry]:
        """What `rtnetlink.entries` says of `links`, and those sysctls (one that this kernel lacks reads "0")."""
        yield from rtnetlink.entries(self._reading, self._names, host=not self.name)
        texts = dict.fromkeys(sysctls, "0")
        with self.entered():
            for key in sysctls:
                with suppress(FileNotFoundError):
                    texts[key] = Path(f"/proc/sys/{key}").read_text().strip()
        for key, text in texts.items():
            yield sysctl(key, text)

    def nft(self, commands: str, *, json: bool = False) -> str:
        with self.entered():
            return libnft.run(commands, json=json)

    def _generation(self) -> bytes:
        """Another one after each nft transaction, and in each namespace; b"" before Linux 5.14 (SO_NETNS_COOKIE)."""
        with suppress(OSError), self.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as nft:
            nft.send(_GETGEN)  # NFT_MSG_GETGEN of linux/netfilter/nf_tables.h
            if (said := nft.recv(1 << 12))[20:24] == _GEN_ID:
                return nft.getsockopt(socket.SOL_SOCKET, 71, 8) + said[24:28]
        return b""

    def tables(self, listing: str) -> dict[tuple[str, str], Table]:
        """What nft lists, by family and name: anew only if a transaction came since."""
        now, known = self._generation(), _listed.setdefault(self.name, {})
        if now and known.get(listing, (b"", {}))[0] == now:
            return known[listing][1]
        found = {}
        for (family, name), table in ruleset.parse(self.nft(listing, json=True)).items():
            elements = dict(table.elements)
            for n, held in table.elements.items():
                if not held.moving:
                    said = self.nft(f"list {held.declaration} {family} {name} {n}", json=True)
                    elements[n] = replace(held, items=ruleset.items(said))
            found[family, name] = replace(table, elements=elements)
        known[listing] = now, found
        return found

    # What is changed

    def create(self, link: Link, host: "Netns") -> None:
        """The device itself; `change_link` does the rest."""
        device: dict[str, Any] = {"ifname": link.name, "kind": link.kind}
        if link.kind == "bridge":
            how = {"mtu": link.mtu_bytes, "address": link.mac, "br_forward_delay": 0, "br_mcast_snooping": 0}
            self._ip.link("add", **device, **how)
        elif link.kind == "vxlan":  # made from the host, put in here: its UDP socket stays there
            device |= {"mtu": link.mtu_bytes, "net_ns_fd": self.fd, "vxlan_learning": False}
            device |= {"vxlan_id": link.vni, "vxlan_local": link.local, "vxlan_port": VXLAN_PORT}
            for tries_left in range(10, -1, -1):
                try:
                    host._ip.link("add", **device)
                    return
                except NetlinkError as error:
                    if error.code != errno.EEXIST:
                        raise
                    if not tries_left:
                        hint = f"another device on this host uses VNI {link.vni}"
                        raise Failed(f"{link.name} cannot be made: {error}", hint=hint) from error
                    # A namespace that lost its name frees its devices some time after its last process.
                    time.sleep(0.1)
        elif self.name:  # the host's end of a veth pair comes with the other
            host.delete_link(link.peer)
            self._ip.link("add", peer={"ifname": link.peer, "net_ns_fd": host.fd}, **device)

    def move_link(self, name: str, target: "Netns") -> None:
        self._ip.link("set", index=self.index(name), net_ns_fd=target.fd)
        self._indices.pop(name, None)

    def change_link(self, link: Link, had: Link | None = None) -> None:
        """Its attributes as they must be; of an observed one, the MAC only where it differs: setting even the same
        one flushes the neighbours."""
        index = self.index(link.name)
        if not self.name and had is None:  # the host itself speaks no IPv6 on a device of ours
            quiet = f"net/ipv6/conf/{link.name}/disable_ipv6"
            self.entry(Entry(Kind.SYSCTL, "", quiet, "1"), add=True)
        changes: dict[str, Any] = {"ifalias": link.alias, "mtu": link.mtu_bytes}
        if link.mac and (had is None or had.mac != link.mac):
            changes["address"] = link.mac
        if self.name or link.master:
            changes["master"] = self.index(link.master) if link.master else 0
        if link.master:
            # A port's flags hang on its bridge, and must be there before it is up.
            self._ip.link("set", index=index, **changes)
            flags = {"neigh_suppress": int(link.suppress), "learning": int(link.learning)}
            self._ip.brport("set", index=index, **flags)
            changes = {}
        self._ip.link("set", index=index, state="up" if link.up else "down", **changes)

    def mark(self, name: str, alias: str) -> None:
        """Sets an alias and nothing else."""
        self._ip.link("set", index=self.index(name), ifalias=alias)

    def raise_loopback(self) -> None:
        self._ip.link("set", index=self.index("lo"), state="up")

    def delete_link(self, name: str) -> None:
        """Twice is once."""
        try:
            self._ip.link("del", index=self.index(name))
        except (NetlinkError, Failed) as error:
            if isinstance(error, NetlinkError) and error.code != errno.ENODEV:
                raise
        self._indices.pop(name, None)

    def entry(self, item: Entry, *, add: bool) -> None:
        if item.kind is Kind.SYSCTL:
            with self.entered():
                if (path := Path("/proc/sys") / item.key).exists():
                    path.write_text(item.value)
            return
        index = self.index(item.dev)
        family = socket.AF_INET6 if ":" in item.key else socket.AF_INET
        if item.kind is Kind.ADDRESS:
            address, length = item.key.split("/")
            what = {"index": index, "address": address, "prefixlen": int(length), "family": family}
            if family == socket.AF_INET6 and add:  # nobody else can have it, and it is of use at once
                what["flags"] = _NODAD
            try:
                self._ip.addr("add" if add else "del", **what)
            except NetlinkError as error:
                if error.code != errno.EEXIST or family == socket.AF_INET6:
                    raise
                # It is there, but the route of its subnet is not.
                subnet = str(IPv4Interface(item.key).network)
                kept = {"proto": _PROTO_KERNEL, "scope": _SCOPE_LINK, "prefsrc": address}
                self._ip.route("replace", dst=subnet, oif=index, **kept)
        elif item.kind is Kind.ROUTE:
            way = {"dst": item.key, "gateway": item.value, "oif": index, "proto": _PROTO_STATIC}
            self._ip.route("replace" if add else "del", family=family, **way)
        elif item.kind is Kind.FDB and item.value:
            state = _NOARP | _PERMANENT
            verb = "append" if add else "del"
            self._ip.fdb(verb, ifindex=index, lladdr=item.key, dst=item.value, flags=_SELF, state=state)
        elif item.kind is Kind.FDB:
            own = item.dev.startswith(names.BRIDGE_PREFIX)
            how = {"flags": _SELF, "state": _PERMANENT} if own else {"flags": _MASTER, "state": _NOARP}
            self._ip.fdb("replace" if add else "del", ifindex=index, lladdr=item.key, **how)
        elif item.kind is Kind.NEIGHBOUR:
            what = {"ifindex": index, "dst": item.key, "lladdr": item.value, "state": _PERMANENT}
            self._ip.neigh("replace" if add else "del", family=family, **what)
        else:
            self._ip.neigh("replace" if add else "del", ifindex=index, dst=item.key, flags=_PROXY)

    def index(self, name: str) -> int:
        if name not in self._indices:
            found = rtnetlink.find(self._reading, name)
            if not found:
                raise Failed(f"there is no device {name} in {self.name or 'the host'}")
            self._indices[name] = found[0]
        return self._indices[name]

    @property
    def _ip(self) -> IPRoute:
        if self._changing is None:
            with self.entered():
                self._changing = IPRoute()
        return self._changing


def tcp_socket(namespace: str, *, six: bool = False) -> socket.socket:
    """A socket that connects from inside a namespace, whoever uses it, by IPv6 or IPv4. Raises NetError."""
    with Netns(namespace) as inside, inside.entered():
        # Named for asyncio, which sets TCP_NODELAY where it sees the protocol.
        family = socket.AF_INET6 if six else socket.AF_INET
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
