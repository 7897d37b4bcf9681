"""Whether a VMDK, VDI or VHD file is all there: qemu reads what lies past the end of a cut one as zeros.

Sources: VMware's Virtual Disk Format 1.1 (hosted sparse extents), QEMU's block/vdi.c and block/vpc.c, Microsoft's
Virtual Hard Disk Image Format Specification. (VHDX's tables are checked by qemu, qcow2's by our reader.)
"""

import os
import struct

import numpy as np
import numpy.typing as npt

from imagestore.errors import Invalid

_SECTOR = 512
_MAX_TABLE_BYTES, _MAX_PER_TABLE = 64 << 20, 512  # the second is qemu's of a VMDK
_AT_END = (1 << 64) - 1
_COMPRESSED = 1 << 16
_FIXED = 2
_ZERO_GRAIN = 1
_NO_BLOCK = 0xFFFFFFFE  # from here on: never written, or discarded


def vhd_size(descriptor: int, what: str) -> int | None:
    """Bytes of the disk in a fixed VHD, which are all but its footer; None when the file is none."""
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, _SECTOR, max(size - _SECTOR, 0))
    if footer[:8] != b"conectix" or len(footer) < _SECTOR:
        return None
    disk: int = struct.unpack_from(">Q", footer, 48)[0]
    kind, sum_ = struct.unpack_from(">II", footer, 60)
    if sum_ != ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF or kind != _FIXED:
        hint = "qemu-img convert -f vpc -O qcow2 may read it"
        raise Invalid(f"{what} is a VHD image that is damaged or of another kind than fixed", hint=hint)
    if disk != size - _SECTOR:
        raise Invalid(f"{what} is no whole VHD image: it has {size - _SECTOR} bytes of {disk}")
    return disk


def check_whole(descriptor: int, what: str, format_: str) -> None:
    """Raise Invalid for a VMDK, VDI or VHDX image that has data or tables past the end of the file."""
    size = os.fstat(descriptor).st_size
    if format_ == "vhdx":  # qemu checks all but the last sector's end
        needed = -(-size // _SECTOR) * _SECTOR
    else:
        needed = (_vmdk if format_ == "vmdk" else _vdi)(descriptor, what)
    if needed > size:
        raise Invalid(f"{what} is cut short: it ends at byte {size}, its data at byte {needed}")


def _vmdk(descriptor: int, what: str) -> int:
    """Where the last grain ends."""
    head = os.pread(descriptor, _SECTOR, 0).ljust(_SECTOR, b"\0")
    if struct.unpack_from("<Q", head, 56)[0] == _AT_END:
        head = os.pread(descriptor, _SECTOR, max(os.fstat(descriptor).st_size - 2 * _SECTOR, 0))
        if len(head) < _SECTOR or head[:4] != b"KDMV":
            raise Invalid(f"{what} is cut short: it has no footer")
    flags, capacity, grain = struct.unpack_from("<IQQ", head, 8)
    per_table, directory_at = struct.unpack_from("<I8xQ", head, 44)
    if per_table > _MAX_PER_TABLE:
        raise Invalid(f"{what} has tables that are too large")
    directory = _numbers(descriptor, what, directory_at * _SECTOR, -(-capacity // max(grain * per_table, 1)))
    tables = np.unique(directory[directory > 0]).tolist()
    grains = [_numbers(descriptor, what, table * _SECTOR, per_table).max(initial=0) for table in tables]
    last = int(max(grains, default=0))
    if last <= _ZERO_GRAIN:
        return 0
    if not flags & _COMPRESSED:
        return (last + int(grain)) * _SECTOR
    marker = os.pread(descriptor, 12, last * _SECTOR).ljust(12, b"\0")
    return last * _SECTOR + 12 + int(struct.unpack_from("<I", marker, 8)[0])


def _vdi(descriptor: int, what: str) -> int:
    """Where the last block ends."""
    head = os.pread(descriptor, _SECTOR, 0).ljust(_SECTOR, b"\0")
    table_at, data_at = struct.unpack_from("<II", head, 340)
    block, count = struct.unpack_from("<I4xI", head, 376)
    blocks = _numbers(descriptor, what, table_at, count)
    used = blocks[blocks < _NO_BLOCK]
    return data_at + (int(used.max()) + 1) * block if len(used) else 0


def _numbers(descriptor: int, what: str, offset: int, count: int) -> npt.NDArray[np.int64]:
    """A table of the file."""
    if count * 4 > _MAX_TABLE_BYTES:
        raise Invalid(f"{what} has tables that are too large")
    raw = os.pread(descriptor, count * 4, offset) if offset < 1 << 62 else b""
    if len(raw) != count * 4:
        raise Invalid(f"{what} is cut short: a table lies past its end")
    return np.frombuffer(raw, "<u4").astype(np.int64)
