"""The serial console's log: qemu appends to it, we read, clear and cut it.

qemu (or virtlogd) holds the file open in append mode, so a cut is: copy the tail into `<log>.old`, then truncate. A
guest that floods its console can lose lines between the two, never fill the disk.
"""

import os
from contextlib import suppress
from pathlib import Path

LIMIT_BYTES = 4 << 20
_UP = (b"login:", b"SF-GUEST-READY")  # a getty, and the tiny guest
_LOOKED_AT_BYTES = 64 << 10


class ConsoleLog:
    """The log at `path`; with the old part that a cut keeps it takes up to `limit_bytes` and what one turn adds."""

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self._limit = path, limit_bytes
        self._old = path.with_suffix(".log.old")
        self._begun, self._seen = 0, (0, 0)

    def cut(self) -> bool:
        """If the log has more than half the limit, keep its last quarter of the limit. Whether it was cut."""
        with suppress(FileNotFoundError):  # the guest is deleted at this moment
            there = self.path.stat()
            seen, self._seen = self._seen, (there.st_size, there.st_mtime_ns)
            if self._seen == seen:  # a quiet guest costs nothing
                return False
            for rolled in self.path.parent.glob(f"{self.path.name}.[0-9]"):
                rolled.unlink()  # virtlogd, where stdio_handler says so, rolls over by itself
            if there.st_size <= self._limit // 2:
                return False
            with self.path.open("rb+") as log:
                log.seek(-min(there.st_size, self._limit // 4), os.SEEK_END)
                new = self._old.with_suffix(".tail")
                try:
                    new.touch(mode=0o600)
                    new.write_bytes(log.read())
                    new.replace(self._old)
                except OSError:  # a full disk: room counts more than what a flooding guest said last
                    new.unlink(missing_ok=True)
                log.truncate(0)
            return True
        return False

    def begin(self) -> None:
        """A boot begins: what is there says nothing of it."""
        self._begun = self.path.stat().st_size if self.path.exists() else 0

    def up(self) -> bool:
        """Whether somebody could log in by now, as far as a console can tell."""
        shown = b""
        with suppress(FileNotFoundError), self.path.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            begun = self._begun if self._begun <= size else 0  # it was cut or cleared meanwhile
            log.seek(max(begun, size - _LOOKED_AT_BYTES))
            shown = log.read()
        return any(mark in shown for mark in _UP)

    def clear(self) -> None:
        """Forget everything written so far."""
        self._old.unlink(missing_ok=True)
        if self.path.exists():
            os.truncate(self.path, 0)

    def tail(self, length_bytes: int) -> bytes:
        """The last `length_bytes` (-1: all that is kept)."""
        kept = b"".join(path.read_bytes() for path in (self._old, self.path) if path.exists())
        return kept if length_bytes < 0 else kept[len(kept) - min(length_bytes, len(kept)) :]
