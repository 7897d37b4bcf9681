"""What a crash of the machine must not undo: written beside its place, synced, renamed. And locks, which it does."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


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
def opened(path: Path, flags: int, mode: int = 0o666) -> Iterator[int]:
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
