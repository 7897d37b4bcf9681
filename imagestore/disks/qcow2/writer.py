"""A deterministic qcow2 of an image: its metadata is computed, its data read from chunks; the same bytes every time.

Format: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt, version 3, 64 KiB clusters, no
compression. The file is: header, refcount table, refcount blocks, L1 table, L2 tables, then every cluster that
holds data, in disk order. Checksums of such files are published, so what this writes may only change under a new
number: `WRITER`.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagestore.formats.manifest import Manifest

WRITER = 1
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
_PER_L2 = CLUSTER // 8
_PER_REFCOUNT_BLOCK = CLUSTER // 2
_COPIED = 1 << 63
# magic, version, backing file offset and size, cluster bits, size, encryption, L1 size and offset, refcount table
# offset and clusters, snapshots and their offset, incompatible, compatible and autoclear features, refcount order,
# header length
QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


@dataclass(frozen=True, slots=True, eq=False)
class Qcow2:
    """What a qcow2 of one manifest looks like: `metadata`, then the guest's clusters `clusters` in order."""

    metadata: bytes
    clusters: npt.NDArray[np.int64]  # numbers of the guest's clusters that hold data, ascending

    @property
    def size_bytes(self) -> int:
        """Of the qcow2 file."""
        return len(self.metadata) + len(self.clusters) * CLUSTER

    def segments(self, start: int, length: int) -> list[bytes | tuple[int, int]]:
        """What bytes `start` to `start + length` of the file are, in order: these, or (offset, length) of the disk.

        The last of those may reach past the disk's end, where zeros are.
        """
        end = min(start + length, self.size_bytes)
        found: list[bytes | tuple[int, int]] = []
        if start < len(self.metadata):
            found.append(self.metadata[start:end])
            start = len(self.metadata)
        while start < end:
            at = start - len(self.metadata)
            first, inner = divmod(at, CLUSTER)
            last = (end - len(self.metadata) - 1) // CLUSTER
            steps = np.flatnonzero(np.diff(self.clusters[first : last + 1]) != 1)
            count = int(steps[0]) + 1 if len(steps) else last + 1 - first
            size = min(count * CLUSTER - inner, end - start)
            found.append((int(self.clusters[first]) * CLUSTER + inner, size))
            start += size
        return found


def _cluster_numbers(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Clusters of the disk that any chunk touches."""
    if not len(manifest.lengths):
        return np.zeros(0, np.int64)
    offsets = manifest.offsets
    first = offsets // CLUSTER
    last = (offsets + manifest.lengths - 1) // CLUSTER
    spans = (last - first + 1).astype(np.int64)
    inner = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
    return np.unique(np.repeat(first, spans) + inner)


def plan(manifest: Manifest) -> Qcow2:
    """The qcow2 of an image."""
    return qcow2_of(manifest.size_bytes, _cluster_numbers(manifest))


def qcow2_of(
    size_bytes: int, clusters: npt.NDArray[np.int64], extensions: bytes = b"", backing: bytes = b""
) -> Qcow2:
    """One whose `clusters` hold data. What it names as its backing, behind the extensions, fits in a cluster."""
    l1_entries = max(1, -(-size_bytes // (CLUSTER * _PER_L2)))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    tables = np.unique(clusters // _PER_L2)
    fixed = 1 + l1_clusters + len(tables) + len(clusters)
    blocks = table_clusters = 1
    while True:  # refcounts count their own clusters too
        total = fixed + blocks + table_clusters
        need = -(-total // _PER_REFCOUNT_BLOCK)
        need_table = -(-need * 8 // CLUSTER)
        if (need, need_table) == (blocks, table_clusters):
            break
        blocks, table_clusters = max(blocks, need), max(table_clusters, need_table)
    block_at = 1 + table_clusters
    l1_at = block_at + blocks
    l2_at = l1_at + l1_clusters
    data_at = l2_at + len(tables)

    # qemu knows disks of whole sectors only, as `qemu-img convert` it rounds up.
    first = QCOW2_HEADER.pack(
        b"QFI\xfb", 3, QCOW2_HEADER.size + len(extensions) if backing else 0, len(backing), CLUSTER_BITS,
        -(-size_bytes // 512) * 512, 0, l1_entries, l1_at * CLUSTER,
        CLUSTER, table_clusters, 0, 0, 0, 0, 0, 4, QCOW2_HEADER.size,
    ) + extensions + backing  # fmt: skip
    refcount_table = np.zeros(table_clusters * _PER_L2, ">u8")
    refcount_table[:blocks] = (block_at + np.arange(blocks)) * CLUSTER
    refcounts = np.zeros(blocks * _PER_REFCOUNT_BLOCK, ">u2")
    refcounts[:total] = 1
    l1 = np.zeros(l1_clusters * _PER_L2, ">u8")
    l1[tables] = ((l2_at + np.arange(len(tables))) * CLUSTER).astype(np.uint64) | np.uint64(_COPIED)
    l2 = np.zeros(len(tables) * _PER_L2, ">u8")
    at = np.searchsorted(tables, clusters // _PER_L2) * _PER_L2 + clusters % _PER_L2
    l2[at] = ((data_at + np.arange(len(clusters))) * CLUSTER).astype(np.uint64) | np.uint64(_COPIED)
    # A zero after the header's last field ends the (empty) list of header extensions.
    tables_bytes = (table.tobytes() for table in (refcount_table, refcounts, l1, l2))
    return Qcow2(b"".join((first.ljust(CLUSTER, b"\0"), *tables_bytes)), clusters)
