"""A guest's record made anew from what is there, where the record itself is damaged or lost."""

from ipaddress import IPv4Address
from pathlib import Path

from compute.agent.guest.record import Course, DisksHeld, Phase, Tap, TapsHeld
from compute.agent.hypervisor import domain
from compute.wire.spec import InstanceSpec
from net import Port


def rebuilt(
    node: str, directory: Path, spec: InstanceSpec, xml: str, why: str
) -> tuple[Course, TapsHeld, DisksHeld] | None:
    """The parts of the record of a guest that was made from `spec`; None if not all of its disks are there.

    `xml` is its domain, "" without. That it is up is only assumed: what libvirt says next decides.
    """
    names = {path.name for path in directory.glob("*.qcow2")}
    moved = tuple(d.device for d in spec.disks if f"{d.device}.2.qcow2" in names)
    if xml:
        moved = tuple(d for d in moved if domain.source_of(xml, d).endswith(".2.qcow2"))
    if not all(f"{d.device}{'.2' if d.device in moved else ''}.qcow2" in names for d in spec.disks):
        return None
    live = domain.live_interfaces(xml) if xml else ()
    taps = tuple(
        Tap(Port(i.uuid, i.mac, IPv4Address(i.address), spec.name, node, i.tap), i.network_uuid, adopted=True)
        for i in spec.interfaces
        if i.uuid in live
    )
    course = Course(spec, Phase.UP, True, why, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)
    return course, TapsHeld(taps), DisksHeld(served=domain.served(xml) if xml else (), moved=moved)
