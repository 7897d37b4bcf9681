"""Chunks on their way from packs that exist into new ones: out of nearly dead packs, to and from other stores."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imagestore.disks.windows import in_order
from imagestore.errors import Corrupt
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import Codec, Frame, expand
from imagestore.store.inventory import Table
from imagestore.store.packing import Framer, Packer
from imagestore.store.ranges import plan_requests
from imagestore.store.store import Store


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
    placement, framer = packer.placement, Framer(packer.placement)

    def pack_full() -> None:
        for frame in framer.full():
            packer.add(*frame.compressed())

    for frame, stored in read_frames(source, frames):
        ids = [piece.id for piece in frame.pieces]
        if frame.whole:
            number, lengths = placement.add_frame(), [piece.length for piece in frame.pieces]
            places = [(number, piece.offset) for piece in frame.pieces]
            whole = Frame(frame.codec, bytes(stored), Digest(frame.hash), frame.plain_bytes, lengths, ids)
            packer.add(number, whole)
        else:
            places = [framer.add(chunk, piece.id) for piece, chunk in chunks_of(frame, stored)]
        rows = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32)
        placement.chunks.add(rows, *np.array(places, np.int64).T)
        pack_full()
    framer.close()
    pack_full()
    packer.flush()


def read_frames(store: Store, frames: Iterable[Source]) -> Iterator[tuple[Source, Buffer]]:
    """Frames in the order of packs, with their stored bytes. Raises Corrupt where these have another hash."""
    wanted = sorted(frames, key=lambda frame: (frame.pack, frame.offset))
    number = {pack: at for at, pack in enumerate(dict.fromkeys(frame.pack for frame in wanted))}
    rows = [(number[frame.pack], frame.offset, frame.size) for frame in wanted]
    requests = plan_requests(*np.array(rows, np.int64).reshape(-1, 3).T)

    def read(request: Numbers) -> tuple[list[Source], memoryview]:
        group = [wanted[at] for at in request.tolist()]
        start, key = group[0].offset, PACKS.key(group[0].pack)
        return group, memoryview(
            store.backend.get(key, start, group[-1].offset + group[-1].size - start).data
        )

    with ThreadPoolExecutor(4) as pool:
        for group, data in in_order(pool, read, requests, 4):
            for frame in group:
                stored = data[frame.offset - group[0].offset :][: frame.size]
                if Digest.of(stored) != frame.hash:
                    raise Corrupt(
                        f"the frame at byte {frame.offset} of pack {frame.pack} in {store.url} is damaged",
                        hint="sf store verify --full",
                    )
                yield frame, stored


def chunks_of(frame: Source, stored: Buffer) -> Iterator[tuple[Piece, Buffer]]:
    """The wanted chunks of a frame. Raises Corrupt where it does not decompress, or to other chunks."""
    plain = memoryview(expand(frame.codec, stored, frame.plain_bytes))
    for piece in frame.pieces:
        chunk = plain[piece.offset : piece.offset + piece.length]
        if Digest.of(chunk) != piece.id:
            raise Corrupt(f"a chunk in pack {frame.pack} is not what its id says")
        yield piece, chunk
