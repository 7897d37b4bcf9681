"""A mirror of another mirror that fetches what is asked for: each frame once, verified, and kept while there is room.

Requests into packs are rounded to whole frames, because a frame is the least that can be verified: the pack's footer,
whose BLAKE3 is the pack's name, has the hash of each. What lies in the local file is hashed again whenever it is read,
so that neither a crash nor a bad disk needs a record of what is there. Names and other objects that change are asked
for every time, and their last copy is the answer while upstream is away.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, Object, ObjectStat, ReadOnly, end_of
from imagestore.durable import opened
from imagestore.errors import Corrupt, NoSpace, NotFound, Unavailable
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import DELTAS, PACKS, Check, kind_of, matches
from imagestore.formats.pack import Footer
from imagestore.store.frames import Frames
from imagestore.store.inventory import open_tail, read_tail

_REQUEST_BYTES = 4 << 20
_MOST_PACKS = 4096
_AWAY_S = 30.0
"""An upstream that did not answer is left alone for so long where there is a copy: its retries took long enough."""


class _Pack(NamedTuple):
    """A pack whose footer is known: all its frames, and its bytes from the footer on."""

    stat: ObjectStat
    footer: Footer
    frames: Frames
    tail: bytes


class PullThrough(ReadOnly):
    """A read-only Backend. Thread-safe. `limit_bytes`: of frames kept; packs unused for longest go first."""

    def __init__(self, upstream: Backend, directory: Path, limit_bytes: int) -> None:
        self.url = upstream.url
        self._upstream = upstream
        self._kept = Directory(directory / "objects")
        self._frames = directory / "frames"
        self._frames.mkdir(parents=True, exist_ok=True)
        self._limit_bytes = limit_bytes
        self._packs: dict[str, _Pack] = {}
        self._lock = threading.Lock()
        self._away_until_s = 0.0
        self._at_work = WeakValueDictionary[str, threading.Lock]()
        self._room_bytes = -1  # how much more may be kept before files are counted again

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        if kind_of(key) is PACKS:
            return self._from_pack(key, start, length)
        if kind_of(key) is DELTAS:  # large, and read once by each
            return self._upstream.get(key, start, length)
        found = self._whole(key)
        end = end_of(f"{self.url}/{key}", start, length, len(found.data))
        return Object(found.data[start:end], found.stat)

    def stat(self, key: str) -> ObjectStat:
        if kind_of(key) is DELTAS:
            return self._upstream.stat(key)
        return self._pack(key).stat if kind_of(key) is PACKS else self._whole(key).stat

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        yield from self._upstream.list(prefix)

    def close(self) -> None:
        self._upstream.close()

    def _whole(self, key: str) -> Object:
        kind = kind_of(key)
        named = kind is not None and kind.check is Check.NAME
        with self._alone(key):
            kept = None
            with contextlib.suppress(NotFound):
                kept = self._kept.get(key)
            if kept and not matches(key, kept.data):
                kept = None
            if kept and (named or time.monotonic() < self._away_until_s):
                return kept
            try:
                found = self._upstream.get(key)
            except Unavailable:
                self._away_until_s = time.monotonic() + _AWAY_S
                if kept is None:
                    raise
                return kept
            if not matches(key, found.data):
                raise Corrupt(f"{self.url}/{key}: the bytes do not match the name")
            if kept is None or kept.data != found.data:
                self._keep(key, found.data)
            return found

    def _keep(self, key: str, data: bytes) -> None:
        with contextlib.suppress(NoSpace):  # on a full disk all is served as before
            self._kept.put(key, data)

    # Packs

    def _pack(self, key: str) -> _Pack:
        with self._alone(key):
            if pack := self._packs.get(key):
                return pack
            name, tail_key = Digest.parse(key[-64:]), f"tails/{key[-64:]}"
            try:
                tail = self._kept.get(tail_key).data
                footer = open_tail(tail, name)
            except (NotFound, Corrupt):
                footer, tail = read_tail(self._upstream, name)
                self._keep(tail_key, tail)
            stat = ObjectStat(key, footer.data_bytes + len(tail), key[-64:], 0.0)
            pack = _Pack(stat, footer, Frames.of_pack(name, footer), tail)
            with self._lock:
                self._packs[key] = pack
                if len(self._packs) > _MOST_PACKS:
                    self._packs.pop(next(iter(self._packs)))
            return pack

    def _from_pack(self, key: str, start: int, length: int | None) -> Object:
        pack = self._pack(key)
        end = end_of(f"{self.url}/{key}", start, length, pack.stat.size_bytes)
        starts, data_bytes = pack.frames.table["offset"], pack.footer.data_bytes
        first = int(np.searchsorted(starts + pack.frames.table["size"], start, "right"))
        last = int(np.searchsorted(starts, end))
        out = b"".join(self._stored(key, pack, range(first, last)))
        base = int(starts[first]) if first < last else data_bytes
        if end > data_bytes:
            out += pack.tail
        return Object(out[start - base : end - base], pack.stat)

    def _stored(self, key: str, pack: _Pack, numbers: range) -> Sequence[Buffer]:
        """The stored bytes of these frames: kept here, on their way for somebody else, or fetched now."""
        path = self._frames / key[-64:]
        with opened(path, os.O_RDWR | os.O_CREAT, 0o644) as descriptor:
            os.utime(descriptor)
            found = _kept(descriptor, pack, numbers)
            missing = [frame for frame in numbers if frame not in found]
            with contextlib.ExitStack() as alone:
                for frame in missing:  # all in one order: no two wait for each other
                    alone.enter_context(self._alone(f"{key}:{frame}"))
                found |= _kept(descriptor, pack, missing)  # brought since we looked
                found |= self._fetch(descriptor, pack, [frame for frame in missing if frame not in found])
        if missing:
            self._make_room(path)
        return [found[frame] for frame in numbers]

    def _fetch(self, descriptor: int, pack: _Pack, numbers: Sequence[int]) -> dict[int, Buffer]:
        """Frames (ascending) from upstream, adjoining ones in one request."""
        chosen = np.isin(pack.footer.frame_of_chunk, numbers)
        frames, found = Frames.of_pack(pack.frames.packs[0], pack.footer, chosen), dict[int, Buffer]()
        for request in frames.requests(_REQUEST_BYTES, bulk=False):
            stored = frames.read(request, self._upstream)
            for number, place, data in zip(
                numbers[request], frames.table["offset"][request].tolist(), stored, strict=True
            ):
                with contextlib.suppress(OSError):  # what could not be written is fetched again
                    os.pwrite(descriptor, data, place)
                with self._lock:
                    self._room_bytes -= len(data)
                found[number] = data
        return found

    def _make_room(self, but: Path) -> None:
        with self._lock:
            if self._room_bytes >= 0:
                return
            # By what they take of the disk: whole blocks, and some frames were written twice.
            status = {path: path.stat() for path in self._frames.iterdir()}
            kept_bytes = sum(each.st_blocks * 512 for each in status.values())
            for path in sorted(status, key=lambda path: status[path].st_mtime_ns):
                if kept_bytes > self._limit_bytes * 9 // 10 and path != but:
                    kept_bytes -= status[path].st_blocks * 512
                    path.unlink()
            self._room_bytes = self._limit_bytes - kept_bytes

    def _alone(self, key: str) -> threading.Lock:
        """Lets one thread at a time do the work for an object, or a frame of one; it goes with the last of them."""
        with self._lock:
            return self._at_work.setdefault(key, threading.Lock())


def _kept(descriptor: int, pack: _Pack, numbers: Iterable[int]) -> dict[int, Buffer]:
    """Those of these frames that lie in the local file, whole."""
    found: dict[int, Buffer] = {}
    for number in numbers:
        row = pack.frames.table[number]
        data = os.pread(descriptor, int(row["size"]), int(row["offset"]))
        if Digest.of(data) == row["hash"].tobytes():
            found[number] = data
    return found
