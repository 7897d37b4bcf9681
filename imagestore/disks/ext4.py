"""What an ext2, ext3 or ext4 file system says: where its files lie, and which of its blocks are free.

Source: Linux, Documentation/filesystems/ext4. Where files lie is a hint: what is odd is left out, and with it the cuts
that it would have given. What is free is left out of an image, so it is believed only of a file system that was
unmounted cleanly, whose sums are right and with which all that is known of it agrees.
"""

import functools
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from imagestore.disks.chunker import runs
from imagestore.disks.disk import Disk, Doubt, read_range
from imagestore.disks.extents import FILE, LARGE, MAX_ROWS, OTHER, Numbers, Walk

_MAX_TABLE_BYTES, _STRETCH_BYTES = 2 << 30, 4 << 20
_MAX_GROUPS = 1 << 19
_AT_ONCE = 1024
_JOURNAL = 0x4
_RECOVER, _META_BG, _64BIT, _CSUM_SEED = 0x4, 0x10, 0x80, 0x2000
_GDT_CSUM, _BIGALLOC, _METADATA_CSUM, _ORPHANS = 0x10, 0x200, 0x400, 0x10000
_KNOWN_INCOMPATIBLE, _KNOWN_RO_COMPATIBLE = 0x3E7C2, 0xF77F
_BITMAP, _INODE_BITMAP, _INODE_TABLE = (0x0, 0x20), (0x4, 0x24), (0x8, 0x28)
_CRC32C, _CRC16 = 0x82F63B78, 0xA001


class Ext4:
    """One file system in a stretch of a disk; blocks are its own, counted from its start."""

    @classmethod
    def open(cls, disk: Disk, start: int, end: int) -> Self | None:
        """None when there is none, or one whose numbers make no sense. Places in bytes of the disk."""
        raw = read_range(disk, start + 1024, 1024)
        if len(raw) < 1024 or raw[0x38:0x3A] != b"\x53\xef":
            return None
        system = cls(disk, start, end, raw)
        return system if system._readable else None

    def __init__(self, disk: Disk, start: int, end: int, raw: bytes) -> None:
        def number(at: int, size: int = 4) -> int:
            return int.from_bytes(raw[at : at + size], "little")

        self._disk, self._start, self._raw, self._number = disk, start, raw, number
        self._compatible, self._incompatible, self._ro_compatible = number(0x5C), number(0x60), number(0x64)
        wide, dynamic = bool(self._incompatible & _64BIT), number(0x4C) > 0
        scale = min(number(0x18), 7)
        self.block_bytes = 1024 << scale
        self._ratio_bits = number(0x1C) - number(0x18) if self._ro_compatible & _BIGALLOC else 0
        self.claimed_bytes = (number(0x4) | (number(0x150) << 32 if wide else 0)) * self.block_bytes
        """How large it is by its own word."""
        self._blocks = min(self.claimed_bytes, end - start) // self.block_bytes
        self._fits = self.claimed_bytes <= end - start
        self._first, self._group_inodes = number(0x14), number(0x28)
        self._group_clusters = number(0x24 if self._ro_compatible & _BIGALLOC else 0x20)
        self._inode_bytes = number(0x58, 2) if dynamic else 128
        self._descriptor_bytes = number(0xFE, 2) if wide else 32
        self._summed = bool(self._ro_compatible & (_GDT_CSUM | _METADATA_CSUM))
        most = 8 * self.block_bytes
        self._readable = (
            scale <= 6
            and not self._incompatible & _META_BG
            and 0 <= self._ratio_bits <= 16
            and self._first == (self.block_bytes == 1024 and not self._ro_compatible & _BIGALLOC)
            and 8 <= self._group_clusters <= most
            and self._group_clusters % 8 == 0
            and 0 < self._group_inodes <= most
            and self._inode_bytes in (128, 256, 512, 1024, 2048, 4096)
            and self._inode_bytes <= self.block_bytes
            and self._descriptor_bytes in (32, 64)
            and self._blocks > self._first
        )
        self._group_blocks = self._group_clusters << max(self._ratio_bits, 0)
        self._descriptors_at = 1024 // self.block_bytes + 1
        self._groups = min(-(-(self._blocks - self._first) // max(self._group_blocks, 1)), _MAX_GROUPS)

    def boundaries(self) -> tuple[Numbers, Numbers]:
        """Where extents of files start and end, in bytes of the disk: the larger ones of the larger files, and all."""
        rows = self._walked.rows
        large, every = rows[rows[:, 2] == LARGE, :2], rows[rows[:, 2] >= FILE, :2]
        return large.ravel() * self.block_bytes + self._start, every.ravel() * self.block_bytes + self._start

    def free(self) -> Numbers:
        """(start, end) of runs of free blocks, in bytes of the disk. Raises Doubt unless all speaks for them."""
        for reason in self._reasons():
            raise Doubt(reason)
        found = self._free_blocks()
        metadata, rows = self._metadata(), self._walked.rows
        if not self._walked.whole:
            raise Doubt("some of its inodes cannot be followed")
        if _overlap(found, metadata):
            raise Doubt("its bitmaps call blocks of its own metadata free: run e2fsck on it")
        if _overlap(found, rows):
            raise Doubt("its bitmaps call blocks of files free: run e2fsck on it")
        return found * self.block_bytes + self._start

    def _reasons(self) -> Iterator[str]:
        """What the superblock, the journal and the descriptors say against it."""
        number = self._number
        orphans = number(0xE8) or self._ro_compatible & _ORPHANS
        if self._incompatible & _RECOVER or number(0x3A, 2) & 1 == 0 or orphans:
            yield "it was not unmounted cleanly: start and shut down the guest once, or run e2fsck on it"
        if number(0x3A, 2) & 7 != 1:
            yield "it is marked as having errors: run e2fsck on it"
        if self._incompatible & ~_KNOWN_INCOMPATIBLE or self._ro_compatible & ~_KNOWN_RO_COMPATIBLE:
            yield "it has features that sf does not know"
        if number(0x5A, 2) != 0 or number(0) != self._groups * self._group_inodes:
            yield "its superblock is a copy, or does not fit it"
        if not self._fits or self._groups == _MAX_GROUPS:
            yield "it is larger than the place where it lies"
        if self._ro_compatible & _METADATA_CSUM:
            right = _sums(np.frombuffer(self._raw[:0x3FC], np.uint8)[None], 0xFFFFFFFF, _CRC32C)
            if self._raw[0x175] != 1 or int(right[0]) != number(0x3FC):
                yield "the sum of its superblock is wrong: run e2fsck on it"
        if self._compatible & _JOURNAL and not self._journal_is_empty():
            yield "its journal is not empty, or elsewhere"
        if self._summed and not self._descriptors_are_right():
            yield "a group descriptor's sum is wrong: run e2fsck on it"

    # The groups

    @functools.cached_property
    def _tables(self) -> npt.NDArray[np.uint8]:
        """The group descriptors, one row each."""
        size, at = self._descriptor_bytes, self._start + self._descriptors_at * self.block_bytes
        raw = read_range(self._disk, at, self._groups * size)
        return np.frombuffer(raw, np.uint8, len(raw) // size * size).reshape(-1, size)

    def _column(self, low: int, high: int | None = None) -> Numbers:
        """A field of each descriptor; its upper 16 or 32 bits lie behind the first 32 bytes."""
        kind, shift = ("<u4", 32) if low < 0xC else ("<u2", 16)
        rows, size = self._tables, int(kind[-1])
        value = rows[:, low : low + size].copy().view(kind)[:, 0].astype(np.int64)
        if high is not None and self._descriptor_bytes == 64:
            value |= rows[:, high : high + size].copy().view(kind)[:, 0].astype(np.int64) << shift
        return value

    def _metadata(self) -> Numbers:
        """(start, end) of blocks that hold no file: the superblock, descriptors, bitmaps, inode tables."""
        inodes = -(-self._group_inodes * self._inode_bytes // self.block_bytes)
        head = self._descriptors_at + -(-len(self._tables) * self._descriptor_bytes // self.block_bytes)
        found = [np.array([[self._first, head]])]
        for field, length in ((_BITMAP, 1), (_INODE_BITMAP, 1), (_INODE_TABLE, inodes)):
            at = self._column(*field)
            found.append(np.stack([at, at + length], axis=1))
        return np.concatenate(found)

    def _free_blocks(self) -> Numbers:
        """(start, end) of the runs of free blocks by the bitmaps; Doubt where they are not what was summed."""
        bitmaps, flags = self._column(*_BITMAP), self._column(0x12)
        told, sums = self._column(0xC, 0x2C), self._column(0x18, 0x38)
        wide = self._descriptor_bytes == 64
        found, count = [np.zeros((0, 2), np.int64)], 0
        # A group whose bitmap was never written is all free but for metadata: nothing of it is worth leaving out.
        (groups,) = np.nonzero(flags & 2 == 0)
        for some in np.split(groups, range(_AT_ONCE, len(groups), _AT_ONCE)):
            if not ((bitmaps[some] > 0) & (bitmaps[some] < self._blocks)).all():
                raise Doubt("a block bitmap lies outside of it")
            raw = np.stack([np.frombuffer(self._read(at), np.uint8) for at in bitmaps[some].tolist()])
            raw = raw[:, : self._group_clusters // 8]
            if self._ro_compatible & _METADATA_CSUM:
                right = _sums(raw, self._seed, _CRC32C).astype(np.int64)
                if (right & (0xFFFFFFFF if wide else 0xFFFF) != sums[some]).any():
                    raise Doubt("the sum of a block bitmap is wrong: run e2fsck on it")
            for group, bits in zip(some.tolist(), raw, strict=True):
                first = self._first + group * self._group_blocks
                blocks = min(self._group_blocks, self._blocks - first)
                clusters = -(-blocks // (1 << self._ratio_bits))
                unused = np.unpackbits(bits, count=clusters, bitorder="little") == 0
                if int(unused.sum()) != told[group]:
                    raise Doubt("a group counts other blocks as free than its bitmap: run e2fsck on it")
                ends = np.array(runs(unused), np.int64).reshape(-1, 2) << self._ratio_bits
                found.append(np.minimum(ends, blocks) + first)
                count += len(ends)
                if count > MAX_ROWS:  # bitmaps that groups share cost a stranger nothing
                    raise Doubt("its free blocks lie in too many pieces")
        return np.concatenate(found)

    @functools.cached_property
    def _seed(self) -> int:
        if self._incompatible & _CSUM_SEED:
            return self._number(0x270)
        return int(_sums(np.frombuffer(self._raw[0x68:0x78], np.uint8)[None], 0xFFFFFFFF, _CRC32C)[0])

    def _descriptors_are_right(self) -> bool:
        rows = self._tables
        numbers = np.arange(len(rows), dtype="<u4")[:, None].view(np.uint8)
        told = self._column(0x1E)
        if self._ro_compatible & _METADATA_CSUM:
            parts = [numbers, rows[:, :0x1E], np.zeros((len(rows), 2), np.uint8), rows[:, 0x20:]]
            right = _sums(np.concatenate(parts, axis=1), self._seed, _CRC32C) & np.uint32(0xFFFF)
        else:
            uuid = np.broadcast_to(np.frombuffer(self._raw[0x68:0x78], np.uint8), (len(rows), 16))
            parts = [uuid, numbers, rows[:, :0x1E], rows[:, 0x20:]]
            right = _sums(np.concatenate(parts, axis=1), 0xFFFF, _CRC16)
        return len(rows) == self._groups and bool((right == told).all())

    # The inodes

    @functools.cached_property
    def _walked(self) -> Walk:
        walk = self._walk()
        flags = self._column(0x12)
        columns = (self._column(*_INODE_BITMAP), self._column(*_INODE_TABLE), flags, self._column(0x1C, 0x32))
        read = 0
        for group, (bitmap, table, flag, unused) in enumerate(np.stack(columns, axis=1).tolist()):
            if not self._summed and (flag & 3 or unused):
                walk.whole = False  # the kernel would not look at either
            inodes = 0 if flag & 1 else self._group_inodes - min(unused, self._group_inodes)
            length = inodes * self._inode_bytes
            read += length
            if read > _MAX_TABLE_BYTES or walk.count > MAX_ROWS:
                walk.whole = False
                break
            if not inodes:
                continue
            if not (0 < table <= self._blocks - -(-length // self.block_bytes) and 0 < bitmap < self._blocks):
                walk.whole = False
                continue
            bits = np.frombuffer(self._read(bitmap), np.uint8)
            used = np.unpackbits(bits, count=inodes, bitorder="little").astype(np.bool_)
            step = _STRETCH_BYTES // self._inode_bytes
            for at in range(0, inodes, step):
                place, some = table * self.block_bytes + at * self._inode_bytes, used[at : at + step]
                raw = read_range(self._disk, self._start + place, len(some) * self._inode_bytes)
                walk.table(raw, group * self._group_inodes + 1 + at, some)
        return walk

    def _walk(self) -> Walk:
        return Walk(self._read, self._blocks, self.block_bytes, self._inode_bytes)

    def _journal_is_empty(self) -> bool:
        """By its superblock (jbd2): nothing is left to be replayed."""
        group, at = divmod(self._number(0xE0) - 1, self._group_inodes)
        if not 0 <= group < len(self._tables):
            return False
        place = int(self._column(*_INODE_TABLE)[group]) * self.block_bytes + at * self._inode_bytes
        walk = self._walk()
        walk.table(read_range(self._disk, self._start + place, self._inode_bytes), 0, np.ones(1, np.bool_))
        rows = walk.rows
        of_file = rows[rows[:, 2] != OTHER]
        if not len(rows):
            return False
        head = self._read(int((of_file if len(of_file) else rows)[0, 0]))
        return head[:4] == b"\xc0\x3b\x39\x98" and head[0x1C:0x20] == bytes(4)

    def _read(self, block: int) -> bytes:
        """A block; one beyond the end is zeros."""
        raw = read_range(self._disk, self._start + block * self.block_bytes, self.block_bytes)
        return raw.ljust(self.block_bytes, b"\0")


def _overlap(free: Numbers, used: Numbers) -> bool:
    """Whether any (start, end, …) of `used` reaches into the sorted runs of `free`."""
    if not len(free) or not len(used):
        return False
    at = np.minimum(np.searchsorted(free[:, 1], used[:, 0], side="right"), len(free) - 1)
    return bool(((free[at, 0] < used[:, 1]) & (free[at, 1] > used[:, 0])).any())


def _sums(rows: npt.NDArray[np.uint8], seed: int, polynomial: int) -> npt.NDArray[np.uint32]:
    """The CRC (reflected, not inverted at its end) of each row, all rows at once."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(polynomial), table >> 1)
    value: npt.NDArray[Any] = np.full(len(rows), seed, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        value = table[(value ^ column) & 0xFF] ^ value >> 8
    return value
