"""A store in a local directory: one file per object, written beside its place and renamed over it."""

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

from imagestore.backends.protocol import Data, Etag, Object, ObjectStat, check_key, end_of, pieces
from imagestore.durable import Reserve, locked, opened, sync
from imagestore.errors import DISK_FULL, Conflict, Corrupt, Denied, Invalid, NoSpace, NotFound, Unavailable
from imagestore.formats.keys import STATES, kind_of

_TEMPORARY = ".tmp"
_LOCK = ".lock"
_STALE_S = 60.0
_KINDS = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), NotFound),
    **dict.fromkeys(DISK_FULL, NoSpace),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), Denied),
    errno.ENAMETOOLONG: Invalid,
}


class Directory:
    """Objects as files below `root`. Needs rename and flock that hold between all its writers (NFSv4 does).

    Replacing, conditional or not, happens under one lock per directory, held for a rename and not for
    the data. A temporary file is locked by its writer, so that what a killed one left can be told apart.
    """

    read_only = False
    conditional = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = f"file://{self.root}"
        self.reserve = Reserve(self.root / ".reserve")
        self._swept = False

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        with self._errors(key), self._path(key).open("rb") as file:
            status = os.fstat(file.fileno())
            wanted = end_of(f"{self.url}/{key}", start, length, status.st_size) - start
            file.seek(start)
            data = file.read(wanted)
            if len(data) < wanted:
                raise Corrupt(f"{self.url}/{key}: the file ended at byte {start + len(data)}")
            return Object(data, _stat(key, status))

    def stat(self, key: str) -> ObjectStat:
        with self._errors(key):
            status = self._path(key).lstat()
            if not S_ISREG(status.st_mode):
                raise NotFound(f"{self.url}/{key}: no such object")
            return _stat(key, status)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        top = f"{self.root}/{check_key(f'{prefix}x')}".rpartition("/")[0]
        with self._errors(prefix):
            for place, folders, files in os.walk(top, onerror=_unless_gone):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(name for name in files if not name.startswith(".")):
                    path = f"{place}/{name}"
                    key = path[len(str(self.root)) + 1 :]
                    with contextlib.suppress(FileNotFoundError):
                        if key.startswith(prefix) and S_ISREG((status := os.lstat(path)).st_mode):
                            yield _stat(key, status)

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        path = self._path(key)
        with self._errors(key), contextlib.ExitStack() as undo:
            self._make_directories(path.parent)
            temporary, descriptor = self._temporary()
            undo.callback(temporary.unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                if kind_of(key) is STATES:
                    os.fchmod(descriptor, 0o600)
                file.writelines(pieces(data))
                file.flush()
                # Two versions could share inode, size and the clock's tick (4 ms): random digits below
                # the tick keep their etags apart.
                tick_ns = os.fstat(file.fileno()).st_mtime_ns & ~0x3FFFFF
                os.utime(file.fileno(), ns=(tick_ns, tick_ns | secrets.randbits(22)))
                os.fsync(file.fileno())
                with locked(self.root / _LOCK, mode=0o666):
                    self._check(key, if_match, if_none_match)
                    temporary.rename(path)
                    undo.pop_all()
                    status = os.fstat(file.fileno())
                sync(path.parent)
        return _stat(key, status)

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        path = self._path(key)
        with self._errors(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with locked(self.root / _LOCK, mode=0o666):
                path.lstat()
                self._check(key, if_match, False)
                path.unlink()
            sync(path.parent)

    def now(self) -> float:
        """The file system's clock: over NFS that is the server's, as in `modified_s`."""
        with self._errors(_LOCK):
            self._make_directories(self.root)
            with opened(self.root / _LOCK, os.O_RDWR | os.O_CREAT) as descriptor:
                os.utime(descriptor)  # and not a new file, for which a full disk has no room
                return os.fstat(descriptor).st_mtime

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _check(self, key: str, if_match: str | None, if_none_match: bool) -> None:
        if if_match is None and not if_none_match:
            return
        try:
            etag: str | None = self.stat(key).etag
        except NotFound:
            etag = None
        if (if_none_match and etag is not None) or (if_match is not None and etag != if_match):
            raise Conflict(f"{self.url}/{key} was changed by another writer")

    def _temporary(self) -> tuple[Path, int]:
        directory = self.root / _TEMPORARY
        self._make_directories(directory)
        if not self._swept:
            self._swept = True
            self._sweep(directory)
        path = directory / secrets.token_hex(12)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return path, descriptor

    def _sweep(self, directory: Path) -> None:
        """Remove temporary files whose writer is dead."""
        for path in directory.iterdir():
            with contextlib.suppress(OSError), path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _STALE_S:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()

    def _make_directories(self, path: Path) -> None:
        if path.is_dir():
            return
        self._make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            kind = _KINDS.get(err.errno or 0, Unavailable)
            reason = "no such object" if kind is NotFound else os.strerror(err.errno or errno.EIO)
            raise kind(f"{self.url}/{key}: {reason}") from err


def _unless_gone(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError | NotADirectoryError):
        raise err


def _stat(key: str, status: os.stat_result) -> ObjectStat:
    etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectStat(key, status.st_size, etag, status.st_mtime)
