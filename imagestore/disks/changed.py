"""A disk that was an image once: what must be looked at again, and what its manifest still says truly."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagestore.disks.disk import Disk
from imagestore.formats.chunking import BLOCK
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.groups import GROUP_BYTES
from imagestore.formats.manifest import Manifest


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What a disk was made from, and where it may have other bytes now."""

    base: Digest | None  # none: nothing, so all of it is to be looked at
    stretches: Numbers  # (start, end) rows in bytes


class ChangedDisk:
    """Of a disk only the groups with a change and, of chunks that reach into one, the rest; all else is a hole."""

    def __init__(self, disk: Disk, base: Manifest, stretches: Numbers) -> None:
        self._disk, self.size_bytes = disk, disk.size_bytes
        if disk.size_bytes != base.size_bytes:  # a group at the end, or a chunk, was cut short there
            stretches = np.concatenate([stretches, [(base.size_bytes - 1, base.size_bytes)]])
        steps = np.zeros(-(-disk.size_bytes // GROUP_BYTES) + 1, np.int64)
        np.add.at(steps, stretches[:, 0] // GROUP_BYTES, 1)
        np.add.at(steps, np.minimum(-(-stretches[:, 1] // GROUP_BYTES), len(steps) - 1), -1)
        touched = np.cumsum(steps) > 0
        self.groups: frozenset[int] = frozenset(np.flatnonzero(touched).tolist())
        """Numbers of the groups with a change."""
        edges = np.flatnonzero(np.diff(touched.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        starts, ends = np.minimum(edges.T.astype(np.int64) * GROUP_BYTES, disk.size_bytes)
        first = base.offsets
        last = first + base.lengths
        at = np.searchsorted(ends, first, "right")
        near = np.append(starts, np.iinfo(np.int64).max)
        self.kept: npt.NDArray[np.bool_] = near[at] >= last
        """By chunk of the base: whether the disk has it still."""
        lows, highs = np.append(first, disk.size_bytes), np.insert(last, 0, 0)
        self._starts = np.minimum(starts, lows[np.searchsorted(last, starts, "right")])
        self._ends = np.minimum(np.maximum(ends, highs[np.searchsorted(first, ends)]), disk.size_bytes)
        self.hints: Numbers = first // BLOCK
        """Where a chunk of the base begins, in blocks: what did not change is cut as before."""

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """As the disk's, inside what must be looked at."""
        while (at := int(np.searchsorted(self._ends, offset, "right"))) < len(self._ends):
            start, end = max(int(self._starts[at]), offset), int(self._ends[at])
            found = self._disk.next_data(start)
            if found is None:
                return None
            if found[0] < end:
                return found[0], min(found[1], end)
            offset = found[0]
        return None

    def read(self, offset: int, out: memoryview) -> None:
        """The disk's bytes."""
        self._disk.read(offset, out)
