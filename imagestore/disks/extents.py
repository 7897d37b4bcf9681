"""Where the inodes of an ext2, ext3 or ext4 file system have their blocks: extent trees, block maps, attributes.

Source: Linux, Documentation/filesystems/ext4 (inodes, ifork). Nothing here trusts the disk: what is odd is left out,
and `whole` says that something was.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

FILE_BYTES = 32 << 10
"""Files from this size on start and end a chunk."""
OTHER, FILE, LARGE = 0, 1, 2
"""What an extent is of: no file's bytes (or not written), a file's, a large file's."""
_MAX_NODES = 1 << 17
_RESERVED = 11
_EXTENTS, _INLINE = 0x80000, 0x10000000
_FILE, _DIRECTORY, _LINK = 0x8000, 0x4000, 0xA000
_LEAF = np.dtype([("block", "<u4"), ("length", "<u2"), ("high", "<u2"), ("low", "<u4")])
_NODE = np.dtype([("block", "<u4"), ("low", "<u4"), ("high", "<u2"), ("unused", "<u2")])


class Walk:
    """Collects `rows` of (start, end, kind), in blocks of the file system, from stretches of its inode tables."""

    def __init__(self, read: Callable[[int], bytes], blocks: int, block_bytes: int, inode_bytes: int) -> None:
        """read: a block by its number. blocks: how many there are."""
        self._read, self._blocks, self._block_bytes = read, blocks, block_bytes
        self._inode_bytes = inode_bytes
        self._found = [np.zeros((0, 3), np.int64)]
        self.count = 0
        self.whole = True
        """Whether nothing was odd or left out."""

    @property
    def rows(self) -> Numbers:
        """All that was found, each inode's in the order of its blocks unless its tree is deeper than one."""
        return np.concatenate(self._found)

    def table(self, raw: bytes, first: int, used: npt.NDArray[np.bool_]) -> None:
        """Add a stretch of the inode table: from inode number `first` on; `used`: whether the bitmap has each."""
        table = np.frombuffer(raw, np.uint8, len(raw) // self._inode_bytes * self._inode_bytes)
        table = table.reshape(-1, self._inode_bytes)

        def field(at: int, kind: str) -> Numbers:
            return table[:, at : at + int(kind[-1])].copy().view(kind)[:, 0].astype(np.int64)

        mode, links, flags = field(0, "<u2") & 0xF000, field(0x1A, "<u2"), field(0x20, "<u4")
        size = field(4, "<u4") | field(0x6C, "<u4") << 32
        reserved = np.arange(first, first + len(table)) < _RESERVED
        live = (links > 0) | used[: len(table)] | reserved
        attributes = field(0x68, "<u4") | field(0x76, "<u2") << 32
        self._add_blocks(attributes[live & (attributes > 0)])
        holds = live & (flags & _INLINE == 0)
        mapped = (mode == _FILE) | (mode == _DIRECTORY) | ((mode == _LINK) & (size >= 60)) | reserved
        forks = np.ascontiguousarray(table[:, 0x28:0x64])
        file = (mode == _FILE) & (links > 0) & (size > 0)
        kind = np.where(file, np.where(size >= FILE_BYTES, LARGE, FILE), OTHER)
        trees = holds & (flags & _EXTENTS != 0)
        self._trees(forks[trees], kind[trees])
        self._maps(forks[holds & mapped & ~trees])

    def _trees(self, nodes: npt.NDArray[np.uint8], kinds: Numbers) -> None:
        seen: set[int] = set()
        while len(nodes):
            header = nodes[:, :8].copy().view("<u2")
            entries = (nodes.shape[1] - 12) // 12
            good = (header[:, 0] == 0xF30A) & (header[:, 1] <= entries) & (header[:, 3] <= 5)
            self.whole &= bool(good.all())
            body = np.ascontiguousarray(nodes[:, 12 : 12 + entries * 12])
            present = np.arange(entries) < header[:, 1:2]
            chosen = present & (good & (header[:, 3] == 0))[:, None]
            leaves, kind = body.view(_LEAF)[chosen], np.broadcast_to(kinds[:, None], chosen.shape)[chosen]
            length = leaves["length"].astype(np.int64)
            # Longer than 32768 means allocated, not written: nothing of the file is there.
            written = length <= 32768
            length = np.where(written, length, length - 32768)
            first = leaves["low"].astype(np.int64) | leaves["high"].astype(np.int64) << 32
            kind = np.where(written, kind, OTHER)
            kind = np.where(length * self._block_bytes >= FILE_BYTES, kind, np.minimum(kind, FILE))
            self._add(first, length, kind)
            chosen = present & (good & (header[:, 3] > 0))[:, None]
            inner = body.view(_NODE)[chosen]
            below = inner["low"].astype(np.int64) | inner["high"].astype(np.int64) << 32
            self._add_blocks(below)
            below, first_use = np.unique(below, return_index=True)
            kinds = np.broadcast_to(kinds[:, None], chosen.shape)[chosen][first_use]
            fresh = np.array([0 < at < self._blocks and at not in seen for at in below.tolist()], np.bool_)
            below, kinds = below[fresh], kinds[fresh]
            seen.update(below.tolist())
            if len(seen) > _MAX_NODES:
                self.whole = False
                break
            nodes = self._read_all(below)

    def _maps(self, forks: npt.NDArray[np.uint8]) -> None:
        """Twelve blocks, and one block each of numbers of blocks, of such blocks, and of such blocks again."""
        pointers = forks.view("<u4").astype(np.int64)
        self._add_blocks(pointers[:, :12].ravel())
        read = 0
        for level in (1, 2, 3):
            inner = pointers[:, 11 + level].ravel()
            for _ in range(level):
                self._add_blocks(inner)
                inner = np.unique(inner[(inner > 0) & (inner < self._blocks)])
                read += len(inner)
                if read > _MAX_NODES:
                    self.whole = False
                    return
                inner = self._read_all(inner).view("<u4").astype(np.int64).ravel()
            self._add_blocks(inner)

    def _read_all(self, blocks: Numbers) -> npt.NDArray[np.uint8]:
        pages = b"".join(self._read(at) for at in blocks.tolist())
        return np.frombuffer(pages, np.uint8).reshape(-1, self._block_bytes)

    def _add_blocks(self, blocks: Numbers) -> None:
        """Single blocks that are no file's; 0 is a hole."""
        blocks = blocks[blocks != 0]
        self._add(blocks, np.ones(len(blocks), np.int64), np.full(len(blocks), OTHER))

    def _add(self, first: Numbers, length: Numbers, kind: Numbers) -> None:
        good = (length >= 1) & (first > 0) & (first + length <= self._blocks)
        self.whole &= bool(good.all())
        if good.any():
            self._found.append(np.stack([first, first + length, kind], axis=1)[good])
            self.count += int(good.sum())
