"""An export of qemu's on a Unix socket as a disk: a guest's at one moment, or what an overlay holds of its own.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, structured replies).
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from imagestore.errors import Unavailable

_OPTION, _ANSWER, _REQUEST, _REPLY = 0x49484156454F5054, 0x0003E889045565A9, 0x25609513, 0x668E33EF
_GO, _STRUCTURED, _SET_META, _READ, _STATUS = 7, 8, 10, 0, 7
_DATA, _EXTENTS, _HOLE = 1, 5, 2
_MAX_BYTES, _STATUS_BYTES, _TIMEOUT_S = 16 << 20, 1 << 30, 180.0


class NbdDisk:
    """One connection, one request at a time, from any thread. Every error is Unavailable: the export is gone."""

    def __init__(self, path: Path, export: str, context: str = "base:allocation") -> None:
        """context: of what `extents` tells (docs/interop/nbd.txt of QEMU); base:allocation for `next_data`."""
        self._lock, self._export, self._socket = threading.Lock(), export, socket.socket(socket.AF_UNIX)
        self._file, self.size_bytes, self.read_bytes = self._socket.makefile("rb"), 0, 0
        name, query = (struct.pack(">I", len(word)) + word for word in (export.encode(), context.encode()))
        query = name + struct.pack(">I", 1) + query
        with self._speaking():
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(str(path))
            self._take(">QQH")
            self._socket.sendall(struct.pack(">I", 3))
            for option, body in ((_STRUCTURED, b""), (_SET_META, query), (_GO, name + bytes(2))):
                self._socket.sendall(struct.pack(">QII", _OPTION, option, len(body)) + body)
                kind = 0
                while kind != 1:
                    magic, _, kind, size = self._take(">QIII")
                    answer = self._file.read(min(size, 4096))
                    if magic != _ANSWER or kind >> 31:
                        raise OSError(f"option {option} is refused")
                    if kind == 3 and answer[:2] == b"\0\0":
                        self.size_bytes = int.from_bytes(answer[2:10], "big")

    def close(self) -> None:
        """From any thread: whoever reads gets Unavailable."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def read(self, offset: int, out: memoryview) -> None:
        """The bytes at `offset`."""
        for at in range(0, len(out), _MAX_BYTES):
            piece = out[at : at + _MAX_BYTES]
            for kind, body in self._ask(_READ, offset + at, len(piece)):
                start, size = int.from_bytes(body[:8], "big") - offset - at, int.from_bytes(body[8:12], "big")
                data = body[8:] if kind == _DATA else bytes(min(size, len(piece)))
                if not 0 <= start <= start + len(data) <= len(piece):
                    raise Unavailable(f"the export {self._export} answers nonsense")
                piece[start : start + len(data)] = data
        self.read_bytes += len(out)

    def extents(self, offset: int = 0) -> Iterator[tuple[int, int, int]]:
        """(start, end, flags) of the context, adjoining, up to the disk's end."""
        while (begun := offset) < self.size_bytes:
            for kind, body in self._ask(_STATUS, offset, min(_STATUS_BYTES, self.size_bytes - offset)):
                for size, flags in struct.iter_unpack(">II", body[4:]) if kind == _EXTENTS else ():
                    yield offset, (offset := min(offset + size, self.size_bytes)), flags
            if offset == begun:
                raise Unavailable(f"the export {self._export} does not say what it holds")

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """What does not read as zeros."""
        return next(((start, end) for start, end, flags in self.extents(offset) if not flags & _HOLE), None)

    def _ask(self, command: int, offset: int, length: int) -> list[tuple[int, bytes]]:
        """Type and body of each part of the reply."""
        found, last = list[tuple[int, bytes]](), 0
        with self._lock, self._speaking():
            self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, command, 0, offset, length))
            while not last:
                magic, last, kind, _, size = self._take(">IHHQI")
                body = self._file.read(min(size, _MAX_BYTES + 4096))
                if magic != _REPLY or kind & 0x8000 or len(body) != size:
                    raise OSError(f"error {int.from_bytes(body[:4], 'big')} at {offset}")
                found += [(kind, body)] if kind else []
        return found

    def _take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._file.read(struct.calcsize(form)))

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except (OSError, struct.error) as err:
            self.close()
            raise Unavailable(f"the export {self._export} cannot be read: {err}") from err
