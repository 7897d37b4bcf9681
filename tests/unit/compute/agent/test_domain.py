"""Domain XML as a function of values."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compute.agent.hypervisor import domain
from compute.wire.spec import InstanceSpec, InterfaceSpec

BASE = domain.Domain(
    installation="0badcafe",
    machine="m1",
    spec=InstanceSpec("6b1f9d1e-7a77-4f0e-9a54-0f6a5f0e2f11", "<web> & more", "system", 2, 512, ()),
    directory=Path("/s"),
    accel="tcg",
    cpu="",
    disks=(
        domain.Disk("vda", Path("/s/vda.qcow2"), Path("/c/image.raw")),
        domain.Disk("vdb", Path("/s/vdb.qcow2")),
    ),
    nics=(
        (
            InterfaceSpec(
                "1d6a0c7e-0000-4000-8000-000000000001", "n", "02:00:00:00:00:01", "", tap="sfu0abc"
            ),
            1450,
        ),
    ),
)


def shows(kind: str) -> domain.Domain:
    return replace(BASE, spec=replace(BASE.spec, vdi=kind), listen="192.0.2.1", password="secret")


def tree(value: domain.Domain) -> ElementTree.Element:
    return ElementTree.fromstring(domain.domain_xml(value))


@pytest.mark.skipif(shutil.which("xmllint") is None, reason="no xmllint here")
@pytest.mark.parametrize(
    "value",
    [
        BASE,
        replace(BASE, incoming=True),
        replace(BASE, spec=replace(BASE.spec, uefi=True)),
        replace(BASE, spec=replace(BASE.spec, uefi=True, secure_boot=True, tpm=True, cpu_model="EPYC")),
        replace(
            BASE, spec=replace(BASE.spec, video="cirrus", video_kib=16384, config_drive=False, agent=False)
        ),
        replace(shows("vnc"), accel="kvm", cpu="qemu64"),
        shows("spice"),
        replace(BASE, incoming=True),
    ],
)
def test_it_fits_libvirts_schema(tmp_path: Path, value: domain.Domain) -> None:
    path = tmp_path / "domain.xml"
    path.write_text(domain.domain_xml(value))
    done = subprocess.run(["virt-xml-validate", path, "domain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_order_of_disks_is_the_boot_order_and_a_processor_of_its_own_comes_before_the_nodes() -> None:
    disk, cdrom = BASE.disks[0], domain.Disk("vdc", Path("/s/vdc.qcow2"), bus="sata", cdrom=True)
    for disks, wanted in (
        ((disk,), ["hd"]),
        ((disk, cdrom), ["hd", "cdrom"]),
        ((cdrom, disk), ["cdrom", "hd"]),
    ):
        found = tree(replace(BASE, disks=disks)).iterfind("os/boot")
        assert [one.get("dev") for one in found] == wanted
    given = replace(BASE, cpu="qemu64", spec=replace(BASE.spec, cpu_model="EPYC"))
    assert tree(given).findtext("cpu/model") == "EPYC"


def test_secure_boot_is_firmware_with_keys_that_only_its_own_mode_writes() -> None:
    secure = tree(replace(BASE, spec=replace(BASE.spec, uefi=True, secure_boot=True, tpm=True)))
    features = {f.get("name"): f.get("enabled") for f in secure.iterfind("os/firmware/feature")}
    assert features == {"secure-boot": "yes", "enrolled-keys": "yes"}
    assert secure.find("features/smm") is not None and secure.find("devices/tpm") is not None
    plain = tree(replace(BASE, spec=replace(BASE.spec, uefi=True)))
    assert {f.get("enabled") for f in plain.iterfind("os/firmware/feature")} == {"no"}
    assert plain.find("features/smm") is None and plain.find("devices/tpm") is None


def test_a_guest_has_the_card_the_channel_and_the_drive_that_it_was_promised() -> None:
    """F8."""

    def has(**change: object) -> tuple[list[dict[str, str]], int, int]:
        root = tree(replace(BASE, spec=replace(BASE.spec, **change)))  # type: ignore[arg-type]
        drives = [t for t in root.iterfind("devices/disk/target") if t.get("dev") == "vdz"]
        cards = [model.attrib for model in root.iterfind("devices/video/model")]
        return cards, len(root.findall("devices/channel")), len(drives)

    assert has() == ([], 1, 1)
    assert has(video="cirrus", video_kib=8192) == ([{"type": "cirrus", "vram": "8192"}], 1, 1)
    assert has(agent=False, config_drive=False) == ([], 0, 0)
    shown = tree(shows("vnc"))
    assert [model.attrib for model in shown.iterfind("devices/video/model")] == [{"type": "virtio"}]


def test_vnc_listens_on_no_port_and_spice_on_one_with_a_password() -> None:
    (vnc,) = tree(shows("vnc")).iterfind("devices/graphics")
    assert vnc.attrib == {"type": "vnc"} and [one.attrib for one in vnc] == [{"type": "socket"}]
    (spice,) = tree(shows("spice")).iterfind("devices/graphics")
    assert spice.get("passwd") == "secret"
    assert [one.attrib for one in spice] == [{"type": "address", "address": "192.0.2.1"}]


@pytest.mark.parametrize(
    ("graphics", "seen"),
    [
        ("", (0, "")),
        ("<graphics type='vnc' socket='/d/v'><listen type='socket' socket='/d/v'/></graphics>", (0, "/d/v")),
        ("<graphics type='vnc'><listen type='socket'/></graphics>", (0, "")),
        ("<graphics type='spice' port='5900' autoport='yes' listen='192.0.2.1'/>", (5900, "")),
        ("<graphics type='vnc' port='5901' listen='192.0.2.1'/>", (5901, "")),  # as an older sf started it
        ("<graphics type='vnc' port='-1' autoport='yes'/>", (0, "")),
    ],
)
def test_where_the_screen_is_stands_in_a_running_domains_xml(graphics: str, seen: tuple[int, str]) -> None:
    assert domain.screen(f"<domain><devices>{graphics}</devices></domain>") == seen


def test_it_carries_the_installations_id_and_finds_it_again() -> None:
    assert domain.installation_of(domain.domain_xml(BASE)) == (BASE.installation, BASE.spec.uuid, "m1")
    assert domain.installation_of("<domain><name>theirs</name></domain>") == ("", "", "")


def test_an_image_that_guests_share_is_never_relabelled_and_formats_are_named() -> None:
    root = tree(BASE)
    (shared,) = root.iterfind("devices/disk/backingStore/source")
    label = shared.find("seclabel")
    assert label is not None and label.attrib == {"model": "dac", "relabel": "no"}
    assert len(list(root.iter("seclabel"))) == 1
    assert [d.get("type") for d in root.iterfind("devices/disk/driver")] == ["qcow2", "qcow2", "raw"]
    assert [f.get("type") for f in root.iterfind("devices/disk/backingStore/format")] == ["raw"]


def test_nothing_listens_without_a_password() -> None:
    assert tree(BASE).find("devices/graphics") is None
    assert {s.get("type") for s in tree(BASE).iterfind("devices/serial")} == {"pty"}
    shown = tree(shows("spice")).find("devices/graphics")
    assert shown is not None and shown.get("passwd") == "secret"
    listen = shown.find("listen")
    assert listen is not None and listen.attrib == {"type": "address", "address": "192.0.2.1"}


def test_there_are_free_ports_for_hot_plug_however_full_the_guest_is() -> None:
    disks = tuple(domain.Disk(f"vd{letter}", Path(f"/s/{letter}")) for letter in "abcdefghijklmnop")
    root = tree(replace(BASE, disks=disks))
    ports = [c for c in root.iterfind("devices/controller") if c.get("model") == "pcie-root-port"]
    assert len(ports) >= len(disks) + len(BASE.nics) + 5 + domain.SPARE_PORTS


def test_libvirt_does_not_ask_for_each_feature_of_the_processor_by_itself() -> None:
    left_out = {one.get("capability") for one in tree(BASE).iterfind("{*}capabilities/{*}del")}
    assert left_out == {"cpu-unavailable-features"}


def test_live_interfaces_of_ours_are_recognised_by_their_alias() -> None:
    found = domain.live_interfaces(domain.domain_xml(BASE))
    assert found == {BASE.nics[0][0].uuid}
    stranger = "<domain><devices><interface type='user'><mac address='x'/></interface></devices></domain>"
    assert domain.live_interfaces(stranger) == frozenset()


def test_the_group_that_qemu_runs_as_is_in_libvirts_capabilities() -> None:
    label = "<baselabel type='qemu'>+64055:+109</baselabel>"
    models = f"<secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>{label}</secmodel>"
    assert domain.qemu_group(f"<capabilities><host>{models}</host></capabilities>") == 109
    assert domain.qemu_group("<capabilities><host/></capabilities>") == 0
