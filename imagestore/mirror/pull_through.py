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
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, Object, ObjectStat, ReadOnly
from imagestore.errors import Corrupt, NotFound, Unavailable
from imagestore.formats.digest import Digest
from imagestore.formats.keys import PACKS, Check, kind_of, matches
from imagestore.formats.pack import TRAILER, Footer, split_pack

_REQUEST_BYTES = 4 << 20
_MOST_PACKS = 4096
_AWAY_S = 30.0
"""An upstream that did not answer is left alone for so long where there is a copy: its retries took long enough."""
Frames = list[int]
"""Numbers of frames, or places in a pack by frame."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pack:
    """A pack whose footer is known."""

    stat: ObjectStat
    footer: Footer
    tail: bytes
    """The pack's bytes from the footer on."""
    starts: Frames
    ends: Frames


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
        self._running: dict[tuple[str, int], Future[None]] = {}
        self._kept_bytes = sum(path.stat().st_blocks * 512 for path in self._frames.iterdir())

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        if kind_of(key) is PACKS:
            return self._from_pack(key, start, length)
        found = self._whole(key)
        end = len(found.data) if length is None else start + length
        if not 0 <= start <= end <= len(found.data):
            raise Corrupt(f"{self.url}/{key}: bytes {start} to {end} of {len(found.data)} were asked for")
        return Object(found.data[start:end], found.stat)

    def stat(self, key: str) -> ObjectStat:
        return self._pack(key).stat if kind_of(key) is PACKS else self._whole(key).stat

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        yield from self._upstream.list(prefix)

    def close(self) -> None:
        self._upstream.close()

    def _whole(self, key: str) -> Object:
        kind = kind_of(key)
        named = kind is not None and kind.check is Check.NAME
        if named:
            try:
                kept = self._kept.get(key)
                if matches(key, kept.data):
                    return kept
            except NotFound:
                pass
        with self._alone(key, -1) as first:
            if named and not first:
                return self._whole(key)
            if time.monotonic() < self._away_until_s:
                with contextlib.suppress(NotFound):
                    return self._kept.get(key)
            try:
                found = self._upstream.get(key)
            except Unavailable:
                self._away_until_s = time.monotonic() + _AWAY_S
                return self._kept.get(key)
            if not matches(key, found.data):
                raise Corrupt(f"{self.url}/{key}: the bytes do not match the name")
            self._kept.put(key, found.data)
            return found

    # Packs

    def _pack(self, key: str) -> _Pack:
        pack = self._packs.get(key)
        if pack is not None:
            return pack
        with self._alone(key, -2) as first:
            if not first and key in self._packs:
                return self._packs[key]
            tail_key = f"tails/{key[-64:]}"
            try:
                kept = self._kept.get(tail_key).data
                stat = ObjectStat(key, int.from_bytes(kept[:8], "little"), key[-64:], 0.0)
                tail = kept[8:]
            except NotFound:
                stat = self._upstream.stat(key)
                # Exactly the footer: a guess at its length would bring frames a second time.
                end = self._upstream.get(key, max(0, stat.size_bytes - 12), 12).data
                needed = int.from_bytes(end[:4], "little") + 12
                if end[4:] != TRAILER or needed > min(stat.size_bytes, 64 << 20):
                    raise Corrupt(f"{self.url}/{key} is no pack") from None
                tail = self._upstream.get(key, stat.size_bytes - needed, needed).data
            encoded = split_pack(tail)
            if Digest.of(encoded).hex() != key[-64:]:
                raise Corrupt(f"{self.url}/{key}: the footer does not match the name")
            footer = Footer.decode(encoded)
            if footer.data_bytes + len(tail) != stat.size_bytes:
                raise Corrupt(f"{self.url}/{key}: the pack has another size than its footer says")
            self._kept.put(tail_key, stat.size_bytes.to_bytes(8, "little") + tail)
            starts = footer.offsets.tolist()
            pack = _Pack(stat, footer, tail, starts, (footer.offsets + footer.sizes).tolist())
            self._packs[key] = pack
            if len(self._packs) > _MOST_PACKS:
                self._packs.pop(next(iter(self._packs)))
            return pack

    def _from_pack(self, key: str, start: int, length: int | None) -> Object:
        pack = self._pack(key)
        end = pack.stat.size_bytes if length is None else start + length
        if not 0 <= start <= end <= pack.stat.size_bytes:
            raise Corrupt(
                f"{self.url}/{key}: bytes {start} to {end} of {pack.stat.size_bytes} were asked for"
            )
        first = int(np.searchsorted(pack.ends, start, "right"))
        last = int(np.searchsorted(pack.starts, end))
        out = b"".join(self._frame_bytes(key, pack, range(first, last)))
        base = pack.starts[first] if first < last else pack.footer.data_bytes
        if end > pack.footer.data_bytes:
            out += pack.tail
        return Object(out[start - base : end - base], pack.stat)

    def _frame_bytes(self, key: str, pack: _Pack, frames: range) -> Iterator[bytes]:
        path = self._frames / key[-64:]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.utime(descriptor)
            found = [self._read(descriptor, pack, frame) for frame in frames]
            missing = [frame for frame, data in zip(frames, found, strict=True) if data is None]
            for run in _runs(pack, missing):
                for frame, data in self._fetch(key, pack, descriptor, run):
                    found[frame - frames.start] = data
            yield from (data for data in found if data is not None)
        finally:
            os.close(descriptor)
        if missing:
            self._make_room(path)

    def _read(self, descriptor: int, pack: _Pack, frame: int) -> bytes | None:
        data = os.pread(descriptor, pack.ends[frame] - pack.starts[frame], pack.starts[frame])
        return data if Digest.of(data) == pack.footer.hashes[frame].tobytes() else None

    def _fetch(self, key: str, pack: _Pack, descriptor: int, run: Frames) -> Iterator[tuple[int, bytes]]:
        """Adjoining frames, those that nobody fetches yet in one request each run of them."""
        with self._lock:
            others = {frame: self._running[key, frame] for frame in run if (key, frame) in self._running}
            mine = [frame for frame in run if frame not in others]
            ours = {frame: Future[None]() for frame in mine}
            self._running |= {(key, frame): future for frame, future in ours.items()}
        try:
            wanted = []
            for frame in mine:  # somebody may have brought it since we looked
                kept = self._read(descriptor, pack, frame)
                if kept is None:
                    wanted.append(frame)
                else:
                    yield frame, kept
            for part in _runs(pack, wanted):
                start, end = pack.starts[part[0]], pack.ends[part[-1]]
                data = self._upstream.get(key, start, end - start).data
                for frame in part:
                    piece = data[pack.starts[frame] - start : pack.ends[frame] - start]
                    if Digest.of(piece) != pack.footer.hashes[frame].tobytes():
                        raise Corrupt(f"{self.url}/{key}: a frame does not match its hash")
                    os.pwrite(descriptor, piece, pack.starts[frame])
                    with self._lock:
                        self._kept_bytes += len(piece)
                    yield frame, piece
        finally:
            with self._lock:
                for frame, future in ours.items():
                    del self._running[key, frame]
                    future.set_result(None)
        for frame, future in others.items():
            future.result()
            found = self._read(descriptor, pack, frame)
            if found is None:  # whoever fetched it failed
                yield from self._fetch(key, pack, descriptor, [frame])
            else:
                yield frame, found

    def _make_room(self, but: Path) -> None:
        with self._lock:
            if self._kept_bytes <= self._limit_bytes:
                return
            files = sorted((path.stat().st_mtime_ns, path) for path in self._frames.iterdir() if path != but)
            for _, path in files:
                if self._kept_bytes <= self._limit_bytes * 9 // 10:
                    break
                self._kept_bytes -= path.stat().st_blocks * 512
                path.unlink()

    def _alone(self, key: str, what: int) -> "_Turn":
        return _Turn(self._running, self._lock, (key, what))


class _Turn:
    """Lets one thread at a time do the work for a key; true for whoever came first."""

    def __init__(
        self, running: dict[tuple[str, int], Future[None]], lock: threading.Lock, key: tuple[str, int]
    ) -> None:
        self._running, self._lock, self._key = running, lock, key
        self._mine: Future[None] = Future()

    def __enter__(self) -> bool:
        first = True
        while True:
            with self._lock:
                other = self._running.get(self._key)
                if other is None:
                    self._running[self._key] = self._mine
                    return first
            other.result()
            first = False

    def __exit__(self, *error: object) -> None:
        with self._lock:
            del self._running[self._key]
        self._mine.set_result(None)


def _runs(pack: _Pack, frames: Frames) -> Iterator[Frames]:
    """Adjoining frames together, up to _REQUEST_BYTES."""
    run: Frames = []
    for frame in frames:
        fits = run and pack.ends[frame] - pack.starts[run[0]] <= _REQUEST_BYTES
        if run and not (fits and frame == run[-1] + 1):
            yield run
            run = []
        run.append(frame)
    if run:
        yield run
