"""What stands in one network namespace, as plain values: the form in which desired and observed are compared."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final, NamedTuple

HOST = ""  # the key of the host's own namespace, of which we look at what is ours only


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. Where a desired link has no MAC, any will do."""

    name: str
    kind: str  # bridge, vxlan, veth or tun (a tap)
    alias: str
    mtu_bytes: int
    up: bool = True
    mac: str = ""
    master: str = ""
    suppress: bool = False  # a bridge port that gets no ARP request which the bridge can answer itself
    learning: bool = False  # of a bridge port; never wanted: the FDB comes from desired state
    vni: int = 0
    local: str = ""  # a VXLAN device's own endpoint
    peer: str = ""
    """The host's end of a veth pair. Not observed."""
    carrier: bool = True
    """Of a tap: whether a process holds it open. Observed only."""


class Kind:
    """What an entry is; in brackets its key and value. Plain strings: an enum's hash is computed in Python."""

    SYSCTL: Final = "sysctl"  # (path under /proc/sys, text), of a device where the path is
    ADDRESS: Final = "address"  # (address with prefix length, "")
    ROUTE: Final = "route"  # (destination with prefix length, gateway)
    FDB: Final = "forwarding entry"
    """(MAC, where the VXLAN device sends it; "": behind which bridge port it is)"""
    NEIGHBOUR: Final = "neighbour"  # (address, MAC)
    PROXY: Final = "ARP proxy"  # (address for which the host answers on its uplink, "")


class Entry(NamedTuple):
    """One line of one of the kernel's tables. A tuple, because a plan hashes ten thousands of them."""

    kind: str
    dev: str
    key: str
    value: str = ""


def sysctl(key: str, value: str) -> Entry:
    """A setting of IPv6 for one device comes after it; all others before any."""
    dev = key.split("/")[3] if key.startswith("net/ipv6/conf/") else ""
    return Entry(Kind.SYSCTL, "" if dev in ("all", "default") else dev, key, value)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule is known again by the hash of its text, which it carries as its comment: nft prints rules in
    other words than they were written in, and differently from version to version."""

    mark: str
    text: str = field(default="", compare=False)
    handle: int = field(default=0, compare=False)

    @classmethod
    @functools.lru_cache(maxsize=1 << 16)
    def of(cls, text: str) -> "Rule":
        return cls(hashlib.blake2b(text.encode(), digest_size=6).hexdigest(), text)


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain hangs."""

    type: str
    hook: str
    priority: int
    policy: str = "accept"


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    hook: Hook | None
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Elements:
    """A named set (its values are empty) or map. Of one that is there, the declaration is the word for its kind."""

    declaration: str = field(compare=False)
    items: frozenset[tuple[str, str]] = frozenset()
    moving: bool = field(default=False, compare=False)
    """The kernel adds and forgets by itself: what is in it is nobody's wish, and may be much."""


@dataclass(frozen=True, slots=True)
class Table:
    family: str
    name: str
    chains: Mapping[str, Chain]
    elements: Mapping[str, Elements] = field(default_factory=dict)
    counters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Admission:
    """A rule of ours at the end of another's base chain whose policy is to drop."""

    family: str
    table: str
    chain: str
    rule: Rule


@dataclass(frozen=True, slots=True)
class Dnsmasq:
    """What a network's DHCP and DNS server reads."""

    config: str
    hosts: str  # dhcp-hostsfile: MAC to address
    names: str  # addn-hosts: address to names


@dataclass(frozen=True, slots=True)
class Facts:
    """One namespace."""

    links: Mapping[str, Link] = field(default_factory=dict)
    entries: frozenset[Entry] = frozenset()
    tables: Mapping[str, Table] = field(default_factory=dict)  # by family; only the table with our name
    admissions: frozenset[Admission] = frozenset()
    dnsmasq: Dnsmasq | None = None
    broken: bool = False
    """A name under /run/netns that leads to no namespace: its maker was killed between two steps."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The kernel of one node as far as it concerns an installation."""

    namespaces: Mapping[str, Facts]  # by namespace name; HOST is always there
    host_addresses: frozenset[IPv4Address] = frozenset()  # every address of the host, whoever set it
    uplink: str = ""  # the device of the host's default route
    uplink6: bool = False
    """Whether it has an IPv6 default route, and its administrator lets it forward (`FORWARD6`): we never do."""
    idle6: bool = False  # whether it has the route, but does not forward
    mtu_bytes: int = 0  # of the device that carries the underlay address; 0 where there is none
    resolvers: tuple[IPv4Address, ...] = ()  # the host's upstream DNS servers without loopback
    foreign: Mapping[tuple[str, str, str], Hook] = field(default_factory=dict)
    """Others' base chains in the host's namespace that packets of ours pass, by family, table and name."""
    listening: frozenset[tuple[str, int]] = frozenset()  # (protocol, port) of the host's own servers
    bridges: Mapping[str, int] = field(default_factory=dict)  # the host's own, with their MTU
    bridged_meets_firewall: bool = False
    """Whether packets between ports of a bridge go by the host's IP firewall, too (br_netfilter)."""
