"""What lies on a disk, by its signatures; and what its file systems tell a push: cuts, hints, free blocks.

Offsets of signatures: util-linux, libblkid/src/superblocks.
"""

from collections.abc import Callable

import numpy as np

from imagestore.disks.disk import Disk, Doubt, read_range
from imagestore.disks.ext4 import Ext4
from imagestore.disks.extents import Numbers
from imagestore.disks.partitions import Region, read_partitions
from imagestore.disks.windows import Special
from imagestore.formats.chunking import BLOCK

SIGNS = {
    "ext4": ((1080, b"\x53\xef"),),
    "XFS": ((0, b"XFSB"),),
    "btrfs": ((0x10040, b"_BHRfS_M"),),
    "LVM": tuple((sector * 512, b"LABELONE") for sector in range(4)),
    "LUKS": ((0, b"LUKS\xba\xbe"),),
    "RAID": ((0, b"\xfc\x4e\x2b\xa9"), (4096, b"\xfc\x4e\x2b\xa9")),
    "swap": ((4086, b"SWAPSPACE2"),),
    "FAT": ((54, b"FAT"), (82, b"FAT32")),
    "NTFS": ((3, b"NTFS    "),),
    "F2FS": ((1024, b"\x10\x20\xf5\xf2"),),
    "EROFS": ((1024, b"\xe2\xe1\xf5\xe0"),),
    "squashfs": ((0, b"hsqs"),),
    "ISO 9660": ((0x8001, b"CD001"),),
}
HEAD_BYTES = 0x10078  # so much from the start on holds every one of SIGNS, and btrfs' size
_SMALL_BYTES = 4 << 20  # what is smaller and unknown (a boot loader's partition) is not worth a word


def signs(head: bytes) -> set[str]:
    """What a stretch of a disk looks like that begins so: some of SIGNS."""
    return {name for name, places in SIGNS.items() if any(head[at : at + len(s)] == s for at, s in places)}


def look(disk: Disk, *, sparsify: bool) -> Special:
    """Cuts, and with `sparsify` the free blocks, of every ext4 file system on the disk, with a note on each part
    of which the free blocks are not known."""
    table = read_partitions(disk)
    large, every, free = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    notes = [f"the disk: {table.doubt}"] if table.doubt else []
    at = 0
    for region in table.regions:
        if region.start < at:
            continue
        at = region.end
        system = Ext4.open(disk, region.start, min(region.end, disk.size_bytes))
        if system is not None:
            for places, found in zip((large, every), system.boundaries(), strict=True):
                places.append(found[found % BLOCK == 0] // BLOCK)
        if sparsify and not table.doubt:
            try:
                rows = free_bytes(disk, region, system)
            except Doubt as doubt:
                notes.append(f"{region.name}: {doubt}")
            else:
                rows = np.stack([-(-rows[:, 0] // BLOCK), rows[:, 1] // BLOCK], axis=1)
                free.append(rows[rows[:, 0] < rows[:, 1]])
    return Special(
        np.unique(np.concatenate(large)),
        np.unique(np.concatenate(every)),
        np.concatenate(free),
        tuple(notes if sparsify else ()),
    )


def free_bytes(disk: Disk, region: Region, system: Ext4 | None) -> Numbers:
    """Where its free blocks begin and end: none where nothing is known there, Doubt where that must be said."""
    found = signs(read_range(disk, region.start, HEAD_BYTES))
    what = " and ".join(sorted(found)) or "nothing that sf knows"
    if found > {"ext4"}:
        raise Doubt(f"it looks like {what} at once")
    if system is not None:
        return system.free()
    if found == {"ext4"}:
        raise Doubt("its ext4 is of a kind that sf does not read (meta_bg), or damaged")
    if found or region.end - region.start >= _SMALL_BYTES:
        raise Doubt(f"it holds {what}; what is free is looked up in ext4 alone")
    return np.zeros((0, 2), np.int64)


def claimed_bytes(disk: Disk) -> int:
    """How large a raw disk is at least, by its partition table or the file system that has all of it."""
    table, head = read_partitions(disk), read_range(disk, 0, HEAD_BYTES)
    if table.needs_bytes:
        return table.needs_bytes

    def number(at: int, size: int, order: str = "little") -> int:
        return int.from_bytes(head[at : at + size], order)  # type: ignore[arg-type]

    sizes: dict[str, Callable[[], int]] = {
        "ext4": lambda: system.claimed_bytes if (system := Ext4.open(disk, 0, disk.size_bytes)) else 0,
        "XFS": lambda: number(8, 8, "big") * number(4, 4, "big"),
        "btrfs": lambda: number(0x10070, 8),
        "squashfs": lambda: number(40, 8),
        "ISO 9660": lambda: number(0x8050, 4) * number(0x8080, 2),
    }
    return max((sizes[name]() for name in signs(head) & set(sizes)), default=0)
