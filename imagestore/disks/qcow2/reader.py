"""Our own reader of qcow2, versions 2 and 3 (QEMU, docs/interop/qcow2.rst): no qemu on an untrusted file.

Reads the active layer of images with plain, zero, zlib- and zstd-compressed clusters. Refused: backing files,
external data files, encryption, subclusters (extended L2 entries), unclean or corrupt images.
Only tables that are looked at are read; every offset is checked against the file.
"""

import os
import struct
import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import zstandard
from isal import isal_zlib
from isal.igzip_lib import IsalError

from imagestore.disks.disk import read_exactly
from imagestore.errors import Invalid

_OFFSET = np.uint64(0x00FFFFFFFFFFFE00)
_COMPRESSED = np.uint64(1 << 62)
_ZERO = np.uint64(1)
_MAX_L1_BYTES = 32 << 20
_MAX_DISK_BYTES = 64 << 40
_ZSTD = 1
_INCOMPATIBLE = {
    0: ("was not closed cleanly", "`qemu-img check -r all` repairs it"),
    1: ("is marked as corrupt", "`qemu-img check -r all` may repair it"),
    2: ("keeps its data in an external file", "convert it with qemu-img first"),
    4: ("uses subclusters (extended L2 entries)", "convert it with qemu-img first"),
}


class Qcow2:
    """Random read access to the guest's disk; thread-safe, holds no more than a few tables in memory."""

    def __init__(self, descriptor: int, what: str) -> None:
        self._descriptor, self._what = descriptor, what
        self._file_bytes = os.fstat(descriptor).st_size
        self._zstd = False
        header = os.pread(descriptor, 112, 0)
        if len(header) < 72:
            raise Invalid(f"{what} is cut short: it has no whole qcow2 header")
        (magic, version, backing, _, bits, size, crypt, l1_entries, l1_offset) = struct.unpack_from(
            ">4sIQIIQIIQ", header
        )
        if magic != b"QFI\xfb" or version not in (2, 3):
            raise Invalid(f"{what} is no qcow2 image of version 2 or 3")
        if version == 3:
            self._check_features(header)
        if backing:
            raise self._refuse("has a backing file", "flatten it with qemu-img convert first")
        if crypt:
            raise self._refuse("is encrypted", "decrypt it first")
        if not 9 <= bits <= 21:
            raise self._refuse(f"has clusters of 2**{bits} bytes")
        if size > _MAX_DISK_BYTES:
            raise self._refuse(f"has a virtual size of {size >> 40} TiB; 64 TiB are allowed")
        self.size_bytes: int = size
        self._version = version
        self._cluster = 1 << bits
        self._per_table = self._cluster // 8
        self._offset_bits = np.uint64(62 - (bits - 8))
        needed = -(-size // (self._cluster * self._per_table))
        if l1_entries < needed or l1_entries * 8 > _MAX_L1_BYTES:
            raise self._refuse("has an L1 table of the wrong size")
        l1 = self._table(l1_offset, needed) & _OFFSET
        self._l1 = l1
        self._tables = np.flatnonzero(l1)
        if len(np.unique(l1[self._tables])) != len(self._tables):
            raise self._refuse("is corrupt: two L1 entries share one L2 table")
        self._l2 = lru_cache(maxsize=16)(self._read_l2)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The first run of allocated, non-zero clusters, ending at the latest with its L2 table."""
        if offset >= self.size_bytes:
            return None
        index, at = divmod(offset // self._cluster, self._per_table)
        for table in self._tables[np.searchsorted(self._tables, index) :].tolist():
            data = self._l2(table) != 0
            first = at if table == index else 0
            found = first + int(data[first:].argmax()) if first < len(data) else len(data)
            if found < len(data) and data[found]:
                holes = np.flatnonzero(~data[found:])
                end = found + int(holes[0]) if len(holes) else len(data)
                base = table * self._per_table
                start = max((base + found) * self._cluster, offset)
                stop = min((base + end) * self._cluster, self.size_bytes)
                return (start, stop) if start < stop else None
        return None

    def read(self, offset: int, out: memoryview) -> None:
        """Plain clusters that adjoin in the file are one pread; compressed ones are expanded one by one."""
        done = 0
        while done < len(out):
            number, inside = divmod(offset + done, self._cluster)
            table, at = divmod(number, self._per_table)
            entries = self._l2(table)
            entry = int(entries[at])
            if entry & int(_COMPRESSED):
                plain = self._expand(entry)
                count = min(self._cluster - inside, len(out) - done)
                out[done : done + count] = plain[inside : inside + count]
            else:
                wanted = -(-(inside + len(out) - done) // self._cluster)
                run = entries[at : at + wanted]
                steps = np.flatnonzero(np.diff(run.astype(np.int64)) != self._cluster)
                clusters = int(steps[0]) + 1 if len(steps) else len(run)
                count = min(clusters * self._cluster - inside, len(out) - done)
                if entry:
                    read_exactly(self._descriptor, entry + inside, out[done : done + count], self._what)
                else:
                    out[done : done + count] = bytes(count)
            done += count

    def _expand(self, entry: int) -> bytes:
        """A compressed cluster: bits 0 to x-1 the host offset, the rest how many more sectors it reaches into."""
        bits = int(self._offset_bits)
        host = entry & ((1 << bits) - 1)
        sectors = (entry & ((1 << 62) - 1)) >> bits
        data = os.pread(self._descriptor, (sectors + 1) * 512 - host % 512, host)
        try:
            if self._zstd:
                claimed = zstandard.frame_content_size(data)
                if claimed > self._cluster:
                    raise Invalid(f"{self._what} is corrupt: a compressed cluster is too large")
                plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=self._cluster)
            else:
                plain = isal_zlib.decompressobj(wbits=-15).decompress(data, self._cluster)
        except (zstandard.ZstdError, IsalError, zlib.error) as error:  # type: ignore[misc]  # its stub is wrong
            raise Invalid(f"{self._what} is corrupt: a compressed cluster does not decompress") from error
        if len(plain) != self._cluster:
            raise Invalid(f"{self._what} is corrupt or cut short: a compressed cluster is too small")
        return plain

    def _read_l2(self, table: int) -> npt.NDArray[np.uint64]:
        """One L2 table: 0 where the guest reads zeros, a plain host offset, or the entry of a compressed cluster."""
        if not self._l1[table]:
            return np.zeros(self._per_table, np.uint64)
        raw = self._table(int(self._l1[table]), self._per_table)
        packed = (raw & _COMPRESSED) != 0
        plain = raw & _OFFSET
        if self._version == 3:
            plain[(raw & _ZERO) != 0] = 0
        if (plain[~packed] % np.uint64(self._cluster)).any():
            raise self._refuse("is corrupt: a cluster's offset is not aligned")
        entries = np.where(packed, raw & ~np.uint64(1 << 63), plain)
        used = entries[entries != 0]
        hosts = np.where(used & _COMPRESSED, used & np.uint64((1 << int(self._offset_bits)) - 1), used)
        if len(hosts) and int(hosts.max()) >= self._file_bytes:
            raise self._refuse("is cut short or corrupt: a cluster lies past its end")
        if len(np.unique(hosts)) != len(hosts):
            raise self._refuse("is corrupt: two clusters of the disk share one place")
        return entries

    def _table(self, offset: int, entries: int) -> npt.NDArray[np.uint64]:
        """A big-endian table of the file."""
        if not entries:  # of a disk of no bytes, wherever it is said to be
            return np.zeros(0, np.uint64)
        if offset % self._cluster or not 0 < offset <= self._file_bytes - entries * 8:
            raise self._refuse("is cut short or corrupt: a table lies past its end")
        data = os.pread(self._descriptor, entries * 8, offset)
        if len(data) != entries * 8:
            raise self._refuse("is cut short: a table is not whole")
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def _check_features(self, header: bytes) -> None:
        if len(header) < 104:
            raise self._refuse("is cut short: it has no whole header")
        incompatible, _, _, _, length = struct.unpack_from(">QQQII", header, 72)
        for bit in range(64):
            if incompatible >> bit & 1 and bit != 3:
                reason, hint = _INCOMPATIBLE.get(bit, (f"needs feature {bit}, which is unknown", ""))
                raise self._refuse(reason, hint)
        kind = header[104] if length > 104 and len(header) > 104 else 0
        if kind > _ZSTD or bool(kind) != bool(incompatible >> 3 & 1):
            raise self._refuse("is compressed in an unknown way")
        self._zstd = kind == _ZSTD

    def _refuse(self, reason: str, hint: str = "") -> Invalid:
        return Invalid(f"{self._what} {reason}", hint=hint)
