"""What a disk must not carry into a store for everybody: who it was, its keys and logs, and what was deleted on it.

The e2fsprogs (debugfs, e2fsck, tune2fs) change ext4 in a file, in the cage that qemu-img runs in: nothing is mounted. A
journal is played back first and made anew in the end, and directories are packed, since both remember deleted names.
What stays free is the push's to leave out (`sparsify`). Whatever cannot be cleaned for certain is refused.
"""

import re
from pathlib import Path

from imagestore.disks.disk import Disk, read_range
from imagestore.disks.ext4 import Ext4
from imagestore.disks.filesystems import HEAD_BYTES, free_bytes, look, signs
from imagestore.disks.inspection import caged
from imagestore.disks.open import open_disk
from imagestore.disks.partitions import Region, read_partitions
from imagestore.errors import Invalid
from imagestore.formats.chunking import BLOCK
from imagestore.outside import read_json

_FILES = re.compile(
    r"/etc/(?:machine-id|hostname|ssh/ssh_host_[^/]*|systemd/network/10-cloud-init-[^/]*|netplan/50-cloud-init\.yaml)"
    r"|/var/(?:lib/(?:dbus/machine-id|systemd/random-seed)|cache/apt/[a-z]*\.bin)"
    r"|/(?:root|home/[^/]*)/(?:\.[a-z_]*history|\.ssh/.*)"
    r"|/(?:tmp|var/(?:tmp|log|crash|lib/(?:cloud|dhcp|dhcpcd|NetworkManager)))/.*"
)  # what goes, by its path
_WAYS = re.compile(
    r"|/etc(?:/ssh|/systemd(?:/network)?|/netplan)?|/var|/var/cache(?:/apt)?|/var/lib(?:/dbus|/systemd)?|/root(?:/\.ssh.*)?|/home(?:/[^/]*(?:/\.ssh.*)?)?"
    r"|/(?:tmp|var/(?:tmp|log|crash|lib/(?:cloud|dhcp|dhcpcd|NetworkManager)))(?:/.*)?"
)  # directories on the way to those
_OF_ONE = re.compile(r"/var/(?:log/journal/[0-9a-f]{32}|lib/cloud/instances/.*)")
"""Such of them as go too: they are called after a machine."""
_ENTRY = re.compile(r"/(\d+)/(\d+)/\d+/\d+/([^/]+)/\d*/")
_NAME = re.compile(r"[A-Za-z0-9_.,:@%+=~-]+")
_MOST = 20_000
_RESULT, _RESULT_BYTES = "/var/lib/cloud/data/result.json", 1 << 20


def clean(path: Path) -> list[str]:
    """Clean the raw disk in a file that is nobody else's; the paths that went. Raises Invalid."""
    gone = list[str]()
    with open_disk(path, "raw") as disk:
        for region in read_partitions(disk).regions:
            if signs(read_range(disk, region.start, HEAD_BYTES)) == {"ext4"}:
                gone += _clean(disk, path, region)
    with open_disk(path, "raw") as disk, path.open("r+b") as file:  # as it is now
        if left := [note for note in look(disk, sparsify=True).notes if "it holds FAT;" not in note]:
            hint = "sf image pull, clean it, and push"
            raise Invalid(f"it cannot be cleaned for certain: {left[0]}", hint=hint)
        for region in read_partitions(disk).regions:
            system = Ext4.open(disk, region.start, min(region.end, disk.size_bytes))
            for start, end in free_bytes(disk, region, system).tolist() if system else ():
                # A push leaves out whole blocks of 4 KiB; what is free beside them is overwritten.
                first, last = min(end, -(-start // BLOCK) * BLOCK), max(start, end // BLOCK * BLOCK)
                for at, to in ((start, first), (last, end)):
                    file.seek(at)
                    file.write(bytes(max(0, to - at)))
    return gone


def check_recipe(path: Path) -> None:
    """Raises Invalid where cloud-init on the raw disk in a file says that its last run failed."""
    out = path.with_suffix(".result")
    with open_disk(path, "raw") as disk:
        for region in read_partitions(disk).regions:  # debugfs finds out which of them are ext4
            caged(["debugfs", "-R", f"dump {_RESULT} {out}", f"{path}?offset={region.start}"], _RESULT_BYTES)
    try:
        if out.exists() and (errors := {**read_json(out.read_bytes())["v1"]}["errors"]):
            raise Invalid(f"the recipe failed: {'; '.join(map(str, errors))}")
    except (ValueError, TypeError, KeyError) as error:
        raise Invalid(f"{_RESULT} on the disk is not cloud-init's") from error


def _clean(disk: Disk, path: Path, region: Region) -> list[str]:
    at = f"{path}?offset={region.start}"

    def run(*argv: str, good: tuple[int, ...] = (0,)) -> str:
        done = caged([*argv, at], disk.size_bytes)
        if done.returncode not in good:
            raise Invalid(f"{region.name} cannot be cleaned: {argv[0]} ended with {done.returncode}")
        return done.stdout

    run("e2fsck", "-fy", good=(0, 1))
    if "inline_data" in run("debugfs", "-R", "features"):
        why = "keeps small files in inodes (inline_data), which stay there when deleted"
        raise Invalid(f"{region.name} {why}")
    wanted, gone, empty, looked = [""], list[str](), list[str](), 0
    while wanted:
        directory = wanted.pop()
        for line in filter(None, run("debugfs", "-R", f"ls -p {directory or '/'}").splitlines()):
            entry = _ENTRY.fullmatch(line)  # a name with the end of a line in it leaves none
            inode, mode, name = entry.groups() if entry else ("", "", "")
            if name in (".", "..") or inode == "0":
                continue
            here, looked = f"{directory}/{name}", looked + 1
            way, file = _WAYS.fullmatch(here), _FILES.fullmatch(here)
            if not entry or ((way or file) and (not _NAME.fullmatch(name) or looked > _MOST)):
                why = f"{directory} holds names that are none, or too many"
                raise Invalid(f"{region.name} cannot be cleaned: {why}")
            if mode.startswith("04") and way:
                wanted.append(here)
                empty += [here] if _OF_ONE.fullmatch(here) else []
            elif file and not mode.startswith("04"):
                gone.append(here)
    steps = [*(f"rm {name}" for name in gone), *(f"rmdir {name}" for name in reversed(empty))]
    if "/etc/machine-id" in gone:  # empty, not absent: systemd makes a new one at the next boot
        steps += ["cd /etc", "write /dev/null machine-id", "sif /etc/machine-id mode 0100444"]
    script = path.with_suffix(".clean")
    script.write_text("\n".join([*steps, ""]))
    run("debugfs", "-w", "-f", str(script))
    run("e2fsck", "-fyD", good=(0, 1))
    run("tune2fs", "-O", "^has_journal")
    run("e2fsck", "-fy", good=(0, 1))
    run("tune2fs", "-j")
    return gone
