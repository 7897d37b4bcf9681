"""Where on a disk file systems may lie: its partition table, read as Linux reads it, distrustfully.

Sources: UEFI specification 2.10, chapter 5 (GPT and the protective MBR); Linux, block/partitions/efi.c and msdos.c.
A GPT counts only behind a protective MBR, with both sums and its own address right; else the MBR decides, extended
partitions included. Without a table the disk as a whole is one region. Whatever is odd is told as `doubt`.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from imagestore.disks.disk import Disk, Doubt, read_range

_PROTECTIVE, _EXTENDED = 0xEE, (0x05, 0x0F, 0x85)
_MAX_LOGICAL = 128
_MAX_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of the disk in bytes: a partition, or all of it."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Partitions:
    """The regions in the order of their places."""

    regions: tuple[Region, ...]
    needs_bytes: int = 0  # how large the disk is by the table's word; 0 without a table
    doubt: str = ""  # why the regions might not be those in use, or ""


def read_partitions(disk: Disk) -> Partitions:
    """The partitions of a disk, or the whole of it where it has no table."""
    whole = (Region("the whole disk", 0, disk.size_bytes),)
    head = read_range(disk, 0, 1024)
    if head[510:512] != b"\x55\xaa":
        # Labels of Sun, SGI, BSD or Apple, a GPT whose MBR was erased: where ext4 has the disk, there are zeros.
        odd = any(head) or read_range(disk, 4096, 8) == b"EFI PART"
        return Partitions(whole, doubt="it begins with something that is no partition table" if odd else "")
    if any(head[at] not in (0, 0x80) for at in range(446, 510, 16)):
        return Partitions(whole, doubt="it begins with a boot sector that is no partition table")
    kinds = {kind for kind, _, _ in _entries(head)} - {0}
    try:
        found, needs = _guid(disk) if _PROTECTIVE in kinds else _dos(disk, head)
    except Doubt as error:
        return Partitions((), doubt=str(error))
    found.sort(key=lambda region: region.start)
    doubt = ""
    if needs > disk.size_bytes:
        doubt = "by its partition table it is larger than it is"
    elif _PROTECTIVE in kinds and len(kinds) > 1:
        doubt = "two partition tables describe it (a hybrid MBR)"
    elif not found:
        return Partitions(whole, doubt="its partition table is empty")
    for one, two in pairwise(found):
        if two.start < one.end:
            doubt = f"its {one.name} and {two.name} overlap"
    return Partitions(tuple(found), needs, doubt)


def _guid(disk: Disk) -> tuple[list[Region], int]:
    """The regions of a GPT, and where the disk ends by its word."""
    headers = [(sector, header) for sector in (512, 4096) if (header := _header(disk, sector)) is not None]
    if len(headers) != 1:
        raise Doubt("its partition table (GPT) is damaged" if not headers else "it has two partition tables")
    sector, header = headers[0]
    backup, _, last_usable = struct.unpack_from("<QQQ", header, 32)
    at, count, size, sum_ = struct.unpack_from("<QIII", header, 72)
    # 2**40 sectors are more than a disk may have.
    known = size == 128 and 0 < count <= _MAX_ENTRIES and at < 1 << 40
    table = read_range(disk, at * sector, count * 128) if known else b""
    if not known or zlib.crc32(table) != sum_:
        raise Doubt("its partition table (GPT) is damaged")
    found = []
    for number in range(count):
        entry = table[number * 128 : number * 128 + 128]
        start, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]):
            if not 0 < start <= last:
                raise Doubt(f"its partition {number + 1} ends before it starts")
            found.append(Region(f"partition {number + 1}", start * sector, (last + 1) * sector))
    return found, max(backup * sector + sector, last_usable * sector + sector, *(r.end for r in found), 0)


def _header(disk: Disk, sector: int) -> bytes | None:
    """A primary GPT header whose sum and own address are right."""
    raw = read_range(disk, sector, sector)
    if len(raw) < 512 or raw[:8] != b"EFI PART":
        return None
    length, sum_, _, own = struct.unpack_from("<IIIQ", raw, 12)
    right = 92 <= length <= sector and zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) == sum_ and own == 1
    return raw if right else None


def _dos(disk: Disk, head: bytes) -> tuple[list[Region], int]:
    """As `_guid`, of an MBR. Its sectors are taken for 512 bytes, unless ext4 lies where 4096 would put it."""
    found: list[Region] = []
    needs = 0
    for number, (kind, start, count) in enumerate(_entries(head), 1):
        if kind and count:
            needs = max(needs, (start + count) * 512)
            if read_range(disk, start * 4096 + 1080, 2) == b"\x53\xef":
                raise Doubt("whether its partition table counts in 512 or 4096 bytes is unclear")
            if kind in _EXTENDED:
                found += _logical(disk, start, count)
            else:
                found.append(Region(f"partition {number}", start * 512, (start + count) * 512))
    return found, needs


def _logical(disk: Disk, base: int, room: int) -> Iterator[Region]:
    """The chain of an extended partition: each link holds a partition, counted from itself, and the next link."""
    at = 0
    for number in range(5, 5 + _MAX_LOGICAL):
        sector = read_range(disk, (base + at) * 512, 512)
        if sector[510:] != b"\x55\xaa":
            break
        (kind, start, count), (onward, following, _) = _entries(sector)[:2]
        if kind and count:
            first = base + at + start
            if not 0 < start <= start + count <= room - at:
                break
            yield Region(f"partition {number}", first * 512, (first + count) * 512)
        if not onward:
            return
        if onward not in _EXTENDED or not at < following < room:
            break
        at = following
    raise Doubt("its extended partition is damaged")


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four of an MBR."""
    return [(sector[at + 4], *struct.unpack_from("<II", sector, at + 8)) for at in range(446, 510, 16)]
