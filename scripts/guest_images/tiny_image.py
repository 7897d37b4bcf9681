"""The tiny guest: Debian's cloud kernel and busybox in an initramfs, booted from its own disk by SYSLINUX.

It reads an OpenStack config drive (ISO 9660 or FAT labelled config-2), sets name, addresses and ssh key, and
prints `SF-GUEST-READY <uuid> <hostname> <address>` on the serial console; then its guest agent answers. It needs no
root: FAT is written by mtools and made bootable by `syslinux`, so nothing is ever mounted.

Debian's cloud kernel has no AHCI: the config drive must be a virtio-blk disk or a virtio-scsi CD, never SATA.
"""

import gzip
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from guest_images.packages import BuildError, closure, fetch, kernel_packages, place, unpack

SOURCES = Path(__file__).parent / "tiny"
DISK_MIB = 40
PARTITION_START = 2048  # sectors of 512 bytes
_SECTOR = 512
_EPOCH = "1700000000"
_MODULES = tuple(
    "virtio_pci virtio_blk virtio_net virtio_scsi virtio_console virtio_rng sr_mod isofs vfat "
    "nls_ascii nls_utf8 nls_cp437 nls_iso8859-1 button evdev".split()
)
_SYSLINUX_CONFIG = """SERIAL 0 115200
DEFAULT tiny
PROMPT 0
LABEL tiny
    KERNEL /vmlinuz
    INITRD /initrd
    APPEND console=ttyS0 loglevel=3 random.trust_cpu=on panic=5 rdinit=/init
"""
_INITTAB = """::sysinit:/etc/rcS
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
"""
_PASSWD = "root:x:0:0:root:/root:/bin/sh\ndebian:x:0:0:another name of root, as cloud images have it:/root:/bin/sh\n"


def _copy_modules(unpacked: Path, root: Path, busybox: Path) -> None:
    source = next(place(unpacked, "lib/modules").iterdir())
    version = source.name
    base = source.parents[2]  # what holds lib/modules/VERSION
    for path in source.rglob("*.ko.*"):  # busybox, which will load them, reads neither
        if path.suffix == ".xz":
            path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        else:
            subprocess.run(["zstd", "-qd", path], check=True)
        path.unlink()
    by_name = {path.stem: path for path in source.rglob("*.ko")}
    subprocess.run([busybox, "depmod", "-b", base, version], check=True, capture_output=True)
    needs: dict[str, list[str]] = {}
    for line in (source / "modules.dep").read_text().splitlines():
        module, _, needed = line.partition(":")
        needs[Path(module).name] = [Path(path).name for path in needed.split()]
    files = {path.name: path for path in by_name.values()}
    waiting = [by_name[name].name for name in _MODULES if name in by_name]  # what is missing is built in
    taken: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in taken:
            continue
        taken.add(name)
        waiting.extend(needs.get(name, []))
        target = root / "lib/modules" / version / files[name].relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[name], target)
    subprocess.run([busybox, "depmod", "-b", root, version], check=True, capture_output=True)


def _copy_with_libraries(unpacked: Path, root: Path, program: str) -> None:
    """Copies a dynamic program, its loader and the libraries that it and they name, out of unpacked packages."""
    libraries = {path.name: path for path in sorted(unpacked.rglob("*.so*")) if path.is_file()}
    target = root / program.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(unpacked / program.lstrip("/"), target)
    waiting, seen = [target], {"ld-linux-x86-64.so.2"}
    loader = root / "lib64/ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(libraries["ld-linux-x86-64.so.2"], loader)
    while waiting:
        dump = subprocess.run(
            ["objdump", "-p", waiting.pop()], check=True, capture_output=True, text=True
        ).stdout
        for name in re.findall(r"NEEDED\s+(\S+)", dump):
            if name not in seen:
                seen.add(name)
                shutil.copy(libraries[name], root / "lib" / name)
                waiting.append(root / "lib" / name)


def _make_root(work: Path) -> tuple[Path, Path]:
    """Fills the initramfs' directory; answers it and the kernel."""
    kernel_files, root = work / "kernel", work / "root"
    unpack(fetch(kernel_packages(), work / "kernel-packages"), kernel_files)
    # gcc-12-base and libgcc-s1 are needed by libc6 on paper only.
    programs = closure(
        ["busybox-static", "dropbear-bin", "qemu-guest-agent"], without=frozenset({"debconf", "libgcc-s1"})
    )
    unpack(fetch(programs, work / "packages"), work / "programs")

    for name in (
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "lib",
        "etc/acpi/PWRF",
        "etc/dropbear",
        "etc/sf",
        "dev",
        "proc",
        "sys",
    ):
        (root / name).mkdir(parents=True)
    busybox = root / "bin/busybox"
    shutil.copy(place(work / "programs", "bin/busybox"), busybox)
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in listed:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for applet in ("init", "reboot", "poweroff", "modprobe"):
        (root / "sbin" / applet).symlink_to("../bin/busybox")
    (root / "init").symlink_to("bin/busybox")

    for program in ("dropbear", "qemu-ga"):
        _copy_with_libraries(work / "programs", root, f"/usr/sbin/{program}")
    _copy_modules(kernel_files, root, busybox)
    for name, mode in (
        ("rcS", 0o755),
        ("udhcpc.sh", 0o755),
        ("steps.sh", 0o644),
        ("json.awk", 0o644),
        ("sf/renew", 0o755),
    ):
        shutil.copy(SOURCES / Path(name).name, root / "etc" / name)
        (root / "etc" / name).chmod(mode)
    (root / "etc/inittab").write_text(_INITTAB)
    (root / "etc/passwd").write_text(_PASSWD)
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/shells").write_text("/bin/sh\n")
    (root / "etc/modules").write_text("\n".join(_MODULES) + "\n")
    (root / "etc/profile").write_text("export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root PS1='\\h# '\n")
    (root / "etc/acpi/PWRF/00000080").write_text("#!/bin/sh\nexec poweroff\n")  # the power button
    (root / "etc/acpi/PWRF/00000080").chmod(0o755)
    rawsend = root / "bin/rawsend"
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", rawsend, SOURCES / "rawsend.c"], check=True)
    return root, next(kernel_files.glob("boot/vmlinuz-*"))


def _pack_initramfs(root: Path, target: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    for name in names:
        os.utime(root / name, (int(_EPOCH), int(_EPOCH)), follow_symlinks=False)
    archive = subprocess.run(
        ["cpio", "--quiet", "--create", "--format=newc", "--reproducible", "--owner=0:0"],
        input="\n".join(names).encode() + b"\n",
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    target.write_bytes(gzip.compress(archive, 9, mtime=0))


def _write_disk(disk: Path, files: dict[str, Path]) -> None:
    """A raw disk with an MBR and one bootable FAT partition that holds `files`."""
    sectors = DISK_MIB * 2048 - PARTITION_START
    entry = bytes([0x80, 0xFE, 0xFF, 0xFF, 0x0E, 0xFE, 0xFF, 0xFF])
    entry += PARTITION_START.to_bytes(4, "little") + sectors.to_bytes(4, "little")
    places = map(Path, ("/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin"))
    code = next((path for path in places if path.exists()), None)
    if code is None:
        raise BuildError("syslinux' mbr.bin is missing: install syslinux-common (scripts/setup does)")
    boot_sector = code.read_bytes().ljust(440, b"\0") + b"SF\0\1\0\0" + entry.ljust(64, b"\0") + b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(boot_sector)
        file.truncate(DISK_MIB << 20)
    environment = os.environ | {"SOURCE_DATE_EPOCH": _EPOCH, "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}
    offset = PARTITION_START * _SECTOR
    subprocess.run(
        ["mkfs.vfat", "-F", "16", "--invariant", "-n", "SF-TINY", "-h", str(PARTITION_START)]
        + [f"--offset={PARTITION_START}", str(disk), str(sectors // 2)],
        check=True,
        capture_output=True,
        env=environment,
    )
    for name, path in files.items():
        os.utime(path, (int(_EPOCH), int(_EPOCH)))
        subprocess.run(
            ["mcopy", "-m", "-i", f"{disk}@@{offset}", path, f"::{name}"], check=True, env=environment
        )
    subprocess.run(["syslinux", "--install", "--offset", str(offset), disk], check=True, env=environment)


def build(output: Path) -> None:
    """Writes the tiny image as a qcow2 file."""
    with tempfile.TemporaryDirectory(prefix="sf-tiny-") as name:
        work = Path(name)
        root, kernel = _make_root(work)
        initrd, config, disk = work / "initrd", work / "syslinux.cfg", work / "disk.raw"
        _pack_initramfs(root, initrd)
        config.write_text(_SYSLINUX_CONFIG)
        _write_disk(disk, {"vmlinuz": kernel, "initrd": initrd, "syslinux.cfg": config})
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, output], check=True)
