"""Guests beyond cloud images: UEFI with secure boot and a TPM, an installer's ISO, other buses and processors.

Real parts: Debian's OVMF with Microsoft's keys, its signed shim, GRUB and kernel, swtpm, and ISOLINUX on an ISO.
"""

import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.private_libvirtd import QEMU_CONF, PrivateHost
from tests import drills
from tests.system.machine import ROOT, Machine, within

sys.path.insert(0, str(ROOT / "scripts"))
from guest_images.packages import fetch, kernel_packages, unpack

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not drills.everything(), reason="fetches firmware's packages and boots four guests"),
]

PARTITION = 2048 * 512
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# A variable is four bytes of attributes, then its value.
ASKS = f"""#!/bin/sh
insmod $(find /lib/modules -name "efivarfs.ko*") && mount -t efivarfs none /sys/firmware/efi/efivars
echo "SF-SECURE-BOOT $(tail -c 1 /sys/firmware/efi/efivars/{SECURE_BOOT} | od -An -tu1)"
echo "SF-TPM $(cat /sys/class/tpm/tpm0/tpm_version_major) pcr7 $(cat /sys/class/tpm/tpm0/pcr-sha256/7)"
"""
GRUB = """linux /vmlinuz console=ttyS0 loglevel=3 random.trust_cpu=on panic=5 rdinit=/init
initrd /initrd /more
boot
"""
# What an unattended installer does: find the disk, write the system, start it.
INSTALLS = """#!/bin/sh
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
for module in $(cat /etc/modules); do modprobe $module; done
exec >/dev/ttyS0 2>&1
while [ ! -b /dev/vda ] || [ ! -b /dev/sr0 ]; do sleep 0.2; done
mkdir -p /mnt && mount -t iso9660 -o ro /dev/sr0 /mnt
echo SF-INSTALLS && gunzip -c /mnt/system.gz | dd of=/dev/vda bs=1M && sync && echo SF-INSTALLED
reboot -f
"""
ISOLINUX = """SERIAL 0 115200
DEFAULT install
PROMPT 0
LABEL install
    KERNEL /vmlinuz
    INITRD /initrd,/more
    APPEND console=ttyS0 loglevel=3 random.trust_cpu=on panic=5 rdinit=/install
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("firmware")
    logs = Path("/var/log/swtpm")
    made = not logs.exists()
    conf = QEMU_CONF + 'swtpm_user = "root"\nswtpm_group = "root"\n'
    with PrivateHost(settings=conf) as host:
        # The authority that signs TPMs' certificates, and their logs, are this machine's own.
        host.run(
            ["sh", "-ec", "mkdir -p /var/log/swtpm /var/lib/swtpm-localca\n"
             "for d in /var/log/swtpm /var/lib/swtpm-localca; do mount -t tmpfs none $d; done"]
        )  # fmt: skip
        server = Machine(host, home, SF_ACCEL="tcg")
        server.start()
        try:
            yield server
        finally:
            for guest in server.listed("instance", "ls"):
                server.sf("instance", "delete", guest["name"], "--wait")
            assert not host.run(["pgrep", "swtpm"], check=False).stdout
            assert not list((host.directory / "var/lib/libvirt/swtpm").glob("*")), "a TPM goes with its guest"
            server.signal()
    if made:
        logs.rmdir()


@pytest.fixture(scope="module")
def raw(tiny_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny guest's disk, whose one partition has vmlinuz and initrd."""
    disk = tmp_path_factory.mktemp("raw") / "tiny.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", tiny_image, disk], check=True)
    return disk


def archive(tree: Path, target: Path) -> None:
    """An initramfs that goes behind another."""
    names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))).encode()
    command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
    done = subprocess.run(command, input=names, cwd=tree, check=True, capture_output=True)
    target.write_bytes(gzip.compress(done.stdout, 1))


def copied(disk: Path, *pairs: tuple[Path, str]) -> None:
    for source, place in pairs:
        subprocess.run(["mcopy", "-o", "-i", f"{disk}@@{PARTITION}", source, f"::{place}"], check=True)


@pytest.fixture(scope="module")
def signed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an EFI way in, all of it signed: Microsoft's shim of Debian, Debian's GRUB and kernel."""
    work = tmp_path_factory.mktemp("signed")
    disk = work / "signed.raw"
    disk.write_bytes(raw.read_bytes())
    unpack(fetch(["shim-signed", "grub-efi-amd64-signed"], work / "packages"), work / "efi")
    unpack(fetch(kernel_packages(), work / "kernels"), work / "kernel")
    (module,) = (work / "kernel").rglob("efivarfs.ko*")
    place = work / "more/lib/modules" / module.relative_to(next((work / "kernel").rglob("lib/modules")))
    place.parent.mkdir(parents=True)
    place.write_bytes(module.read_bytes())
    archive(work / "more", work / "more.gz")
    (work / "grub.cfg").write_text(GRUB)
    subprocess.run(["mmd", "-i", f"{disk}@@{PARTITION}", "::EFI", "::EFI/BOOT", "::EFI/debian"], check=True)
    copied(
        disk,
        (work / "efi/usr/lib/shim/shimx64.efi.signed", "EFI/BOOT/BOOTX64.EFI"),
        (work / "efi/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", "EFI/BOOT/grubx64.efi"),
        (work / "grub.cfg", "EFI/debian/grub.cfg"),
        (work / "more.gz", "more"),
    )
    return disk


def says(machine: Machine, guest: str, pattern: str, seconds: float = 240) -> re.Match[str]:
    found: list[re.Match[str]] = []

    def said() -> bool:
        text = machine.sf("instance", "console", guest).stdout.replace("\r", "")
        found[:] = re.finditer(pattern, text)
        return bool(found)

    within(seconds, said, f"{guest} says {pattern}")
    return found[0]


def test_a_guest_of_secure_boot_has_a_tpm_and_starts_only_what_is_signed(
    machine: Machine, signed: Path, tmp_path: Path
) -> None:
    machine.sf("image", "push", str(signed), "signed:1")
    (tmp_path / "asks").write_text(ASKS)
    words = ("--image", "signed:1", "--memory", "384", "--secure-boot", "--tpm")
    machine.sf("instance", "create", "safe", *words, "--user-data", str(tmp_path / "asks"))
    assert says(machine, "safe", r"SF-SECURE-BOOT +(\d)")[1] == "1"
    version, pcr = says(machine, "safe", r"SF-TPM (\d) pcr7 ([0-9A-Fa-f]{64})").groups()
    assert version == "2" and set(pcr) != {"0"}, "the firmware measured its keys"
    shown = machine.instance("safe")
    assert (shown["uefi"], shown["secure_boot"], shown["tpm"]) == (True, True, True)

    state = machine.host.directory / "var/lib/libvirt/swtpm" / shown["uuid"]
    (file,) = state.rglob("*.permall")
    born = file.parent.stat().st_ino
    machine.sf("instance", "stop", "safe", "--force", "--wait")
    machine.sf("instance", "start", "safe")
    within(60, lambda: machine.instance("safe")["power_state"] == "on", "it is on again")
    assert file.exists() and file.parent.stat().st_ino == born, "it has the same TPM"
    machine.sf("instance", "delete", "safe", "--wait")
    assert not state.exists()

    forged = tmp_path / "forged.raw"
    forged.write_bytes(signed.read_bytes())
    shim = tmp_path / "shim"
    subprocess.run(["mcopy", "-i", f"{forged}@@{PARTITION}", "::EFI/BOOT/BOOTX64.EFI", shim], check=True)
    data = bytearray(shim.read_bytes())
    at = data.index(b"shim")  # one letter of its own text
    data[at] ^= 0x20
    shim.write_bytes(data)
    copied(forged, (shim, "EFI/BOOT/BOOTX64.EFI"))
    machine.sf("image", "push", str(forged), "forged:1")
    machine.sf("instance", "create", "forged", "--image", "forged:1", *words[2:])
    says(machine, "forged", r"Access Denied|Security Violation")
    assert not machine.ready_line("forged")


@pytest.fixture(scope="module")
def iso(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installer: a kernel, an initramfs that asks nothing, and the system that it writes to the first disk."""
    work = tmp_path_factory.mktemp("iso")
    tree = work / "tree"
    (tree / "isolinux").mkdir(parents=True)
    for name in ("vmlinuz", "initrd"):
        subprocess.run(["mcopy", "-i", f"{raw}@@{PARTITION}", f"::{name}", tree / name], check=True)
    (tree / "system.gz").write_bytes(gzip.compress(raw.read_bytes(), 1))
    (work / "more").mkdir()
    (work / "more/install").write_text(INSTALLS)
    (work / "more/install").chmod(0o755)
    archive(work / "more", tree / "more")
    (tree / "isolinux/isolinux.cfg").write_text(ISOLINUX)
    for file in ("ISOLINUX/isolinux.bin", "syslinux/modules/bios/ldlinux.c32"):
        (tree / "isolinux" / Path(file).name).write_bytes(Path("/usr/lib", file).read_bytes())
    words = "-quiet -r -J -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4"
    command = ["genisoimage", *words.split(), "-boot-info-table", "-o", work / "install.iso", tree]
    subprocess.run(command, check=True, capture_output=True)
    return work / "install.iso"


def test_an_iso_boots_installs_unattended_and_the_disk_boots_afterwards(machine: Machine, iso: Path) -> None:
    machine.sf("image", "push", str(iso), "install:1")
    words = ("--disk", "1G", "--cdrom", "install:1,bus=scsi", "--memory", "384", "--cpu", "qemu64")
    machine.sf("instance", "create", "new", *words)
    says(machine, "new", "SF-INSTALLED")
    says(machine, "new", r"SF-GUEST-READY \S+ new ")
    xml = machine.host.virsh("dumpxml", machine.host.virsh("list", "--name").stdout.split()[-1]).stdout
    assert "qemu64" in xml and xml.index('boot dev="hd"'.replace('"', "'")) < xml.index("boot dev='cdrom'")
    machine.sf("instance", "exec", "new", "--", "true")
