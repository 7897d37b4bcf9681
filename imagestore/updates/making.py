"""An update made: for each new chunk the old ones most like it are found, and it is compressed with these before it."""

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagestore import durable
from imagestore.disks.windows import in_order
from imagestore.formats.columns import Numbers, find
from imagestore.formats.digest import Digest
from imagestore.formats.keys import DELTAS, UPDATES
from imagestore.formats.pack import FRAME_BYTES
from imagestore.formats.update import Step, Update, encode_steps, firsts
from imagestore.store.frames import READERS, Frames, ImageReader
from imagestore.store.store import Store
from imagestore.updates.coding import File, files, pack, pack_file
from imagestore.updates.similar import Samples, most_alike, samples
from imagestore.updates.using import read_steps

_DICTIONARY_BYTES = 6 << 20
_SAVES = 0.9  # of the frames' bytes: an update that costs more is not kept


class _Spool(NamedTuple):
    """Chunks of an image, one after the other in memory that a file backs, and where each begins and the last ends."""

    data: npt.NDArray[np.uint8]
    firsts: Numbers
    samples: Samples


def make_update(store: Store, base: Digest, to: Digest) -> Step | None:
    """Make the update between two images of a store; None if it saves hardly anything. Raises NotFound, Corrupt."""
    old, new = store.manifest(base), store.manifest(to)
    missing, gone = (np.flatnonzero(find(*ids) < 0) for ids in ((new.ids, old.ids), (old.ids, new.ids)))
    if not len(missing) or not len(gone):  # what both have was not changed: nothing became of it
        return None
    with durable.scratch("update") as place, ThreadPoolExecutor(READERS) as pool:
        olds = _spooled(ImageReader(lambda: store, base, old), gone, place / "old", pool)
        news = _spooled(ImageReader(lambda: store, to, new), missing, place / "new", pool)
        theirs, ours = pool.map(lambda spool: list(files(spool.data, spool.firsts)), (olds, news))
        alike, apart = most_alike(news.samples, olds.samples, len(missing)), dict[int, tuple[File, File]]()
        cuts = np.append(np.flatnonzero(np.diff(news.firsts[:-1] // FRAME_BYTES, prepend=-1)), len(missing))
        for one in ours if theirs else ():
            apart[one[0][0]] = one, min(theirs, key=lambda other: abs(len(other[-1]) - len(one[-1])))
            cuts = np.union1d(cuts[(cuts <= one[0][0]) | (cuts >= one[0][1])], one[0])

        def work(part: tuple[int, int]) -> tuple[int, Numbers, bytes]:
            """A frame of chunks: of the first and those before the last, by their numbers here."""
            like, (begin, end) = alike[slice(*part)], news.firsts[list(part)]
            if part[0] in apart and apart[part[0]][0][0] == part:  # no other begins in its last chunk
                return len(like), np.arange(*apart[part[0]][1][0]), pack_file(*apart[part[0]])
            near = np.unique(np.concatenate([like - 1, like, like + 1])[np.tile(like >= 0, 3)])
            near = near[(near >= 0) & (near < len(gone))]
            near = near[np.cumsum(np.diff(olds.firsts)[near]) <= _DICTIONARY_BYTES]
            bounds = zip(olds.firsts[near].tolist(), olds.firsts[near + 1].tolist(), strict=True)
            dictionary = b"".join(olds.data[a:b].tobytes() for a, b in bounds)
            return len(like), near, pack(bytes(news.data[begin:end]), dictionary)

        made = in_order(pool, work, pairwise(cuts.tolist()), READERS)
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


def _spooled(reader: ImageReader, rows: Numbers, path: Path, pool: Executor) -> _Spool:
    """Read chunks of an image into a file: written, as a new file's mapped pages cost more than the copy.

    They are not hashed, as their frames were: who uses an update believes nothing.
    """
    bounds, found = firsts(reader.manifest.lengths[rows]), list[Samples]()

    def work(frames: Frames, request: slice) -> None:
        for frame, stored in enumerate(frames.read(request, reader.store().backend), request.start):
            pieces = frames.cut(frame, frames.expand(frame, stored))
            at = np.searchsorted(rows, frames.chunks[frames.rows(frame)])
            for place, piece in zip(bounds[at].tolist(), pieces, strict=True):
                os.pwrite(file.fileno(), piece, place)
            hashes, places = samples(np.frombuffer(b"".join(pieces), np.uint8))
            ends = np.cumsum(frames.lengths[frames.rows(frame)])
            found.append((hashes, at[np.searchsorted(ends, places, "right")]))

    with path.open("wb") as file:
        list(reader.each(rows, work, pool))
    hashes, chunks = map(np.concatenate, zip(*found, strict=True))
    return _Spool(np.memmap(path, np.uint8, "r"), bounds, (hashes, chunks))
