"""A full Debian 12 guest: systemd, cloud-init with a config drive, OpenSSH, the QEMU guest agent.

Built as root by mmdebstrap from the mirrors that this machine's apt uses. One MBR partition with ext4 that grows
at first boot, started by EXTLINUX; a serial console; interfaces by systemd-networkd as cloud-init is told.

The variants are the corpus that pushes are measured with; each of them boots:

    A   the release as it came out, without updates
    E   A and one small file
    A2  the same packages as A, installed again from scratch at another time
    B   as A, with today's updates and a few packages more
    C   A's own disk upgraded in place, with thirty packages more: deleted files' blocks are still in it

Six builds of a small Debian 13, none of them reproducible, are a series that updates were not developed with. They
have a kernel and an initrd, but nothing is set up in them: T1 as it came out, T2 the same again, T3 with a few packages
more, T4 with today's updates, T5 with more packages again, T6 without those of T3.

and one that is in no corpus:

    N   as A, its interfaces by NetworkManager
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guest_images.packages import BuildError

CODENAME = "bookworm"
DISK_MIB = 2048
_OFFSET = 1 << 20
_FIXED_ID = uuid.UUID("5f0de1a0-0012-4000-8000-736664656231")
_PACKAGES = (
    "systemd-sysv systemd-resolved systemd-timesyncd dbus libpam-systemd udev kmod linux-image-cloud-amd64 "
    "initramfs-tools cloud-init cloud-guest-utils cloud-initramfs-growroot openssh-server qemu-guest-agent sudo "
    "ca-certificates curl less vim-tiny nano bash-completion iproute2 iputils-ping netbase procps locales tzdata "
    "man-db apt-utils gnupg python3 e2fsprogs fdisk unattended-upgrades rsyslog logrotate cron wget lsof psmisc"
).split()
_MORE_IN_B = ("htop", "tmux", "rsync", "python3-venv")
_SMALL = (
    "systemd-sysv udev kmod linux-image-cloud-amd64 initramfs-tools iproute2 openssh-server e2fsprogs ca-certificates"
).split()
_TOOLS, _LANGUAGES = ("curl", "less", "nano", "tmux"), ("python3", "git", "rsync")
_MORE_IN_C = (
    "apache2 bzip2 file gdisk git htop iperf3 iptables jq lftp lsscsi lvm2 mc mtr-tiny ncdu net-tools nmap parted "
    "pciutils pv python3-pip rsync screen socat sqlite3 strace tcpdump tmux traceroute tree zip"
).split()
_CLOUD_CONFIG = """datasource_list: [ConfigDrive, NoCloud, None]
locale: C.UTF-8
ssh_genkeytypes: [ed25519, ecdsa]
apt:
  preserve_sources_list: true
system_info:
  network:
    renderers: [{renderer}]
"""
_EXTLINUX_CONFIG = """SERIAL 0 115200
DEFAULT debian
PROMPT 0
LABEL debian
    KERNEL /vmlinuz
    INITRD /initrd.img
    APPEND root=UUID={root} ro console=tty0 console=ttyS0,115200 net.ifnames=0 quiet
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one build from scratch is made of."""

    updates: bool
    more: tuple[str, ...] = ()
    reproducible: bool = True
    """Fixed file-system ids and times; else as a person's second build would have them."""
    small: bool = False
    """Of Debian 13, with few packages, and not set up."""
    networks_by: tuple[str, str] = ("networkd", "systemd-networkd")
    """cloud-init's name for what sees to its interfaces, and the service's."""


RECIPES = {
    "": Recipe(updates=True),
    "A": Recipe(updates=False),
    "A2": Recipe(updates=False, reproducible=False),
    "B": Recipe(updates=True, more=_MORE_IN_B, reproducible=False),
    **{
        f"T{number}": Recipe(updates, more, reproducible=False, small=True)
        for number, (updates, more) in enumerate(
            [
                (False, ()),
                (False, ()),
                (False, _TOOLS),
                (True, _TOOLS),
                (True, (*_TOOLS, *_LANGUAGES)),
                (True, _LANGUAGES),
            ],
            1,
        )
    },
    "N": Recipe(updates=False, more=("network-manager",), networks_by=("network-manager", "NetworkManager")),
}
VARIANTS = ("A", "E", "A2", "B", "C")


def _mirrors() -> tuple[str, str]:
    """The Debian and the security mirror that this machine's apt uses, or $SF_DEBIAN_MIRROR and …-security."""
    fixed = os.environ.get("SF_DEBIAN_MIRROR", "").rstrip("/")
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    known = dict(line.split(" ", 1) for line in asked.stdout.splitlines() if " " in line)
    main = fixed or known.get("Debian", "").rstrip("/")
    if not main:
        raise BuildError(
            "apt here has no Debian mirror: set SF_DEBIAN_MIRROR to the URL of one, ending in /debian"
        )
    security = f"{fixed}-security" if fixed else known.get("Debian-Security", f"{main}-security")
    return main, security.rstrip("/")


def sources(updates: bool, codename: str = CODENAME) -> str:
    main, security = _mirrors()
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f" [signed-by={keyring}]" if keyring.exists() else ""
    lines = [f"deb{signed} {main} {codename} main"]
    if updates:
        lines.append(f"deb{signed} {main} {codename}-updates main")
        lines.append(f"deb{signed} {security} {codename}-security main")
    return "\n".join(lines) + "\n"


def _run(*command: str | Path, **more: object) -> None:
    """Runs a tool quietly; what it said is in the error when it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more
    )  # type: ignore[call-overload]
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"{Path(command[0]).name} failed with {done.returncode}:\n{said}")


def _in_mount_namespace(script: str, *arguments: str | Path) -> None:
    """Runs a shell script whose mounts (and, with them, loop devices) are gone when it ends, however it ends."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    _run(*command, "sh", "-euc", script, "sh", *arguments)


def _bootstrap(root: Path, recipe: Recipe) -> None:
    packages = ",".join([*(_SMALL if recipe.small else _PACKAGES), *recipe.more])
    codename = "trixie" if recipe.small else CODENAME
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
    command += ["--components=main", f"--include={packages}", "--aptopt=Acquire::Languages none"]
    done = subprocess.run(
        [*command, codename, root, "-"],
        input=sources(recipe.updates, codename),
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} if recipe.reproducible else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError("mmdebstrap failed:\n" + "\n".join(done.stderr.strip().splitlines()[-15:]))


def _configure(root: Path, filesystem: uuid.UUID, recipe: Recipe) -> None:
    """Leaves in the tree what a guest needs and takes out what only this build knows."""
    (root / "etc/cloud/cloud.cfg.d/90_sf.cfg").write_text(
        _CLOUD_CONFIG.format(renderer=recipe.networks_by[0])
    )
    (root / "etc/fstab").write_text(f"UUID={filesystem} / ext4 errors=remount-ro,discard 0 1\n")
    (root / "etc/hostname").write_text("debian\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "boot/extlinux").mkdir(parents=True, exist_ok=True)
    (root / "boot/extlinux/extlinux.conf").write_text(_EXTLINUX_CONFIG.format(root=filesystem))
    main, security = _mirrors()
    (root / "etc/apt/sources.list").write_text(
        f"deb {main} {CODENAME} main\ndeb {main} {CODENAME}-updates main\ndeb {security} {CODENAME}-security main\n"
    )
    _run(
        "chroot",
        root,
        "systemctl",
        "enable",
        recipe.networks_by[1],
        "systemd-resolved",
        "ssh",
        "serial-getty@ttyS0",
    )
    (root / "etc/machine-id").write_text("")
    for pattern in (
        "etc/ssh/ssh_host_*",
        "var/log/*.log",
        "var/log/apt/*",
        "var/cache/ldconfig/*",
        "var/cache/apt/*.bin",
    ):
        for path in root.glob(pattern):
            path.unlink()
    if (
        recipe.reproducible
    ):  # what the installation itself wrote gets the time of the newest file out of a package
        newest = int(max(path.stat().st_mtime for path in root.glob("usr/share/doc/*/changelog*")))
        for path in root.rglob("*"):
            if path.lstat().st_mtime > newest:
                os.utime(path, (newest, newest), follow_symlinks=False)


def _write_disk(root: Path, disk: Path, filesystem: uuid.UUID) -> None:
    sectors = DISK_MIB * 2048 - _OFFSET // 512
    entry = bytes([0x80, 0xFE, 0xFF, 0xFF, 0x83, 0xFE, 0xFF, 0xFF])
    entry += (_OFFSET // 512).to_bytes(4, "little") + sectors.to_bytes(4, "little")
    places = [Path("/usr/lib/syslinux/mbr/mbr.bin"), Path("/usr/lib/EXTLINUX/mbr.bin")]
    code = next((path for path in places if path.exists()), None)
    if code is None:
        raise BuildError(
            "syslinux' mbr.bin is missing: install syslinux-common and extlinux (scripts/setup does)"
        )
    boot_sector = (
        code.read_bytes().ljust(440, b"\0")
        + filesystem.bytes[:4]
        + b"\0\0"
        + entry.ljust(64, b"\0")
        + b"\x55\xaa"
    )
    with disk.open("wb") as file:
        file.write(boot_sector)
        file.truncate(DISK_MIB << 20)
    # extlinux 6.04 reads neither 64bit nor metadata_csum file systems safely.
    features = "^64bit,^metadata_csum,^metadata_csum_seed,^orphan_file"
    options = f"offset={_OFFSET},hash_seed={filesystem},lazy_itable_init=0,nodiscard"
    size = f"{sectors // 2}k"
    _run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        features,
        "-E",
        options,
        "-U",
        str(filesystem),
        "-L",
        "root",
        "-d",
        root,
        disk,
        size,
    )
    mounted = disk.with_suffix(".mnt")
    mounted.mkdir()
    _in_mount_namespace(
        'mount -o "loop,offset=$3" "$1" "$2"; extlinux --install "$2/boot/extlinux"; umount "$2"',
        disk,
        mounted,
        str(_OFFSET),
    )
    mounted.rmdir()


def _from_scratch(recipe: Recipe, disk: Path, work: Path) -> None:
    filesystem = _FIXED_ID if recipe.reproducible else uuid.uuid4()
    root = work / "root"
    _bootstrap(root, recipe)
    (root / "boot/extlinux").mkdir(parents=True) if recipe.small else _configure(root, filesystem, recipe)
    _write_disk(root, disk, filesystem)


def _upgrade_in_place(disk: Path, work: Path) -> None:
    mounted = work / "mounted"
    mounted.mkdir()
    resolver = Path("/etc/resolv.conf").resolve()
    _in_mount_namespace(
        'mount -o "loop,offset=$3" "$1" "$2"; cd "$2"\n'
        "mount -t proc proc proc; mount --rbind /dev dev; mount -t tmpfs run run\n"
        "mount -t tmpfs lists var/lib/apt/lists; mount -t tmpfs cache var/cache/apt\n"  # else 300 MB of dead blocks
        "mkdir -p run/systemd/resolve; cp \"$4\" run/systemd/resolve/stub-resolv.conf\n"
        "printf '#!/bin/sh\\nexit 101\\n' >usr/sbin/policy-rc.d; chmod 755 usr/sbin/policy-rc.d; shift 4\n"
        "export DEBIAN_FRONTEND=noninteractive LC_ALL=C; apt='chroot . apt-get -qq -o APT::Sandbox::User=root'\n"
        '$apt update; $apt -y dist-upgrade; $apt -y install --no-install-recommends "$@"; $apt clean\n'
        "rm usr/sbin/policy-rc.d; umount proc run var/lib/apt/lists var/cache/apt; umount -l dev; cd /; sync",
        disk, mounted, str(_OFFSET), resolver, *_MORE_IN_C,
    )  # fmt: skip


def build(output: Path, variant: str = "", base: Path | None = None) -> None:
    """Writes one variant; raw for a name ending in .raw, else qcow2. `base`: A's raw disk, where E or C is wanted."""
    if os.geteuid() != 0:
        raise BuildError("building Debian needs root (mmdebstrap and a loop mount)")
    # Beside the output: /tmp may be small or in memory.
    with tempfile.TemporaryDirectory(prefix="sf-debian-", dir=output.parent) as name:
        work = Path(name)
        work.chmod(0o755)
        disk = work / "disk.raw"
        if variant in ("E", "C"):
            if base is None:
                build(work / "base.raw", "A")
                base = work / "base.raw"
            _run("cp", "--sparse=always", base, disk)
            if variant == "C":
                _upgrade_in_place(disk, work)
            else:
                (work / "motd").write_text("One small file more.\n" * 50)
                _run(
                    "debugfs", "-w", "-R", f"write {work / 'motd'} /etc/motd.more", f"{disk}?offset={_OFFSET}"
                )
        else:
            _from_scratch(RECIPES[variant], disk, work)
        if output.suffix == ".raw":
            _run("cp", "--sparse=always", disk, output)
        else:
            _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, output)
        shutil.rmtree(work / "root", ignore_errors=True)


def corpus(directory: Path | None = None, variants: Iterable[str] = VARIANTS) -> dict[str, Path]:
    """The variants as sparse raw files in `directory` ($SF_CORPUS, else /tmp/sf-corpus).

    Builds those that are not there, about a minute each; E and C need A, which is then built as well.
    """
    directory = directory or Path(os.environ.get("SF_CORPUS") or "/tmp/sf-corpus")
    directory.mkdir(parents=True, exist_ok=True)
    wanted = {variant: directory / f"{variant}.raw" for variant in variants}
    for variant, path in wanted.items():
        with (directory / f"{variant}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                continue
            base = corpus(directory, ["A"])["A"] if variant in ("E", "C") else None
            partial = directory / f"{variant}.partial.raw"
            build(partial, variant, base)
            partial.rename(path)
    return wanted
