"""What an ext4 file system on a disk tells the chunker: where files lie, and which blocks are free.

Source: Linux, Documentation/filesystems/ext4. Only hints: metadata that is odd or beyond bounds is left out, and with
it the cuts that it would have given; nothing here trusts the disk. Read are file systems with blocks of 4 KiB, whole
disks or in primary MBR or GPT partitions that start at a multiple of 4 KiB. XFS and btrfs give no hints.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imagestore.disks.chunker import runs
from imagestore.disks.open import Disk, read_range
from imagestore.disks.windows import Special
from imagestore.errors import Invalid
from imagestore.formats.chunking import BLOCK

FILE_BYTES = 32 << 10
"""Files from this size on start and end a chunk."""
_MIN_EXTENT = FILE_BYTES // BLOCK
_MAX_TABLE_BYTES = 2 << 30
_MAX_NODES = 1 << 17
_MAX_GROUPS = 1 << 19
_MAX_CUTS = 1 << 24
_META_BG, _64BIT, _RECOVER, _BIGALLOC = 0x10, 0x80, 0x4, 0x200
_LEAF = np.dtype([("block", "<u4"), ("length", "<u2"), ("high", "<u2"), ("low", "<u4")])
_NODE = np.dtype([("block", "<u4"), ("low", "<u4"), ("high", "<u2"), ("unused", "<u2")])


def look(disk: Disk, *, sparsify: bool) -> Special:
    """Cuts, and with `sparsify` the free blocks, of every ext4 file system on the disk.

    Raises Invalid when free blocks are wanted of a file system whose journal was not replayed.
    """
    cuts, hints, free = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    for start, end in _partitions(disk):
        system = _Ext4.open(disk, start, end)
        if system is not None:
            large, every = system.boundaries()
            cuts.append(large + start)
            hints.append(every + start)
            if sparsify:
                free.append(system.free() + start)
    together = np.concatenate(free)
    return Special(
        np.unique(np.concatenate(cuts)),
        np.unique(np.concatenate(hints)),
        together[np.argsort(together[:, 0], kind="stable")],
    )


def _partitions(disk: Disk) -> Iterator[tuple[int, int]]:
    """(start, end) of the whole disk and of each partition, in blocks of 4 KiB."""
    head = read_range(disk, 0, 8 * BLOCK)
    whole = disk.size_bytes // BLOCK
    yield 0, whole
    found: list[tuple[int, int]] = []
    if head[512:520] == b"EFI PART":
        at, count, size = (
            int.from_bytes(head[512 + a : 512 + b], "little") for a, b in ((72, 80), (80, 84), (84, 88))
        )
        if size in (128, 256) and at < 1 << 40:
            table = read_range(disk, at * 512, min(count, 256) * size)
            for entry in range(0, len(table) - size + 1, size):
                first, last = (int.from_bytes(table[entry + a : entry + a + 8], "little") for a in (32, 40))
                found.append((first, last + 1))
    elif head[510:512] == b"\x55\xaa":
        for entry in range(446, 510, 16):
            first, count = (int.from_bytes(head[entry + a : entry + a + 4], "little") for a in (8, 12))
            found.append((first, first + count))
    end = 0
    for first, last in sorted(found):
        if first % 8 == 0 and max(end, 1) <= first // 8 < min(last // 8, whole):
            end = min(last // 8, whole)
            yield first // 8, end


class _Ext4:
    """One file system; blocks are counted from its start."""

    @classmethod
    def open(cls, disk: Disk, start: int, end: int) -> "_Ext4 | None":
        """None when there is none that this can read."""
        raw = read_range(disk, start * BLOCK + 1024, 1024)
        if len(raw) < 1024 or raw[0x38:0x3A] != b"\x53\xef":
            return None
        system = cls(disk, start, end, raw)
        return system if system._readable else None

    def __init__(self, disk: Disk, start: int, end: int, raw: bytes) -> None:
        def number(at: int, size: int = 4) -> int:
            return int.from_bytes(raw[at : at + size], "little")

        self._disk, self._start = disk, start
        incompatible, self.unclean = number(0x60), bool(number(0x60) & _RECOVER)
        wide = bool(incompatible & _64BIT)
        self._blocks = min(number(0x4) | (number(0x150) << 32 if wide else 0), end - start)
        self._group_blocks, self._group_inodes = number(0x20), number(0x28)
        self._inode_bytes = number(0x58, 2)
        self._descriptor_bytes = number(0xFE, 2) if wide else 32
        self._readable = (
            number(0x18) == 2
            and not incompatible & _META_BG
            and not number(0x64) & _BIGALLOC
            and number(0x14) == 0
            and self._group_blocks == 8 * BLOCK
            and 0 < self._group_inodes <= 8 * BLOCK
            and self._inode_bytes in (128, 256, 512, 1024)
            and self._descriptor_bytes in (32, 64)
        )

    def _groups(self) -> npt.NDArray[np.int64]:
        """Rows of (block bitmap, inode table, flags, unused inodes), one per block group."""
        count = min(-(-self._blocks // self._group_blocks), _MAX_GROUPS)
        size = self._descriptor_bytes
        raw = read_range(self._disk, (self._start + 1) * BLOCK, count * size)
        table = (
            np.frombuffer(raw, "<u2", len(raw) // size * (size // 2)).reshape(-1, size // 2).astype(np.int64)
        )

        def wide(low: int, high: int) -> npt.NDArray[np.int64]:
            value = table[:, low // 2] | table[:, low // 2 + 1] << 16
            return value | (
                table[:, high // 2] << 32 if size == 64 else 0
            )  # 2**48 blocks are more than allowed

        unused = table[:, 0x1C // 2] | (table[:, 0x32 // 2] << 16 if size == 64 else 0)
        return np.stack([wide(0x0, 0x20), wide(0x8, 0x28), table[:, 0x12 // 2], unused], axis=1)

    def boundaries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where extents start and end, in blocks: the larger ones of the larger files, and all."""
        found, count, read = [np.zeros((0, 3), np.int64)], 0, 0
        for _, table, flags, unused in self._groups().tolist():
            inodes = 0 if flags & 1 else self._group_inodes - min(unused, self._group_inodes)
            read += inodes * self._inode_bytes
            if read > _MAX_TABLE_BYTES or count > _MAX_CUTS:
                break
            if inodes and 0 < table < self._blocks:
                raw = read_range(self._disk, (self._start + table) * BLOCK, inodes * self._inode_bytes)
                found.append(self._extents(raw))
                count += len(found[-1])
        extents = np.concatenate(found)
        return extents[extents[:, 2] == 1, :2].ravel(), extents[:, :2].ravel()

    def _extents(self, raw: bytes) -> npt.NDArray[np.int64]:
        """Rows of (start, end, whether it is large) of the extents of the files in a stretch of the inode table."""
        table = np.frombuffer(raw, np.uint8, len(raw) // self._inode_bytes * self._inode_bytes)
        table = table.reshape(-1, self._inode_bytes)
        mode = table[:, 0:2].copy().view("<u2")[:, 0]
        links = table[:, 0x1A:0x1C].copy().view("<u2")[:, 0]
        size = table[:, 4:8].copy().view("<u4")[:, 0] + (
            table[:, 0x6C:0x70].copy().view("<u4")[:, 0].astype(np.int64) << 32
        )
        flags = table[:, 0x20:0x24].copy().view("<u4")[:, 0]
        chosen = (mode & 0xF000 == 0x8000) & (links > 0) & (size > 0) & (flags & 0x80000 != 0)
        nodes, large = np.ascontiguousarray(table[chosen, 0x28:0x64]), size[chosen] >= FILE_BYTES
        found = [np.zeros((0, 3), np.int64)]
        seen: set[int] = set()
        while len(nodes):
            header = nodes[:, :8].copy().view("<u2")
            entries = (nodes.shape[1] - 12) // 12
            good = (header[:, 0] == 0xF30A) & (header[:, 1] <= entries) & (header[:, 3] <= 5)
            body = np.ascontiguousarray(nodes[:, 12 : 12 + entries * 12])
            used = np.arange(entries) < header[:, 1:2]
            chosen = used & (good & (header[:, 3] == 0))[:, None]
            leaves = body.view(_LEAF)[chosen]
            length = leaves["length"].astype(np.int64)
            first = leaves["low"].astype(np.int64) | leaves["high"].astype(np.int64) << 32
            # Longer than 32768 means allocated, not written: nothing of the file is there.
            kept = (length >= 1) & (length <= 32768) & (first > 0) & (first + length <= self._blocks)
            cut = np.broadcast_to(large[:, None], chosen.shape)[chosen] & (length >= _MIN_EXTENT)
            found.append(np.stack([first, first + length, cut], axis=1)[kept])
            chosen = used & (good & (header[:, 3] > 0))[:, None]
            inner = body.view(_NODE)[chosen]
            below = inner["low"].astype(np.int64) | inner["high"].astype(np.int64) << 32
            below, first_use = np.unique(below, return_index=True)
            large = np.broadcast_to(large[:, None], chosen.shape)[chosen][first_use]
            fresh = np.array([0 < at < self._blocks and at not in seen for at in below.tolist()], np.bool_)
            below, large = below[fresh], large[fresh]
            seen.update(below.tolist())
            if len(seen) > _MAX_NODES:
                break
            pages = b"".join(
                read_range(self._disk, (self._start + at) * BLOCK, BLOCK) for at in below.tolist()
            )
            nodes = np.frombuffer(pages, np.uint8).reshape(-1, BLOCK)
        return np.concatenate(found)

    def free(self) -> npt.NDArray[np.int64]:
        """(start, end) of runs of free blocks."""
        if self.unclean:
            hint = "start and shut down the guest once, or run e2fsck on it"
            raise Invalid(
                "the file system was not unmounted cleanly: its free blocks are not known", hint=hint
            )
        found = [np.zeros((0, 2), np.int64)]
        for number, (bitmap, _, flags, _) in enumerate(self._groups().tolist()):
            first = number * self._group_blocks
            count = min(self._group_blocks, self._blocks - first)
            if flags & 2 or not 0 < bitmap < self._blocks:
                continue
            raw = read_range(self._disk, (self._start + bitmap) * BLOCK, BLOCK)
            bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=count, bitorder="little")
            found.append(np.array(runs(bits == 0), np.int64).reshape(-1, 2) + first)
        return np.concatenate(found)
