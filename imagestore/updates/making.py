"""An update made: for each new chunk the old ones most like it are found, and it is compressed with these before it."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imagestore import durable
from imagestore.formats.columns import Numbers, find
from imagestore.formats.digest import Digest
from imagestore.formats.keys import DELTAS, UPDATES
from imagestore.formats.update import Step, Update, encode_steps, firsts
from imagestore.store.frames import READERS, Frames, ImageReader
from imagestore.store.store import Store
from imagestore.updates.coding import files, pack, pack_file, starts
from imagestore.updates.similar import Samples, most_alike, once, samples
from imagestore.updates.using import read_steps

_DICTIONARY_BYTES, _REQUEST_BYTES = 6 << 20, 4 << 20
_FILE_CHUNKS, _FILES = 1 << 10, 1 << 5  # a file's; files that are looked at: any sector may seem one
_SAVES = 0.9  # of the bytes of packs' frames: a file's frame that is larger is not kept
_ALIKE = 20  # where fewer than one sample in so many is an old one's, frames of packs are as good
_Spool = tuple[npt.NDArray[np.uint8], Numbers, Samples, list[int]]
"""Chunks of an image, one after the other in memory that a file backs; where each begins and the last ends; what they
resemble; where large files seem to begin."""
_Part = tuple[Numbers, Numbers, bytes]
"""A frame of an update: rows of its chunks, which of the old ones are its dictionary, and its bytes."""


def make_update(store: Store, base: Digest, to: Digest) -> Step | None:
    """Make the update between two images of a store; None if no new chunk resembles one. Raises NotFound, Corrupt."""
    old, new = store.manifest(base), store.manifest(to)
    missing, gone = (np.flatnonzero(find(*ids) < 0) for ids in ((new.ids, old.ids), (old.ids, new.ids)))
    if not len(missing) or not len(gone):  # what both have was not changed: nothing became of it
        return None
    with durable.scratch("update") as place, ThreadPoolExecutor(READERS) as pool:
        olds = _spooled(ImageReader(lambda: store, base, old), gone, place / "old", pool)
        made = _parts(ImageReader(lambda: store, to, new), missing, olds, place, pool)
    if not made:
        return None
    rows, bases, frames = zip(*sorted(made, key=lambda part: int(part[0][0])), strict=True)
    a, b, c = (np.array([*map(len, column)], np.uint32) for column in (frames, rows, bases))
    hashes = np.frombuffer(b"".join(map(Digest.of, frames)), np.uint8).reshape(-1, 32)
    head = Update(base, to, a, b, c, np.concatenate(rows), gone[np.concatenate(bases)], hashes).encode()
    step = Step(Digest.of(head), len(head), len(head) + sum(map(len, frames)))
    store.backend.put(DELTAS.key(step.name), [head, *frames])
    store.backend.put(UPDATES.key(to), encode_steps({**read_steps(store, to), base: step}))
    return step


def _parts(reader: ImageReader, missing: Numbers, olds: _Spool, place: Path, pool: Executor) -> list[_Part]:
    """Frames of what is new, made as it is read: only what is old is kept, and files that gzip made."""
    old, bounds, (hashes, chunks), heads = olds
    values, lone = once(hashes)
    known, lengths = (values, chunks[lone]), np.diff(bounds)
    theirs = pool.submit(lambda: list(files(old, bounds, heads, again=False)))
    ours = dict[int, Future[list[_Part]]]()  # by the chunk in which one seems to begin

    def work(frames: Frames, request: slice) -> list[_Part]:
        """Of the chunks of each frame in a pack one of the update, or none where they resemble nothing."""
        made = list[_Part]()
        for (rows, data, ends), whole in zip(
            _read(reader, frames, request), frames.whole(request), strict=True
        ):
            for chunk in rows[np.searchsorted(ends, list(starts(data)), "right")].tolist():
                if chunk not in ours and len(ours) < _FILES:
                    ours[chunk] = pool.submit(of_file, chunk)
            hashes, places = samples(data)
            like, found = most_alike((hashes, np.searchsorted(ends, places, "right")), known, len(rows))
            if whole and found * _ALIKE < len(hashes):
                continue
            near = np.unique(np.concatenate([like - 1, like, like + 1])[np.tile(like >= 0, 3)])
            near = near[(near >= 0) & (near < len(lengths))]
            near = near[np.cumsum(lengths[near]) <= _DICTIONARY_BYTES]
            ranges = zip(bounds[near].tolist(), bounds[near + 1].tolist(), strict=True)
            made.append((rows, near, pack(data.data, b"".join(old.data[a:b] for a, b in ranges))))
        return made

    def of_file(chunk: int) -> list[_Part]:
        """The frame of a file of gzip's that begins in a chunk, read once more, if the former version has one."""
        if not theirs.result():
            return []
        rows = missing[missing >= chunk][:_FILE_CHUNKS]
        data, begins, _, seeming = _spooled(reader, rows, place / str(chunk))
        for one in files(data, begins, [head for head in seeming if head < begins[1]]):
            other = min(theirs.result(), key=lambda other: abs(len(other[-1]) - len(one[-1])))
            return [(rows[slice(*one[0])], np.arange(*other[0]), pack_file(one, other))]
        return []

    def parts_of(rows: Numbers) -> list[_Part]:
        return list(chain.from_iterable(reader.each(rows, work, pool, _REQUEST_BYTES)))

    parts, layout = parts_of(missing), reader.layout()
    frames, sizes = layout.chunk_frames, layout.frames["size"]
    for part in chain.from_iterable(future.result() for _, future in sorted(ours.items())):
        if len(part[2]) > _SAVES * sizes[np.unique(frames[part[0]])].sum():  # it was another file's work
            continue
        beside = np.isin(frames, frames[part[0]])  # nobody is to fetch a file's frame for what is beside it
        again = [other[0] for other in parts if beside[other[0]].any()]
        rest = np.concatenate([missing[beside[missing]], *again])
        parts = [other for other in parts if not beside[other[0]].any()]
        parts += [part, *parts_of(np.setdiff1d(rest, part[0]))]
    return parts


def _read(
    reader: ImageReader, frames: Frames, request: slice
) -> Iterator[tuple[Numbers, npt.NDArray[np.uint8], Numbers]]:
    """For each frame the rows of its wanted chunks, their bytes, and where in these each ends.

    They are not hashed, as their frames were: who uses an update believes nothing.
    """
    for frame, stored in enumerate(frames.read(request, reader.store().backend), request.start):
        rows, pieces = frames.rows(frame), frames.cut(frame, frames.expand(frame, stored))
        yield frames.chunks[rows], np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(frames.lengths[rows])


def _spooled(reader: ImageReader, rows: Numbers, path: Path, pool: Executor | None = None) -> _Spool:
    """Read chunks of an image into a file: written, as a new file's mapped pages cost more than the copy."""
    bounds, found, heads = firsts(reader.manifest.lengths[rows]), list[Samples](), list[int]()

    def work(frames: Frames, request: slice) -> None:
        for chunks, data, ends in _read(reader, frames, request):
            at = np.searchsorted(rows, chunks)
            shifts = bounds[at + 1] - ends  # from where they are to where they belong
            for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(shifts)) + 1):
                place = int(bounds[at[run[0]]])
                os.pwrite(file.fileno(), data.data[place - shifts[run[0]] : ends[run[-1]]], place)
            hashes, places = samples(data)
            found.append((hashes, at[np.searchsorted(ends, places, "right")]))
            heads.extend(start + int(shifts[np.searchsorted(ends, start, "right")]) for start in starts(data))

    with path.open("wb") as file:
        list(reader.each(rows, work, pool))
    hashes, chunks = map(np.concatenate, zip(*found, strict=True))
    data = np.memmap(path, np.uint8, "r")
    path.unlink()  # its room is free once nobody looks at it
    return data, bounds, (hashes, chunks), sorted(heads)[:_FILES]
