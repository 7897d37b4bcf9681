"""Chunks on their way from packs that exist into new ones: out of nearly dead packs, to and from other stores."""

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore import index
from imagestore.backend import Buffer
from imagestore.digest import Digest
from imagestore.errors import Corrupt, NotFound
from imagestore.inventory import Table
from imagestore.layout import Layout
from imagestore.leases import Lease
from imagestore.manifest import Manifest
from imagestore.pack import FRAME_BYTES, LEVEL, Codec, Footer, Frame, PackWriter, compress, expand
from imagestore.store import Store, derived_key
from imagestore.windows import in_order

PACK_BYTES = 16 << 20
_REQUEST_BYTES = 8 << 20
_GAP_BYTES = 64 << 10


class Piece(NamedTuple):
    """A chunk in a frame: where it starts in the plain bytes, its length, its id."""

    offset: int
    length: int
    id: bytes


@dataclass(frozen=True, slots=True)
class Source:
    """A frame as it lies in a pack, and the chunks of it that are wanted, in order."""

    pack: Digest
    offset: int
    size: int
    plain_bytes: int
    codec: Codec
    hash: bytes
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        """Whether all of the frame is wanted."""
        return sum(piece.length for piece in self.pieces) == self.plain_bytes


class Packer:
    """Makes packs of frames, uploads them, and knows where each chunk lies then."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store, self._lease = store, lease
        self._writer = PackWriter(lease.id)
        self.footers: list[tuple[Digest, Footer]] = []
        """Packs of `places`: made here, or there before (`adopt`)."""
        self._made: list[tuple[Digest, Footer]] = []
        self.places: dict[bytes, tuple[int, int, int]] = {}
        """Chunk id to pack (its number in `footers`), frame in it, offset in the frame."""
        self.written_bytes = 0

    def add(self, frame: Frame) -> None:
        """Append a frame; uploads whenever a pack is full."""
        self._writer.add(frame)
        if self._writer.size_bytes >= PACK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Upload what is there."""
        if not self._writer.size_bytes:
            return
        digest, footer, pieces = self._writer.finish()
        self._lease.made(digest)
        self._store.backend.put(derived_key("packs", digest), pieces)
        self.written_bytes += sum(len(piece) for piece in pieces)
        self._made.append((digest, footer))
        self.adopt(digest, footer)
        self._writer = PackWriter(self._lease.id)

    def adopt(self, pack: Digest, footer: Footer, ids: Collection[bytes] | None = None) -> None:
        """Know where the chunks of a pack lie, or those of `ids`."""
        raw = footer.ids.tobytes()
        rows = zip(footer.frame_of_chunk.tolist(), footer.offset_in_frame.tolist(), strict=True)
        for at, (frame, inner) in enumerate(rows):
            id_ = raw[at * 32 : at * 32 + 32]
            if ids is None or id_ in ids:
                self.places.setdefault(id_, (len(self.footers), frame, inner))
        self.footers.append((pack, footer))

    def forget(self, packs: Collection[Digest]) -> None:
        """These packs must not be used."""
        bad = {number for number, (pack, _) in enumerate(self.footers) if pack in packs}
        self.places = {id_: place for id_, place in self.places.items() if place[0] not in bad}
        self._made = [(pack, footer) for pack, footer in self._made if pack not in packs]

    def publish_index(self) -> None:
        """Tell other writers of the packs that were made, once."""
        if self._made:
            index.publish_part(self._store, index.IndexPart(tuple(self._made)))
        self._made = []


def wanted_frames(
    pack: Digest, table: Table, chosen: npt.NDArray[np.bool_], *, split_above: float
) -> Iterator[Source]:
    """The frames of a pack that hold chosen chunks; all of a frame where a share of up to `split_above` is not."""
    footer, inner = table.footer, table.footer.offset_in_frame
    ids = footer.ids.tobytes()
    ends = np.cumsum(footer.counts, dtype=np.int64)
    used = np.bincount(table.frames[chosen], footer.lengths[chosen], len(ends)) / footer.plain_sizes
    for frame in np.flatnonzero(used).tolist():
        rows = np.arange(ends[frame] - footer.counts[frame], ends[frame])
        if 1 - used[frame] > split_above:
            rows = rows[chosen[rows]]
        pieces = (
            Piece(int(inner[r]), int(footer.lengths[r]), ids[r * 32 : r * 32 + 32]) for r in rows.tolist()
        )
        yield Source(
            pack, int(table.offsets[frame]), int(footer.sizes[frame]), int(footer.plain_sizes[frame]),
            Codec(int(footer.codecs[frame])), footer.hashes[frame].tobytes(), tuple(pieces),
        )  # fmt: skip


def frames_of(manifest: Manifest, layout: Layout, chunks: Iterable[int]) -> Iterator[Source]:
    """The frames that hold some chunks of an image, by its layout alone."""
    ids, lengths, inner = manifest.ids.tobytes(), manifest.lengths, layout.chunk_offsets
    pieces: dict[int, dict[int, Piece]] = {}
    for at in chunks:
        piece = Piece(int(inner[at]), int(lengths[at]), ids[at * 32 : at * 32 + 32])
        pieces.setdefault(int(layout.chunk_frames[at]), {})[piece.offset] = piece
    for frame, found in pieces.items():
        yield Source(
            layout.packs[int(layout.frame_packs[frame])], int(layout.frame_offsets[frame]),
            int(layout.frame_sizes[frame]), int(layout.frame_plain_sizes[frame]),
            Codec(int(layout.frame_codecs[frame])), layout.frame_hashes[frame].tobytes(),
            tuple(found[offset] for offset in sorted(found)),
        )  # fmt: skip


def carry(source: Store, frames: Iterable[Source], packer: Packer) -> None:
    """Read frames, check them, and give them to `packer`: as they are where all is wanted, else what is wanted.

    Raises Corrupt, NotFound.
    """
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    pieces: list[Piece] = []
    loose = bytearray()

    def close() -> None:
        if pieces:
            codec, data = compress(compressor, bytes(loose))
            lengths, ids = [piece.length for piece in pieces], [piece.id for piece in pieces]
            packer.add(Frame(codec, bytes(data), Digest.of(data), len(loose), lengths, ids))
            pieces.clear()
            loose.clear()

    for frame, stored in read_frames(source, frames):
        if Digest.of(stored) != frame.hash:
            raise Corrupt(
                f"a frame of pack {frame.pack} in {source.url} is damaged", hint="sf store verify --full"
            )
        if frame.whole:
            lengths, ids = [piece.length for piece in frame.pieces], [piece.id for piece in frame.pieces]
            packer.add(Frame(frame.codec, bytes(stored), Digest(frame.hash), frame.plain_bytes, lengths, ids))
            continue
        for piece, chunk in chunks_of(frame, stored):
            if Digest.of(chunk) != piece.id:
                raise Corrupt(f"a chunk in pack {frame.pack} in {source.url} is not what its id says")
            if loose and len(loose) + piece.length > FRAME_BYTES:
                close()
            loose.extend(chunk)
            pieces.append(piece)
    close()
    packer.flush()


def read_frames(store: Store, frames: Iterable[Source]) -> Iterator[tuple[Source, Buffer]]:
    """Frames in the order of packs, with their stored bytes: as they came, unchecked."""
    ordered = sorted(frames, key=lambda frame: (frame.pack, frame.offset))
    with ThreadPoolExecutor(4) as pool:
        for group, data in in_order(pool, lambda group: (group, _read(store, group)), _ranges(ordered), 4):
            for frame in group:
                at = frame.offset - group[0].offset
                yield frame, data[at : at + frame.size]


def chunks_of(frame: Source, stored: Buffer) -> Iterator[tuple[Piece, Buffer]]:
    """The wanted chunks of a frame, unchecked. Raises Corrupt where it does not decompress."""
    plain = memoryview(expand(frame.codec, stored, frame.plain_bytes))
    for piece in frame.pieces:
        yield piece, plain[piece.offset : piece.offset + piece.length]


def _ranges(frames: Iterable[Source]) -> Iterator[list[Source]]:
    """Neighbouring frames of a pack, read in one request."""
    group: list[Source] = []
    for frame in frames:
        if group:
            end = group[-1].offset + group[-1].size
            far = frame.pack != group[0].pack or frame.offset - end > _GAP_BYTES
            if far or frame.offset + frame.size - group[0].offset > _REQUEST_BYTES:
                yield group
                group = []
        group.append(frame)
    if group:
        yield group


def _read(store: Store, group: list[Source]) -> memoryview:
    length = group[-1].offset + group[-1].size - group[0].offset
    return memoryview(store.backend.get(derived_key("packs", group[0].pack), group[0].offset, length).data)


def relaid(
    manifest: Manifest,
    digest: Digest,
    packer: Packer,
    old: Layout | None = None,
    avoid: Collection[Digest] = (),
) -> Layout:
    """A layout that takes every chunk from where `old` has it, unless that is a pack to avoid, else from `packer`.

    Raises NotFound for a chunk that is in neither.
    """
    count = len(manifest.lengths)
    rows, inner = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    packs = [*(old.packs if old else ()), *(pack for pack, _ in packer.footers)]
    columns: list[tuple[npt.NDArray[np.int64], ...]] = []
    hashes = [np.zeros((0, 32), np.uint8)]
    first_of: list[int] = []
    total = 0
    if old is not None:
        shunned = np.array([pack in avoid for pack in old.packs], np.bool_)
        keep = ~shunned[old.frame_packs[old.chunk_frames]]
        rows[keep], inner[keep] = old.chunk_frames[keep], old.chunk_offsets[keep]
        columns.append(
            _wide(
                old.frame_packs, old.frame_offsets, old.frame_sizes, old.frame_plain_sizes, old.frame_codecs
            )
        )

        hashes.append(old.frame_hashes)
        total = len(old.frame_packs)
    for number, (_, footer) in enumerate(packer.footers):
        first_of.append(total)
        pack = np.full(len(footer.sizes), number + (len(old.packs) if old else 0))
        columns.append(_wide(pack, footer.offsets, footer.sizes, footer.plain_sizes, footer.codecs))
        hashes.append(footer.hashes)
        total += len(footer.sizes)
    raw = manifest.ids.tobytes()
    for at in np.flatnonzero(rows < 0).tolist():
        place = packer.places.get(raw[at * 32 : at * 32 + 32])
        if place is None:
            raise NotFound(f"a chunk of image {digest} is in no store that was asked")
        rows[at], inner[at] = first_of[place[0]] + place[1], place[2]
    pack_of, offset, size, plain, codec = (np.concatenate(column) for column in zip(*columns, strict=True))
    frames, chunk_frames = np.unique(rows, return_inverse=True)
    used, frame_packs = np.unique(pack_of[frames], return_inverse=True)
    return Layout(
        manifest=digest,
        packs=tuple(packs[at] for at in used.tolist()),
        frame_packs=frame_packs.astype(np.uint32),
        frame_offsets=offset[frames].astype(np.uint32),
        frame_sizes=size[frames].astype(np.uint32),
        frame_plain_sizes=plain[frames].astype(np.uint32),
        frame_codecs=codec[frames].astype(np.uint8),
        frame_hashes=np.concatenate(hashes)[frames],
        chunk_frames=chunk_frames.astype(np.uint32),
        chunk_offsets=inner.astype(np.uint32),
    )


def _wide(*columns: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.int64], ...]:
    return tuple(column.astype(np.int64) for column in columns)
