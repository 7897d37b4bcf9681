"""What a crash of the machine must not undo: written beside its place, synced, renamed. Locks and scratch go."""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_FRESH_S = 60.0
_RESERVE_BYTES, _PIECE_BYTES, _EVERY_S = 4 << 20, 512 << 10, 60.0
log = logging.getLogger(__name__)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a small file; it is the old one or the new one at any moment, and the new one when this returns.

    Several at once: each writes under a name of its own, so that none publishes half of another's; under none until it
    is whole where the file system has such files, so that who is killed leaves nothing.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with contextlib.ExitStack() as undo:
        undo.callback(beside.unlink, missing_ok=True)
        for place, flags in (path.parent, os.O_TMPFILE), (beside, os.O_CREAT | os.O_EXCL):
            try:
                with os.fdopen(os.open(place, os.O_WRONLY | flags, mode), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(number := file.fileno())
                    if place != beside:  # only with a descriptor of a directory the link in /proc is followed
                        os.link(f"/proc/self/fd/{number}", beside, src_dir_fd=number)
                break
            except OSError:
                if place == beside:
                    raise
        beside.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def opened(path: Path | str, flags: int, mode: int = 0o666) -> Iterator[int]:
    """A file's descriptor, until the block ends."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make the renames in a directory, or what a file has, durable."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, mode: int = 0o600) -> Iterator[int]:
    """Hold a file's lock, making the file if need be; it goes with the process, however that ends. The descriptor.

    No link is followed: the directory may be another user's. Raises BlockingIOError if another has it, unless `wait`.
    """
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor


@contextlib.contextmanager
def scratch(what: str) -> Iterator[Path]:
    """An empty directory for large files until the block ends. Those that killed processes left go first."""
    folder = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    for left in Path(tempfile.gettempdir()).glob(f"sf-{what}-*"):
        with (
            contextlib.suppress(OSError),
            opened(left, folder) as descriptor,
        ):  # one of another user, or in use
            status = os.fstat(descriptor)
            # A fresh one may not be locked yet.
            if status.st_uid == os.geteuid() and status.st_mtime < time.time() - _FRESH_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=f"sf-{what}-") as place,
        opened(Path(place), folder) as descriptor,
    ):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Path(place)


class Reserve:
    """Blocks that nobody else can take, so that things can be deleted on a full disk, and a server starts.

    Whoever filled the disk would take all at once, hence the pieces. No link is followed: it may be in another user's
    directory, and is cut.
    """

    _FLAGS = os.O_RDWR | os.O_NOFOLLOW

    def __init__(self, path: Path) -> None:
        self._path, self.next_s = path, 0.0

    def keep(self) -> None:
        """Fill it up again, as far as there is room by now."""
        if time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + _EVERY_S
        with contextlib.suppress(OSError), opened(self._path, self._FLAGS | os.O_CREAT, 0o600) as file:
            size = os.fstat(file).st_size
            try:
                while size < _RESERVE_BYTES:
                    os.posix_fallocate(file, size, _PIECE_BYTES)
                    size += _PIECE_BYTES
            finally:
                os.truncate(file, size)

    def spend(self) -> bool:
        """Give a piece away, or all of what another user keeps; False if there is none left."""
        try:
            with opened(self._path, self._FLAGS) as file:
                if left := os.fstat(file).st_size:
                    os.truncate(file, max(0, left - _PIECE_BYTES))
                    log.error("the disk is full; %s had %d KiB left", self._path, left >> 10)
                return left > 0
        except OSError:
            with contextlib.suppress(OSError):
                self._path.unlink()
                return True
        return False
