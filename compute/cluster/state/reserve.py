"""Room for what must be written on a full disk, so that guests can be deleted and the server starts."""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_BYTES, _PIECES, _EVERY_S = 4 << 20, 8, 60.0


class Reserve:
    """A file of blocks that nobody else can take; whoever filled the disk would take all at once, hence the pieces."""

    def __init__(self, path: Path) -> None:
        self._path, self.next_s = path, 0.0

    def keep(self) -> None:
        """Fill it up again, if there is room by now."""
        if time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + _EVERY_S
        with suppress(OSError):
            self._path.touch(mode=0o600)
            with self._path.open("r+b") as file:
                kept = os.fstat(file.fileno()).st_size
                try:
                    os.posix_fallocate(file.fileno(), 0, _BYTES)
                except OSError:
                    file.truncate(kept)

    def spend(self) -> bool:
        """Give a piece away; False if there is none left."""
        left = self._path.stat().st_size if self._path.exists() else 0
        if left:
            log.error("the disk is full; %s has %d KiB left", self._path, left >> 10)
            os.truncate(self._path, max(0, left - _BYTES // _PIECES))
        return left > 0
