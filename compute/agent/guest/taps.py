"""A guest's taps and interfaces: made before its start, plugged in and out while it runs."""

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address

from compute.agent.guest.host import Host
from compute.agent.guest.record import Part, Tap, TapsHeld
from compute.agent.hypervisor import domain
from compute.errors import NotFound
from compute.wire.spec import InstanceSpec, InterfaceSpec
from net import Network, Port

Networks = Mapping[str, Network]


class Taps:
    """Works for the guest's task. Every tap is in the record before it is in the kernel."""

    def __init__(self, host: Host, held: Part[TapsHeld]) -> None:
        self._host, self.held = host, held

    async def make(self, spec: InstanceSpec, interface: InterfaceSpec, networks: Networks) -> domain.Nic:
        """Make the tap, written down first. The network must be among the desired ones."""
        network = networks.get(interface.network_uuid)
        if network is None:
            where = f"network {interface.network_uuid} of interface {interface.uuid}"
            raise NotFound(f"{where} is not on this node")
        address = IPv4Address(interface.address)
        port = Port(interface.uuid, interface.mac, address, spec.name, self._host.node, interface.tap)
        await self.held.save(taps=(*self.held.now.taps, Tap(port, network.uuid)))
        name = await self._host.wire(self._host.plane.create_tap, port)
        return replace(interface, tap=name), network.mtu_bytes

    async def adopt(self, networks: Networks) -> None:
        """Move taps that qemu holds open into their networks."""
        for tap in self.held.now.taps:
            network = networks.get(tap.network_uuid)
            if (tap.adopted and tap.network) or network is None:
                continue
            told = next((port for port in network.ports if port.uuid == tap.port.uuid), tap.port)
            port = replace(told, floating=None, published=())  # rules and limits hold from the first frame on
            await self._host.wire(self._host.plane.adopt_tap, network, port)
            kept = replace(network, ports=(), routed=(), dns_entries=(), router_floating=None)
            done = replace(tap, port=port, adopted=True, network=kept)
            await self.held.save(taps=tuple(done if t is tap else t for t in self.held.now.taps))

    async def remove(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove the taps of all interfaces but `keep`."""
        kept = tuple(tap for tap in self.held.now.taps if tap.port.uuid in keep)
        for tap in self.held.now.taps:
            if tap not in kept:
                await self._host.wire(self._host.plane.remove_tap, tap.port)
        if kept != self.held.now.taps:
            await self.held.save(taps=kept)

    def plugged(self, spec: InstanceSpec) -> bool:
        """Whether its interfaces are those that are wanted, in their networks."""
        known, wanted = {tap.port.uuid for tap in self.held.now.taps}, {one.uuid for one in spec.interfaces}
        return known == wanted and all(tap.adopted and tap.network for tap in self.held.now.taps)

    async def plug(self, spec: InstanceSpec, networks: Networks, *, up: bool = True) -> None:
        """Bring the running guest's interfaces to what is wanted; a removal ends when the guest has let go."""
        if self.plugged(spec):
            return
        do, hypervisor = self._host.do, self._host.hypervisor
        live = domain.live_interfaces(await do(hypervisor.xml, spec.uuid))
        for extra in live - {interface.uuid for interface in spec.interfaces}:
            await do(hypervisor.detach, spec.uuid, domain.interface_alias(extra))
        await self.remove(keep=live)
        for interface in spec.interfaces:
            if interface.uuid not in live:
                nic = await self.make(spec, interface, networks)
                await do(hypervisor.attach, spec.uuid, domain.interface_xml(nic))
        if not up:
            await self.link(spec, up=False)
        await self.adopt(networks)

    async def link(self, spec: InstanceSpec, *, up: bool) -> None:
        """Give all interfaces their link, or take it: for libvirt, which is not told, it is up at any time."""
        for name in (domain.interface_alias(interface.uuid) for interface in spec.interfaces):
            await self._host.do(self._host.hypervisor.qmp, spec.uuid, "set_link", name=name, up=up)
