"""Any range of an image, as the disk or as a qcow2 of it, out of the store's frames: for people who know no sf."""

import hashlib
import io
import json
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from imagestore.disks.qcow2.writer import WRITER, plan
from imagestore.errors import NotFound
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import SUMS
from imagestore.formats.manifest import Manifest
from imagestore.outside import YEAR_9999_S, read_json, whole
from imagestore.progress import Progress, Report, silent
from imagestore.store.frames import ImageReader
from imagestore.store.store import Store

_GROUP_BYTES = 2 << 20
AHEAD = 3
_ZEROS = bytes(1 << 20)
DEBIAN_WORDS = {"x86_64": "amd64", "aarch64": "arm64"}


class GroupCache:
    """Groups of chunks that were asked for lately, for all images together: each is read once however many ask.

    Thread-safe. Clients come and go with pieces of these: what they hold themselves is what they are being sent.
    """

    def __init__(self, limit_bytes: int = 128 << 20) -> None:
        self._most = limit_bytes // _GROUP_BYTES
        self._groups: OrderedDict[tuple[Digest, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, key: tuple[Digest, int], start: Callable[[], Future[bytes]]) -> Future[bytes]:
        """The bytes of its chunks: here or on their way, else what `start` begins to bring."""
        with self._lock:
            found = self._groups.get(key)
            if found is None or (found.done() and found.exception()):
                found = self._groups[key] = start()
            self._groups.move_to_end(key)
            if len(self._groups) > self._most:
                self._groups.popitem(last=False)
            return found


class Content:
    """One image. Every chunk is hashed before it leaves. Raises Corrupt, NotFound, Unavailable while it streams."""

    def __init__(self, store: Store, digest: Digest, cache: GroupCache, pool: ThreadPoolExecutor) -> None:
        self.digest = digest
        self.manifest: Manifest = store.manifest(digest)
        self.qcow2 = plan(self.manifest)
        self._reader = ImageReader(lambda: store, digest, self.manifest)
        self._cache, self._pool = cache, pool
        lengths = self.manifest.lengths.astype(np.int64)
        self._starts = self.manifest.offsets
        self._ends = self._starts + lengths
        # Chunks whose data begins in the same _GROUP_BYTES of all data are fetched together.
        self._data = np.cumsum(lengths) - lengths
        groups = self._data // _GROUP_BYTES
        self._firsts = np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(lengths))

    def size_bytes(self, format_: str) -> int:
        """Of the whole file, `raw` or `qcow2`."""
        return self.manifest.size_bytes if format_ == "raw" else self.qcow2.size_bytes

    def read(self, format_: str, start: int, length: int, ahead: int = 0) -> Iterator[Buffer]:
        """Bytes `start` to `start + length` of the file, in pieces; `ahead` groups after them are begun as well."""
        for segment in [(start, length)] if format_ == "raw" else self.qcow2.segments(start, length):
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from self._disk(*segment, ahead)

    def _disk(self, offset: int, length: int, ahead: int) -> Iterator[Buffer]:
        """Of the disk, and zeros past its end."""
        end = offset + length
        first, last = np.searchsorted(self._ends, offset, "right"), np.searchsorted(self._starts, end)
        groups = range(0)
        if first < last:
            bounds = np.searchsorted(self._firsts, [first, last - 1], "right") - 1
            groups = range(int(bounds[0]), int(bounds[1]) + 1)
        at, last_group = offset, min(groups.stop + ahead, len(self._firsts) - 1)
        for group in groups:
            near = [self._begin(one) for one in range(group, min(group + 1 + AHEAD, last_group))]
            data, base = memoryview(near[0].result()), int(self._data[self._firsts[group]])
            chunks = slice(max(first, self._firsts[group]), min(last, self._firsts[group + 1]))
            starts, ends = self._starts[chunks], self._ends[chunks]
            shifts = starts - self._data[chunks] + base  # from a place in the group's data to one on the disk
            breaks = np.flatnonzero(np.diff(shifts)) + 1
            for one, past in zip([0, *breaks], [*breaks, len(starts)], strict=True):
                start, stop = max(int(starts[one]), offset), min(int(ends[past - 1]), end)
                yield from _zeros(start - at)
                yield data[start - int(shifts[one]) : stop - int(shifts[one])]
                at = stop
        yield from _zeros(end - at)

    def _begin(self, group: int) -> Future[bytes]:
        return self._cache.load((self.digest, group), lambda: self._pool.submit(self._load, group))

    def _load(self, group: int) -> bytes:
        chunks = range(int(self._firsts[group]), int(self._firsts[group + 1]))
        found = {chunk: piece for loaded in self._reader.load(chunks) for chunk, piece in loaded.chunks()}
        return b"".join(found[chunk] for chunk in chunks)


def _zeros(count: int) -> Iterator[Buffer]:
    while count > 0:
        yield _ZEROS[:count]
        count -= len(_ZEROS)


@dataclass(frozen=True, slots=True)
class Sums:
    """SHA-256 of what is served of an image: computed once, at publish, and kept as `sums/ab/<manifest>`."""

    raw: str
    qcow2: str
    combined: str  # of the metadata archive and the qcow2 after it, as simplestreams wants it
    created_s: int  # when it was computed, by the store's clock: a version's date in simplestreams
    writer: int = WRITER


def read_sums(store: Store, digest: Digest) -> Sums | None:
    """None where they were not computed yet, or by another writer of qcow2 files."""
    try:
        sums = Sums(**read_json(store.backend.get(SUMS.key(digest)).data))
        whole(sums.created_s, high=int(YEAR_9999_S))
    except (NotFound, ValueError, TypeError):
        return None
    return sums if sums.writer == WRITER else None


def compute_sums(store: Store, digest: Digest, progress: Report = silent) -> Sums:
    """Read the whole image twice and keep its checksums, unless they are there."""
    known = read_sums(store, digest)
    if known is not None:
        return known
    created_s = round(store.backend.now())
    with ThreadPoolExecutor(2, "sf-sums") as pool:
        content = Content(store, digest, GroupCache(16 << 20), pool)
        raw, qcow2 = hashlib.sha256(), hashlib.sha256()
        combined = hashlib.sha256(simplestreams_archive(content.manifest, created_s))
        total = content.size_bytes("raw") + content.size_bytes("qcow2")
        done = 0
        for format_, hashes in (("raw", (raw,)), ("qcow2", (qcow2, combined))):
            for piece in content.read(format_, 0, content.size_bytes(format_)):
                for one in hashes:
                    one.update(piece)
                done += len(piece)
                progress(Progress("checksums", done, total))
    sums = Sums(raw.hexdigest(), qcow2.hexdigest(), combined.hexdigest(), created_s)
    store.backend.put(SUMS.key(digest), json.dumps(asdict(sums), sort_keys=True).encode())
    return sums


def simplestreams_archive(manifest: Manifest, created_s: int) -> bytes:
    """The metadata archive (incus.tar.xz) that LXD and Incus want beside a VM's disk; the same bytes every time."""
    facts = {
        "architecture": manifest.architecture,
        "creation_date": created_s,
        "properties": {"os": manifest.os or "linux", "description": f"{manifest.os or 'linux'} for sf"},
    }
    text = json.dumps(facts, sort_keys=True).encode()  # JSON is YAML
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz", format=tarfile.USTAR_FORMAT, preset=6) as archive:
        entry = tarfile.TarInfo("metadata.yaml")
        entry.size, entry.mtime = len(text), created_s
        archive.addfile(entry, io.BytesIO(text))
    return out.getvalue()
