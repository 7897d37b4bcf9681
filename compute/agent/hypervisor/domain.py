"""A guest as libvirt's domain XML: a pure function of values (https://libvirt.org/formatdomain.html).

q35 with virtio devices. Images say `relabel='no'`, so that libvirt never changes the owner of a file that several
guests share; what belongs to one guest it gives to the user that qemu runs as. The serial console is a pty (reached
through libvirt alone, so by nobody without rights) whose output qemu also appends to a log file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import AGENT_CHANNEL, InstanceSpec, InterfaceSpec

METADATA_NAMESPACE = "urn:sf-cloud:instance:1"
_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_BUS = {"ide": "sata"}  # q35 has no IDE
SPARE_PORTS = 8  # pcie-root-ports kept free for hot-plug: q35 cannot add a port to a running guest


@dataclass(frozen=True, slots=True)
class Disk:
    """A qcow2 overlay (or blank qcow2) and what is behind it."""

    device: str
    path: Path
    backing: Path | None = None
    socket: Path | None = None  # an NBD export that stands in for `backing` until that is complete
    bus: str = "virtio"
    cdrom: bool = False


Nic = tuple[InterfaceSpec, int]
"""An interface whose tap exists already, and the MTU of its network; its uuid becomes the device's alias."""


@dataclass(frozen=True, slots=True)
class Domain:
    """Everything that goes into the XML."""

    installation: str
    machine: str  # the node's own id
    spec: InstanceSpec
    directory: Path  # where its config.iso, its console.log and (with UEFI) its nvram.fd are
    accel: str  # kvm or tcg
    cpu: str  # a named model; "" is all that the accelerator can do
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    listen: str = ""
    """The node's address for SPICE, which never comes without a password. VNC is a socket, reached by streams."""
    password: str = ""
    incoming: bool = False  # it takes its memory from a stream (`hypervisor.passing`), instead of booting


def name(installation: str, uuid: str) -> str:
    """The domain's name; libvirt shows it to people, we find our domains by their metadata."""
    return f"sf-{installation}-{uuid}"


def why_ended(how: str, installation: str, uuid: str) -> str:
    """For people: why a domain that was up is off; begins with "qemu" for what was no end of its own."""
    crash = f"qemu was killed or crashed; see {name(installation, uuid)}.log of libvirt"
    ends = {"halted": "the guest powered itself off", "destroyed": "somebody stopped the guest"}
    return ends.get(how, crash)


def interface_alias(uuid: str) -> str:
    """libvirt keeps aliases only if they start with ua-."""
    return f"ua-{uuid}"


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, {key.rstrip("_"): value for key, value in attributes.items()})
    element.text = text
    return element


def _overlay(disk: Disk) -> ET.Element:
    element = ET.Element("disk", {"type": "file", "device": "cdrom" if disk.cdrom else "disk"})
    _add(element, "driver", name="qemu", type="qcow2", cache="none", discard="unmap", io="threads")
    _add(element, "source", file=str(disk.path))
    backing = _add(element, "backingStore")
    if disk.backing is not None:
        backing.set("type", "network" if disk.socket else "file")
        _add(backing, "format", type="raw")
        if disk.socket:
            source = _add(backing, "source", protocol="nbd")
            _add(source, "host", transport="unix", socket=str(disk.socket))
        else:
            _add(_add(backing, "source", file=str(disk.backing)), "seclabel", model="dac", relabel="no")
        _add(backing, "backingStore")
    return element


def overlay_xml(disk: Disk) -> str:
    """A disk's file and backing chain alone: the destination of a block copy."""
    return ET.tostring(_overlay(disk), encoding="unicode")


def source_of(xml: str, device: str) -> str:
    """The file that a domain's disk is on; "" if it has no such disk."""
    return _first(xml, f"devices/disk/target[@dev='{device}']/../source").get("file", "")


def _interface(nic: Nic) -> ET.Element:
    interface, mtu_bytes = nic
    element = ET.Element("interface", {"type": "ethernet"})
    _add(element, "mac", address=interface.mac)
    _add(element, "target", dev=interface.tap, managed="no")
    _add(element, "model", type=interface.model)
    # The agent moves the tap into the network's namespace: vhost-net's thread would do too, but may be missing.
    _add(element, "driver", name="qemu")
    _add(element, "mtu", size=str(mtu_bytes))
    _add(element, "alias", name=interface_alias(interface.uuid))
    return element


def interface_xml(nic: Nic) -> str:
    """One interface, for hot-plug."""
    return ET.tostring(_interface(nic), encoding="unicode")


def domain_xml(domain: Domain) -> str:
    """The whole domain."""
    root = ET.Element("domain", {"type": "kvm" if domain.accel == "kvm" else "qemu"})
    spec = domain.spec
    _add(root, "name", name(domain.installation, spec.uuid))
    _add(root, "uuid", spec.uuid)
    _add(root, "genid", spec.uuid)  # who resumes as another guest is told, and makes its random numbers anew
    _add(root, "title", f"{spec.namespace}/{spec.name}")
    metadata = _add(root, "metadata")
    ET.register_namespace("sf", METADATA_NAMESPACE)
    ours = ET.SubElement(metadata, f"{{{METADATA_NAMESPACE}}}instance")
    ours.set("installation", domain.installation)
    ours.set("uuid", spec.uuid)
    ours.set("machine", domain.machine)
    ours.text = json.dumps(to_plain(spec))
    _add(root, "memory", str(spec.memory_mib), unit="MiB")
    _add(root, "vcpu", str(spec.cpus))
    os = _add(root, "os", **({"firmware": "efi"} if spec.uefi else {}))
    _add(os, "type", "hvm", arch="x86_64", machine="q35")
    if spec.uefi:
        firmware = _add(os, "firmware")
        for feature in ("secure-boot", "enrolled-keys"):
            _add(firmware, "feature", enabled="yes" if spec.secure_boot else "no", name=feature)
        _add(os, "nvram", str(domain.directory / "nvram.fd"))
    for kind in dict.fromkeys("cdrom" if disk.cdrom else "hd" for disk in domain.disks):
        _add(os, "boot", dev=kind)
    features = _add(root, "features")
    _add(features, "acpi")
    _add(features, "apic")
    if spec.secure_boot:
        _add(features, "smm", state="on")  # where the firmware keeps its keys from the system
    if cpu := spec.cpu_model or domain.cpu:
        _add(_add(root, "cpu", mode="custom", match="exact", check="none"), "model", cpu)
    else:
        _add(root, "cpu", mode="host-passthrough" if domain.accel == "kvm" else "maximum", check="none")
    clock = _add(root, "clock", offset="utc")
    _add(clock, "timer", name="rtc", tickpolicy="catchup")
    _add(clock, "timer", name="hpet", present="no")
    devices = _add(root, "devices")
    _add(devices, "controller", type="pci", index="0", model="pcie-root")
    busy = len(domain.disks) + len(domain.nics) + 6  # config drive, virtio-serial, balloon, rng, video, scsi
    for index in range(1, busy + SPARE_PORTS + 1):
        _add(devices, "controller", type="pci", index=str(index), model="pcie-root-port")
    buses = {disk.bus for disk in domain.disks}
    _add(devices, "controller", type="usb", model="qemu-xhci" if "usb" in buses else "none")
    if "scsi" in buses:
        _add(devices, "controller", type="scsi", model="virtio-scsi")
    for disk in domain.disks:
        element = _overlay(disk)
        _add(element, "target", dev=disk.device, bus=_BUS.get(disk.bus, disk.bus))
        devices.append(element)
        if disk.cdrom:
            _add(element, "readonly")
    if spec.config_drive:  # virtio-blk, not a SATA CD-ROM: the cloud kernels of distributions have no AHCI
        element = _add(devices, "disk", type="file", device="disk")
        _add(element, "driver", name="qemu", type="raw")
        _add(element, "source", file=str(domain.directory / "config.iso"))
        _add(element, "target", dev="vdz", bus="virtio")
        _add(element, "readonly")
    for nic in domain.nics:
        devices.append(_interface(nic))
    serial = _add(devices, "serial", type="pty")
    _add(serial, "log", file=str(domain.directory / "console.log"), append="on")
    if spec.agent:
        _add(_add(devices, "channel", type="unix"), "target", type="virtio", name=AGENT_CHANNEL)
    if spec.tpm:
        _add(_add(devices, "tpm", model="tpm-crb"), "backend", type="emulator", version="2.0")
    _add(_add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    if spec.vdi == "vnc":  # libvirt makes its path, in a directory of qemu's and root's
        _add(_add(devices, "graphics", type="vnc"), "listen", type="socket")
    elif spec.vdi:
        graphics = _add(devices, "graphics", type=spec.vdi, autoport="yes", passwd=domain.password)
        _add(graphics, "listen", type="address", address=domain.listen)
    if spec.video or spec.vdi:
        memory = {"vram": str(spec.video_kib)} if spec.video_kib else {}
        _add(_add(devices, "video"), "model", type=spec.video or "virtio", **memory)
    ET.register_namespace("qemu", _QEMU_NAMESPACE)
    # Else libvirt asks for each of 400 features of the processor by itself, four fifths of a start.
    without = ET.SubElement(root, f"{{{_QEMU_NAMESPACE}}}capabilities")
    ET.SubElement(without, f"{{{_QEMU_NAMESPACE}}}del", capability="cpu-unavailable-features")
    if domain.incoming:
        command = ET.SubElement(root, f"{{{_QEMU_NAMESPACE}}}commandline")
        for word in ("-incoming", "defer"):
            ET.SubElement(command, f"{{{_QEMU_NAMESPACE}}}arg", value=word)
    return ET.tostring(root, encoding="unicode")


def _read(xml: str) -> ET.Element:
    return ET.fromstring(xml)  # noqa: S314 - libvirt wrote it


def _first(xml: str, path: str) -> dict[str, str]:
    """The attributes of the first element there; {} without."""
    found = _read(xml).find(path)
    return {} if found is None else found.attrib


def installation_of(xml: str) -> tuple[str, str, str]:
    """(installation's id, instance's uuid, node's id) from a domain's metadata, empty for a stranger's domain.

    Version 0.1 wrote no node's id.
    """
    ours = _first(xml, f"metadata/{{{METADATA_NAMESPACE}}}instance")
    return ours.get("installation", ""), ours.get("uuid", ""), ours.get("machine", "")


def console_log(xml: str) -> Path:
    """Where a domain of ours logs: in its instance's directory."""
    return Path(_first(xml, "devices/serial/log").get("file", ""))


def console_tty(xml: str) -> str:
    """The terminal of a running domain's serial console; "" without."""
    return _first(xml, "devices/serial/source").get("path", "")


def spec_of(xml: str) -> InstanceSpec | None:
    """What a domain of ours was made from; None of a stranger's, and where version 0.1 did not write it there."""
    text = (_read(xml).findtext(f"metadata/{{{METADATA_NAMESPACE}}}instance") or "").strip()
    return from_plain(InstanceSpec, json.loads(text)) if text else None


_SEEN = ("genid", "memory", "vcpu", "os", "features", "cpu", "clock", "devices")
_NODES_OWN = ("source", "backingStore", "alias", "log", "graphics", "seclabel")


def shape(xml: str) -> dict[str, str]:
    """What a running domain's guest sees of its machine, by names for people."""
    root = _read(xml)
    for one in list(root.iter())[::-1]:  # from inside outwards: each is sorted as it will be
        one.text, one.tail = (one.text or "").strip(), None
        one.attrib = {name: value for name, value in one.attrib.items() if name not in ("state", "tty")}
        one[:] = sorted((child for child in one if child.tag not in _NODES_OWN), key=ET.tostring)
    return {tag: ET.tostring(found, "unicode") for tag in _SEEN if (found := root.find(tag)) is not None}


def served(xml: str) -> tuple[str, ...]:
    """Devices whose image is read from an NBD export."""
    disks = _read(xml).iterfind("devices/disk/backingStore[@type='network']/../target")
    return tuple(target.get("dev", "") for target in disks)


def live_interfaces(xml: str) -> frozenset[str]:
    """Uuids of our interfaces in a running domain's XML."""
    names = (alias.get("name", "") for alias in _read(xml).iterfind("devices/interface/alias"))
    return frozenset(name.removeprefix("ua-") for name in names if name.startswith("ua-"))


def qemu_group(capabilities: str) -> int:
    """The group id in a host's capabilities, `<baselabel type='qemu'>+64055:+109</baselabel>`; 0 without."""
    for model in _read(capabilities).iterfind("host/secmodel"):
        label = model.find("baselabel")
        if model.findtext("model") == "dac" and label is not None and label.text:
            return int(label.text.rpartition(":")[2])
    return 0


def screen(xml: str) -> tuple[int, str]:
    """The port that SPICE listens on (or VNC of a guest that an older sf started), 0 without; VNC's socket, or ""."""
    found = _first(xml, "devices/graphics")
    return max(0, int(found.get("port", "0"))), found.get("socket", "")


def agent_connected(xml: str) -> bool:
    """Whether the guest's agent has its channel open."""
    return _first(xml, f"devices/channel/target[@name='{AGENT_CHANNEL}']").get("state") == "connected"
