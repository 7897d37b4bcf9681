"""An instance's taps and interfaces: made before its start, plugged in and out while it runs."""

from dataclasses import replace
from ipaddress import IPv4Address

from compute.agent.guest.owner import Owner, Tap
from compute.agent.hypervisor import domain
from compute.errors import NotFound
from compute.wire.spec import InterfaceSpec
from net import Port


class Interfaces:
    """Works for the owner's task. Every tap is in the record before it is in the kernel."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def _port(self, interface: InterfaceSpec) -> Port:
        return Port(
            uuid=interface.uuid,
            mac=interface.mac,
            address=IPv4Address(interface.address),
            hostname=self._owner.spec.name,
            node=self._owner.host.node,
            tap=interface.tap,
        )

    async def make(self, interface: InterfaceSpec) -> domain.Nic:
        """Make the tap, written down first. The network must be among the desired ones."""
        network = self._owner.networks.get(interface.network_uuid)
        if network is None:
            raise NotFound(
                f"network {interface.network_uuid} of interface {interface.uuid} is not on this node"
            )
        port = self._port(interface)
        await self._owner.save(taps=(*self._owner.record.taps, Tap(port, network.uuid)))
        async with self._owner.host.plane_lock:
            name = await self._owner.host.do(self._owner.host.plane.create_tap, port)
        return domain.Nic(interface.uuid, interface.mac, name, network.mtu_bytes, interface.model)

    async def adopt(self) -> None:
        """Move taps that qemu holds open into their networks."""
        for tap in self._owner.record.taps:
            network = self._owner.networks.get(tap.network_uuid)
            if tap.adopted or network is None:
                continue
            async with self._owner.host.plane_lock:
                await self._owner.host.do(self._owner.host.plane.adopt_tap, network, tap.port)
            done = (
                replace(t, adopted=True) if t.port.uuid == tap.port.uuid else t
                for t in self._owner.record.taps
            )
            await self._owner.save(taps=tuple(done))

    async def remove(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove the taps of all interfaces but `keep`."""
        for tap in self._owner.record.taps:
            if tap.port.uuid not in keep:
                async with self._owner.host.plane_lock:
                    await self._owner.host.do(self._owner.host.plane.remove_tap, tap.port)
        if any(tap.port.uuid not in keep for tap in self._owner.record.taps):
            await self._owner.save(
                taps=tuple(tap for tap in self._owner.record.taps if tap.port.uuid in keep)
            )

    async def plug(self) -> None:
        """Bring the running guest's interfaces to what is wanted; a removal ends when the guest has let go."""
        known = {tap.port.uuid for tap in self._owner.record.taps}
        wanted = {interface.uuid for interface in self._owner.spec.interfaces}
        if known == wanted and all(tap.adopted for tap in self._owner.record.taps):
            return
        hypervisor, uuid = self._owner.host.hypervisor, self._owner.spec.uuid
        live = domain.live_interfaces(await self._owner.host.do(hypervisor.xml, uuid))
        for extra in live - wanted:
            await self._owner.host.do(hypervisor.detach, uuid, domain.interface_alias(extra))
        await self.remove(keep=live)
        for interface in self._owner.spec.interfaces:
            if interface.uuid not in live:
                nic = await self.make(interface)
                await self._owner.host.do(hypervisor.attach, uuid, domain.interface_xml(nic))
        await self.adopt()
