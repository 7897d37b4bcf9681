"""Images that come compressed (xz, gzip, zstd, bzip2) or in an OVA: unpacked into an unnamed file, within bounds.

An OVA is a tar archive (ustar) whose first member is the OVF descriptor (DMTF DSP0243); it has one disk here, or is
refused. Members are found by their headers alone, and their names lead nowhere.
"""

import bz2
import contextlib
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard
from isal import isal_zlib
from isal.igzip_lib import IsalError

from imagestore.disks.disk import Disk
from imagestore.errors import DISK_FULL, Invalid, NoSpace
from imagestore.progress import Progress, Report, silent

LEAST_DATA_BYTES, MOST_RATIO = 4 << 30, 64
_MOST_ZEROS = 16  # times as many bytes as data may come out: zeros are cheap, not free
_LAYERS = 3
_FED_BYTES = 4 << 10  # to a decompressor at once: even RLE blocks of zstd make 128 MiB of it at most
_XZ_BYTES = 256 << 20
_PIECE_BYTES, _HOLE_BYTES = 1 << 20, 1 << 16
_DISKS = (".vmdk", ".img", ".raw", ".qcow2", ".vhd", ".vhdx", ".vdi")
_PACKED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: isal_zlib.decompressobj(wbits=31),
    b"\xfd7zXZ": lambda: lzma.LZMADecompressor(memlimit=_XZ_BYTES),
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    b"BZh": bz2.BZ2Decompressor,
}


def check_amount(what: str, data_bytes: int, file_bytes: int) -> None:
    """A small file may stand for a disk full of data (one cluster, named again and again). Raises Invalid."""
    most = LEAST_DATA_BYTES + MOST_RATIO * file_bytes
    if data_bytes > most:
        raise Invalid(f"{what}: {file_bytes} bytes that mean more than {most} bytes of data")


def check_work(disk: Disk, what: str, file_bytes: int) -> None:
    """That of a disk. Raises Invalid."""
    at = data_bytes = 0
    while (stretch := disk.next_data(at)) is not None:
        at = stretch[1]
        data_bytes += stretch[1] - stretch[0]
        check_amount(what, data_bytes, file_bytes)


@contextlib.contextmanager
def unpacked(descriptor: int, what: str, progress: Report = silent) -> Iterator[int]:
    """A descriptor of what is in it, or the same where that is neither compressed nor an OVA.

    Raises Invalid when it is broken or means too much, NoSpace when the temporary directory is full.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(_LAYERS):
            parts = _layer(descriptor, what)
            if parts is None:
                break
            file = stack.enter_context(tempfile.TemporaryFile(prefix="sf-unpack-"))
            try:
                _write(file, parts, os.fstat(descriptor).st_size, what, progress)
            except (lzma.LZMAError, zstandard.ZstdError, zlib.error, IsalError) as error:  # type: ignore[misc]
                raise Invalid(f"{what}: it cannot be unpacked: {error}") from error
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise NoSpace(f"no space in {tempfile.gettempdir()} to unpack {what}") from error
                raise Invalid(f"{what}: it cannot be unpacked: {error}") from error
            descriptor = file.fileno()
        yield descriptor


def _layer(descriptor: int, what: str) -> Iterator[tuple[int, bytes]] | None:
    """(bytes read so far, what they mean) of the outermost layer, if there is one."""
    head = os.pread(descriptor, 512, 0)
    make = next((make for sign, make in _PACKED.items() if head.startswith(sign)), None)
    if make is not None:
        return _streams(make, descriptor, what)
    if head[257:262] == b"ustar" and head[:100].rstrip(b"\0").endswith(b".ovf"):
        return _read(descriptor, *_disk_of(descriptor, what), what)
    return None


def _read(descriptor: int, start: int, end: int, what: str) -> Iterator[tuple[int, bytes]]:
    while start < end:
        piece = os.pread(descriptor, min(_PIECE_BYTES, end - start), start)
        if not piece:
            raise Invalid(f"{what} is cut short")
        start += len(piece)
        yield start, piece


def _streams(make: Callable[[], Any], descriptor: int, what: str) -> Iterator[tuple[int, bytes]]:
    """Compressed streams one after the other, as xz and zstd write them with several threads; zeros between them."""
    one, size = make(), os.fstat(descriptor).st_size
    for done, piece in _read(descriptor, 0, size, what):
        for at in range(0, len(piece), _FED_BYTES):
            rest = piece[at : at + _FED_BYTES]
            while rest := rest.lstrip(b"\0") if one.eof else rest:
                one = make() if one.eof else one
                yield done, one.decompress(rest)
                rest = one.unused_data if one.eof else b""
    if not one.eof:
        raise Invalid(f"{what} is cut short")


def _write(file: Any, parts: Iterator[tuple[int, bytes]], size: int, what: str, progress: Report) -> None:
    data = whole = 0
    for done, part in parts:
        progress(Progress("unpack", done, size))
        whole += len(part)
        for at in range(0, len(part), _HOLE_BYTES):
            piece = part[at : at + _HOLE_BYTES]
            if piece.count(0) == len(piece):
                file.seek(len(piece), os.SEEK_CUR)
            else:
                data += file.write(piece)
        check_amount(what, max(data, whole // _MOST_ZEROS), size)
    file.flush()
    file.truncate(whole)


def _disk_of(descriptor: int, what: str) -> tuple[int, int]:
    """Where the one disk of an OVA lies: first byte, and the one after its last. Raises Invalid."""
    at, found = 0, list[tuple[int, int]]()
    while (head := os.pread(descriptor, 512, at)).strip(b"\0"):
        said = head[124:136].strip(b" \0")
        if len(head) < 512 or not said.isdigit() or set(said) - set(b"01234567"):
            raise Invalid(f"{what} is a damaged OVA")
        name, length = head[:100].rstrip(b"\0").decode("latin-1").lower(), int(said, 8)
        if head[156:157] in b"0\0" and name.removesuffix(".gz").endswith(_DISKS):
            found.append((at + 512, at + 512 + length))
        at += 512 + -(-length // 512) * 512
    if len(found) != 1:
        hint = "`tar -xf`, then push the disk that is meant"
        raise Invalid(f"{what} is an OVA with {len(found)} disks", hint=hint)
    return found[0]
