"""Where the inodes of an ext2, ext3 or ext4 file system have their blocks: extent trees, block maps, attributes.

Source: Linux, Documentation/filesystems/ext4 (inodes, ifork). Nothing here trusts the disk: what is odd is left out,
and `whole` says that something was.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
FILE_BYTES = 32 << 10  # files from this size on start and end a chunk
OTHER, FILE, LARGE = 0, 1, 2
"""What an extent is of: no file's bytes (or not written), a file's, a large file's."""
_AT_ONCE_BYTES, _MAX_BYTES, MAX_ROWS = 4 << 20, 1 << 30, 1 << 24
"""Of nodes, and of extents: of a file system that has more not all is known."""
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
        self.count = self._read_bytes = 0
        self.whole = True  # whether nothing was odd or left out

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
        pointers = forks[holds & mapped & ~trees].view("<u4").astype(np.int64)
        self._add_blocks(pointers[:, :12].ravel())
        for level in (1, 2, 3):
            self._maps(pointers[:, 11 + level], level)

    def _trees(self, nodes: npt.NDArray[np.uint8], kinds: Numbers, depths: Numbers | None = None) -> None:
        """depths: of each node, as its parent's says; None: these are roots."""
        header = nodes[:, :8].copy().view("<u2").astype(np.int64)
        entries, depth = (nodes.shape[1] - 12) // 12, header[:, 3]
        good = (header[:, 0] == 0xF30A) & (header[:, 1] <= entries)
        good &= depth <= 5 if depths is None else depth == depths
        self.whole &= bool(good.all())
        body = np.ascontiguousarray(nodes[:, 12 : 12 + entries * 12])
        present = np.arange(entries) < header[:, 1:2]
        chosen = present & (good & (depth == 0))[:, None]
        leaves, kind = body.view(_LEAF)[chosen], np.broadcast_to(kinds[:, None], chosen.shape)[chosen]
        length = leaves["length"].astype(np.int64)
        # Longer than 32768 means allocated, not written: nothing of the file is there.
        written = length <= 32768
        length = np.where(written, length, length - 32768)
        first = leaves["low"].astype(np.int64) | leaves["high"].astype(np.int64) << 32
        kind = np.where(written, kind, OTHER)
        kind = np.where(length * self._block_bytes >= FILE_BYTES, kind, np.minimum(kind, FILE))
        self._add(first, length, kind)
        chosen = present & (good & (depth > 0))[:, None]
        inner = body.view(_NODE)[chosen]
        below = inner["low"].astype(np.int64) | inner["high"].astype(np.int64) << 32
        self._add_blocks(below)
        kinds, depths = (np.broadcast_to(of[:, None], chosen.shape)[chosen] for of in (kinds, depth - 1))
        for some, raw in self._nodes(below):
            self._trees(raw, kinds[some], depths[some])

    def _maps(self, blocks: Numbers, level: int) -> None:
        """Blocks of numbers of blocks, `level` deep; those of level 0 are the file's."""
        self._add_blocks(blocks)
        for _, raw in self._nodes(blocks) if level else ():
            self._maps(raw.view("<u4").astype(np.int64).ravel(), level - 1)

    def _nodes(self, blocks: Numbers) -> Iterator[tuple[Numbers, npt.NDArray[np.uint8]]]:
        """Which of these blocks, and what is in them: some at a time, until they are too many."""
        (inside,) = np.nonzero((blocks > 0) & (blocks < self._blocks))
        step = _AT_ONCE_BYTES // self._block_bytes
        for at in range(0, len(inside), step):
            some = inside[at : at + step]
            self._read_bytes += len(some) * self._block_bytes
            if self._read_bytes > _MAX_BYTES or self.count > MAX_ROWS:
                self.whole = False
                return
            raw = b"".join(self._read(block) for block in blocks[some].tolist())
            yield some, np.frombuffer(raw, np.uint8).reshape(-1, self._block_bytes)

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
