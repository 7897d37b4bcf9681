"""The serial console's log: qemu appends to it, we read, clear and cut it.

qemu (or virtlogd) holds the file open in append mode, so a cut is: copy the tail into `<log>.old`, then truncate. A
guest that floods its console can lose lines between the two, never fill the disk. Offsets that readers follow count
from the instance's first byte: `<log>.base` holds how much was cut away.
"""

import json
import os
from pathlib import Path

LIMIT_BYTES = 4 << 20


class ConsoleLog:
    """The log at `path`; with the old part that a cut keeps it takes up to `limit_bytes` and what one turn adds."""

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self._limit = path, limit_bytes
        self._old, self._base = path.with_suffix(".log.old"), path.with_suffix(".log.base")

    def _dropped_bytes(self) -> int:
        """Bytes before the start of `<log>.old`."""
        try:
            return int(json.loads(self._base.read_text()))
        except (OSError, ValueError):
            return 0

    def _write_base(self, value: int) -> None:
        new = self._base.with_suffix(".new")
        new.write_text(json.dumps(value))
        new.replace(self._base)

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def cut(self) -> bool:
        """If the log has more than half the limit, keep its last quarter of the limit. Whether it was cut."""
        size = self._size(self.path)
        for rolled in self.path.parent.glob(f"{self.path.name}.[0-9]"):
            rolled.unlink()  # virtlogd, where stdio_handler says so, rolls over by itself
        if size <= self._limit // 2:
            return False
        total = self._dropped_bytes() + self._size(self._old) + size
        with self.path.open("rb+") as log:
            log.seek(-min(size, self._limit // 4), os.SEEK_END)
            tail = log.read()
            new = self._old.with_suffix(".tail")
            new.write_bytes(tail)
            new.replace(self._old)
            log.truncate(0)
        self._write_base(total - len(tail))
        return True

    def clear(self) -> None:
        """Forget everything written so far."""
        total = self._dropped_bytes() + self._size(self._old) + self._size(self.path)
        self._old.unlink(missing_ok=True)
        if self.path.exists():
            os.truncate(self.path, 0)
        self._write_base(total)

    def tail(self, length_bytes: int) -> bytes:
        """The last `length_bytes` (-1: all that is kept)."""
        kept = self._read(self._old) + self._read(self.path)
        return kept if length_bytes < 0 else kept[len(kept) - min(length_bytes, len(kept)) :]

    def since(self, offset: int, limit_bytes: int = 1 << 20) -> tuple[bytes, int]:
        """What was written after `offset` (-1: from the end on), and the offset to ask for next."""
        start, kept = self._dropped_bytes(), self._read(self._old) + self._read(self.path)
        if offset < 0 or offset > start + len(kept):
            return b"", start + len(kept)
        begin = max(0, offset - start)
        part = kept[begin : begin + limit_bytes]
        return part, start + begin + len(part)

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
