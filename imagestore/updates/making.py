"""An update made: for each new chunk the old ones most like it are found, and it is compressed with these before it."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore.disks.windows import in_order
from imagestore.formats.columns import Numbers, find
from imagestore.formats.digest import Digest
from imagestore.formats.keys import DELTAS, UPDATES
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import FRAME_BYTES, LEVEL
from imagestore.formats.update import Step, Update, encode_steps
from imagestore.store.frames import READERS, ImageReader
from imagestore.store.store import Store
from imagestore.updates.similar import Samples, most_alike, samples
from imagestore.updates.using import read_steps

_WINDOW_BYTES = 512 << 10
_DICTIONARY_BYTES = 6 << 20
_MATCHER = {"strategy": zstandard.STRATEGY_FAST, "hash_log": 18, "min_match": 6}
"""A table that has room for a dictionary: the level's is for the frame, and forgets what it begins with."""
_WORKERS = 2
_SAVES = 0.9  # of the frames' bytes: an update that costs more is not kept


class _Spool(NamedTuple):
    """Chunks of an image, one after the other in memory that a file backs, and where each ends."""

    data: npt.NDArray[np.uint8]
    ends: Numbers

    def samples(self, pool: ThreadPoolExecutor) -> Samples:
        """Of all."""
        cuts = np.flatnonzero(np.diff(self.ends // _WINDOW_BYTES, prepend=-1, append=-1)).tolist()

        def work(part: tuple[int, int]) -> Samples:
            start, ends = int(np.append(0, self.ends)[part[0]]), self.ends[slice(*part)]
            values, chunks = samples(np.asarray(self.data[start : int(ends[-1])]), ends - start)
            return values, chunks + part[0]

        values, chunks = zip(*in_order(pool, work, pairwise(cuts), _WORKERS), strict=True)
        return np.concatenate(values), np.concatenate(chunks)

    def of(self, at: Numbers) -> bytes:
        """The bytes of some of them, by their numbers here."""
        starts = np.append(0, self.ends)[at].tolist()
        return b"".join(self.data[a:b].tobytes() for a, b in zip(starts, self.ends[at].tolist(), strict=True))


def make_update(store: Store, base: Digest, to: Digest) -> Step | None:
    """Make the update between two images of a store; None if it saves hardly anything. Raises NotFound, Corrupt.

    What became of a chunk is looked for where `to` lacks it: what both have was not changed.
    """
    old, new = store.manifest(base), store.manifest(to)
    missing, gone = (np.flatnonzero(find(*ids) < 0) for ids in ((new.ids, old.ids), (old.ids, new.ids)))
    if not len(missing) or not len(gone):
        return None
    with tempfile.TemporaryDirectory(prefix="sf-update-") as place, ThreadPoolExecutor(_WORKERS) as pool:
        olds = _spooled(store, base, old, gone, Path(place) / "old")
        news = _spooled(store, to, new, missing, Path(place) / "new")
        alike = most_alike(news.samples(pool), olds.samples(pool), len(missing))
        made = in_order(pool, lambda part: _frame(news, olds, alike, part), _frames(news), 2 * _WORKERS)
        counts, bases, frames = zip(*made, strict=True)
    columns = (map(len, frames), counts, map(len, bases), missing, gone[np.concatenate(bases)])
    a, b, c, d, e = (np.fromiter(column, np.uint32) for column in columns)
    hashes = np.frombuffer(b"".join(map(Digest.of, frames)), np.uint8).reshape(-1, 32)
    head = Update(base, to, a, b, c, d, e, hashes).encode()
    step, layout = Step(Digest.of(head), len(head), len(head) + int(a.sum())), store.layout(to)
    if step.size_bytes > _SAVES * layout.frames["size"][np.unique(layout.chunk_frames[missing])].sum():
        return None
    store.backend.put(DELTAS.key(step.name), [head, *frames])
    store.backend.put(UPDATES.key(to), encode_steps({**read_steps(store, to), base: step}))
    return step


def _spooled(store: Store, digest: Digest, manifest: Manifest, rows: Numbers, path: Path) -> _Spool:
    """Read chunks of an image into a file: written, as a new file's mapped pages cost more than the copy."""
    ends = np.cumsum(manifest.lengths[rows], dtype=np.int64)
    starts = dict(zip(rows.tolist(), (ends - manifest.lengths[rows]).tolist(), strict=True))
    with ThreadPoolExecutor(READERS, "sf-read") as pool, path.open("wb") as file:
        for frames, request, _, pieces in ImageReader(lambda: store, digest, manifest).load(rows, pool):
            chunks = frames.chunks[frames.rows(request)].tolist()
            for chunk, piece in zip(chunks, (one for of_frame in pieces for one in of_frame), strict=True):
                file.seek(starts[chunk])
                file.write(piece)
    return _Spool(np.memmap(path, np.uint8, "r"), ends)


def _frames(news: _Spool) -> Iterator[tuple[int, int]]:
    """The chunks of each frame, by their numbers in the spool."""
    first, start = 0, 0
    for at, end in enumerate(news.ends.tolist()):
        if end - start > FRAME_BYTES and at > first:
            yield first, at
            first, start = at, int(news.ends[at - 1])
    yield first, len(news.ends)


def _frame(news: _Spool, olds: _Spool, alike: Numbers, part: tuple[int, int]) -> tuple[int, Numbers, bytes]:
    """How many chunks a frame has; which old ones are its dictionary: what they resemble, and neighbours; its bytes."""
    like = alike[slice(*part)]
    like = like[like >= 0]
    near = np.unique(np.concatenate([like - 1, like, like + 1]))
    near = near[(near >= 0) & (near < len(olds.ends))]
    near = near[np.cumsum(np.diff(olds.ends, prepend=0)[near]) <= _DICTIONARY_BYTES]
    plain, dictionary = news.of(np.arange(*part)), olds.of(near)
    sizes = {"source_size": len(plain), "dict_size": len(dictionary), "window_log": 24}
    params = zstandard.ZstdCompressionParameters.from_level(LEVEL, **sizes, **_MATCHER)
    raw = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    frame = zstandard.ZstdCompressor(dict_data=raw, compression_params=params).compress(plain)
    return part[1] - part[0], near, frame
