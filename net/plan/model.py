"""Desired state of one node's networks, as plain values. Nothing here knows an instance or a database."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from net import ipam


@dataclass(frozen=True, slots=True)
class Published:
    """`count` ports of the router node's own addresses, from `port` on, that lead to a guest's from `to_port` on."""

    protocol: str  # tcp or udp
    port: int
    to_port: int
    count: int = 1

    def __str__(self) -> str:
        more = "-{}" if self.count > 1 else ""
        outer, inner = (f"{at}{more.format(at + self.count - 1)}" for at in (self.port, self.to_port))
        return f"{outer}:{inner}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Allow:
    """What may begin to speak to a guest."""

    protocol: str  # tcp, udp, icmp (echo) or any
    ports: tuple[tuple[int, int], ...] = ()  # ranges, sorted and apart; () is every port
    source: IPv4Network | IPv6Network = ipam.ANY  # ANY is everybody, by IPv6 as well

    def __str__(self) -> str:
        ports = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in self.ports)
        source = f"@{self.source}" if self.source != ipam.ANY else ""
        return f"{self.protocol}{':' if ports else ''}{ports}{source}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much passes a port in a second, to its guest (in) and from it (out); 0 is without limit."""

    bytes_in: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    packets_out: int = 0


@dataclass(frozen=True, slots=True)
class Port:
    """One NIC of one guest on a network, wherever in the cluster it is."""

    uuid: str
    mac: str  # lower case, colons
    address: IPv4Address  # one of ipam.UNKNOWN until the LAN's DHCP server has given another
    hostname: str  # checked by the caller to be a DNS label; the name under which DNS answers
    node: str = ""  # name of the node that hosts the guest; "" while it is nowhere
    tap: str = ""  # name of the tap device (at most 15 characters) when the port is on this node, else ""
    floating: IPv4Address | None = None
    """The 1:1 address from the floating pool, applied on the network's router."""
    published: tuple[Published, ...] = ()
    allowed: tuple[Allow, ...] | None = None  # who may begin to speak to it; None: everybody who reaches it
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Network:
    """A virtual network as a node must realise it."""

    uuid: str
    vni: int  # VXLAN network identifier, 1 to 2**24-1; device names are made from it
    name: str
    netblock: IPv4Network  # ipam.UNKNOWN where there is no IPv4
    gateway: IPv4Address  # the router's inside address: the first host of the netblock
    mtu_bytes: int = 1450
    provide_dhcp: bool = True
    provide_nat: bool = True
    provide_dns: bool = True
    domain: str = "sf.internal"
    """Of its names: `.internal` is reserved for this (ICANN, 2024), `.local` belongs to mDNS (RFC 6762)."""
    router_node: str = ""  # the node that routes for this network and runs its DHCP/DNS
    router_floating: IPv4Address | None = None
    """The router's own address on the uplink where a floating pool is configured."""
    ports: tuple[Port, ...] = ()
    routed: tuple[tuple[IPv4Address, IPv4Address], ...] = ()
    """Routed IPs: (address, next hop inside the network)."""
    dns_entries: tuple[tuple[str, IPv4Address | IPv6Address], ...] = ()
    """Extra names that the network's DNS answers."""

    bridge: str = ""
    """The node's own bridge that its guests are on; then there is no router of ours, no tunnel and no server."""
    netblock6: IPv6Network | None = None
    """A /64, out of which everybody has the address that goes with the IPv4 one; None without IPv6."""
    slaac: bool = False  # guests make themselves addresses out of it, too (RFC 4862)

    @property
    def four(self) -> bool:
        return self.netblock != ipam.UNKNOWN

    @property
    def routed6(self) -> bool:
        """Whether its IPv6 addresses are the world's; local ones are translated, if anything is."""
        return self.netblock6 is not None and not self.netblock6.subnet_of(ipam.LOCAL6)

    def address6(self, address: IPv4Address) -> IPv6Address | None:
        """Of a port's, or the gateway's."""
        return ipam.beside(self.netblock, self.netblock6, address)

    def led(self) -> list[tuple[Port, Published, int]]:
        """Every published port by itself: whose, which, and how far into its range."""
        return [(port, e, n) for port in self.ports for e in port.published for n in range(e.count)]

    def leads_out(self, port: Port) -> bool:
        """Whether the router takes what this port sends anywhere else."""
        routed = any(via == port.address for _, via in self.routed)
        outside = self.bridge or self.provide_nat or routed or port.floating or port.published
        return bool(outside)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's end of the mesh."""

    node: str
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class NodeNetworks:
    """All that one node's data plane must look like. `plan(desired, observed)` compares it with the kernel."""

    installation: str
    """The installation's random id (8 hex digits): in every namespace, link alias and nft table of ours."""
    node: str
    networks: tuple[Network, ...] = ()
    peers: tuple[Peer, ...] = field(default=())
    underlay: IPv4Address = IPv4Address("127.0.0.1")  # this node's own VXLAN endpoint
    uplink: str = ""
    """The host's device on which floating IPs are answered; "" means that of the default route."""
    resolvers: tuple[IPv4Address, ...] = ()  # upstream DNS servers; () means the host's own, without loopback
