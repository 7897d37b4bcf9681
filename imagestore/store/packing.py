"""Chunks into frames, frames into packs, packs into a store."""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np

from imagestore.formats import columns
from imagestore.formats.columns import Ids, Numbers
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest, Pages
from imagestore.formats.pack import FRAME_BYTES, KEPT, Codec, Footer, Frame, compress, make_pack
from imagestore.store import index
from imagestore.store.frames import Loaded
from imagestore.store.leases import Lease
from imagestore.store.placement import Placement
from imagestore.store.store import Store

PACK_BYTES = 16 << 20  # a pack is sent when it has so many stored bytes
_PACK_FRAMES = 1 << 12
"""Or so many frames, where they compress to next to nothing: readers take no larger footer (`Footer.decode`)."""
_PART_PACKS = 1 << 10
"""Most packs of one index part: some 60 MB of footers. No object may be of more than a GiB (`MAX_BYTES`)."""
_UPLOADS = 2


@dataclass(slots=True)
class OpenFrame:
    """A frame being filled: its number in the placement, its chunks' bytes and ids."""

    number: int
    chunks: list[Buffer] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    plain_bytes: int = 0

    def compressed(self) -> tuple[int, Frame]:
        """Its number and the frame; in any thread."""
        plain: Buffer = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        codec, data = compress(KEPT.compressor, plain)
        lengths = [len(chunk) for chunk in self.chunks]
        return self.number, Frame(codec, bytes(data), Digest.of(data), lengths, b"".join(self.ids))


class Framer:
    """Gathers chunks into frames in the order in which they come."""

    def __init__(self, placement: Placement) -> None:
        self._placement, self._frames = placement, list[OpenFrame]()

    def add(self, chunks: Iterable[Buffer], ids: Ids) -> None:
        """Put chunks into frames, and what these are called and where they lie into the placement."""
        places = list[tuple[int, int]]()
        for chunk, id_ in zip(chunks, ids, strict=True):
            if not self._frames or self._frames[-1].plain_bytes + len(chunk) > FRAME_BYTES:
                self._frames.append(OpenFrame(self._placement.add_frame()))
            frame = self._frames[-1]
            places.append((frame.number, frame.plain_bytes))
            frame.chunks.append(chunk)
            frame.ids.append(id_.tobytes())
            frame.plain_bytes += len(chunk)
        if places:
            self._placement.chunks.add(ids, *np.array(places, np.int64).T)

    def full(self, *, last: bool = False) -> list[OpenFrame]:
        """Frames to compress, each once; `last`: also the one that is being filled."""
        count = len(self._frames) - (not last)
        full, self._frames = self._frames[:count], self._frames[count:]
        return full


class Packer(AbstractContextManager["Packer"]):
    """Makes packs of frames and uploads them while the next fill. A context manager that owns its threads.

    What it needs for this others use as well: a lease (not begun yet) for `what`, and the placement.
    """

    def __init__(self, store: Store, what: str, local: index.LocalIndex | None = None) -> None:
        self.store, self.local, self.lease, self.placement = store, local, Lease(store, what), Placement()
        self.hooks: tuple[Hooks, str | None] | None = None  # as they are, where that is known
        self._salt, self._repairs = self.lease.id, 0
        self._filling, self._filled_bytes = list[tuple[int, Frame]](), 0
        self._senders = ThreadPoolExecutor(_UPLOADS, "sf-upload")
        self._uploads: deque[Future[int]] = deque()
        self._unpublished: list[tuple[Digest, Footer]] = []
        self.written_bytes = 0

    def __exit__(self, *_: object) -> None:
        self._senders.shutdown(cancel_futures=True)

    def add(self, number: int, frame: Frame) -> None:
        """Append the frame with this number in the placement."""
        self._filling.append((number, frame))
        self._filled_bytes += len(frame.data)
        if self._filled_bytes >= PACK_BYTES or len(self._filling) == _PACK_FRAMES:
            self._send()

    def pack(self, frames: Iterable[OpenFrame]) -> None:
        """Compress and append these frames."""
        for frame in frames:
            self.add(*frame.compressed())

    def flush(self) -> None:
        """Send the last pack too; returns when all have arrived."""
        if self._filling:
            self._send()
        while self._uploads:
            self.written_bytes += self._uploads.popleft().result()

    def _send(self) -> None:
        numbers, frames = zip(*self._filling, strict=True)
        digest, footer, pieces = make_pack(frames, self._salt)
        self.lease.made(digest)
        self.placement.packed(numbers, digest, footer)
        self._unpublished.append((digest, footer))
        self._filling, self._filled_bytes = [], 0
        while len(self._uploads) >= _UPLOADS:
            self.written_bytes += self._uploads.popleft().result()
        self._uploads.append(self._senders.submit(self._upload, digest, footer, pieces))

    def _upload(self, digest: Digest, footer: Footer, pieces: Sequence[Buffer]) -> int:
        """In a sender; the bytes written. The hint comes first: who was killed in between finds out by asking."""
        if self.local is not None:
            self.local.keep_pack(digest, footer)
        self.store.backend.put(PACKS.key(digest), pieces)
        return sum(len(piece) for piece in pieces)

    def avoid(self, packs: Collection[Digest]) -> None:
        """These must not be used: what is made from now on gets other names, also of the same frames."""
        if not packs:
            return
        self.placement.avoid(packs)
        self._unpublished = [(pack, footer) for pack, footer in self._unpublished if pack not in packs]
        self._repairs += 1
        self._salt = f"{self.lease.id}.{self._repairs}"

    def publish_index(self) -> None:
        """Tell other writers of the packs that were made, once."""
        while self._unpublished:
            part = IndexPart(tuple(self._unpublished[:_PART_PACKS]))
            name = index.publish_part(self.store, part, self.hooks)
            if self.local is not None:
                self.local.keep(name, part)
                self.local.forget_packs(pack for pack, _ in part.footers)
            self._unpublished, self.hooks = self._unpublished[_PART_PACKS:], None

    # Pages of manifests and layouts are stored as the chunks of a disk are: whatever knows packs knows pages, and a
    # writer that changes little of an image finds most of its pages in the store.

    def lay_out(self, digest: Digest, manifest: Manifest, rows: Numbers) -> Layout:
        """The layout of an image whose chunks are these rows of the placement: with its pages, packed.

        All packs have arrived when it returns; their index part is still to be published.
        """
        layout = self.placement.layout(digest, rows)
        if not manifest.page_bytes:
            return layout
        bodies = [*manifest.pages(), *layout.own_pages(manifest.page_rows[1])]
        pages, found = self._pack_pages(bodies)
        return self.placement.layout(digest, np.concatenate([rows, found]), pages)

    def _pack_pages(self, bodies: list[bytes]) -> tuple[Pages, Numbers]:
        """Pack those of these pages that are not in the placement; what they are called, and their rows there."""
        framer = Framer(self.placement)
        ids = np.frombuffer(b"".join(map(Digest.of, bodies)), np.uint8).reshape(-1, 32)
        first = columns.first_of_each(ids)
        new = np.sort(first[self.placement.find(ids[first]) < 0])
        framer.add([bodies[at] for at in new.tolist()], ids[new])
        self.pack(framer.full(last=True))
        self.flush()
        return Pages(ids, np.array([len(body) for body in bodies], np.int64)), self.placement.find(ids)

    def move(self, old: Layout, manifest: Manifest, avoid: Collection[Digest]) -> Layout | None:
        """A layout with what it has in packs to avoid where it was packed now, and with pages that say so.

        None if something of it is not there.
        """
        was = old.stored(manifest).ids
        moved = self.placement.moved(old, was, was, avoid)
        if moved is None or not manifest.page_bytes:
            return moved
        bodies, count = moved.own_pages(manifest.page_rows[1]), len(was) - len(old.pages.ids) // 2
        now = np.frombuffer(b"".join(map(Digest.of, bodies)), np.uint8).reshape(-1, 32)
        self._pack_pages([bodies[at] for at in np.flatnonzero((now != was[count:]).any(axis=1)).tolist()])
        self.publish_index()
        lengths = np.append(old.pages.lengths[: len(bodies)], [len(body) for body in bodies])
        old = replace(old, pages=old.pages._replace(lengths=lengths))
        return self.placement.moved(old, was, np.concatenate([was[:count], now]), avoid)


def carry(parts: Iterable[Loaded], packer: Packer) -> None:
    """Chunks out of packs that exist into new ones: frames as they are where all is wanted, else what is wanted.

    Raises what reading them raises.
    """
    placement, framer = packer.placement, Framer(packer.placement)
    for frames, request, stored, pieces in parts:
        numbers = range(request.start, request.stop)
        for frame, whole, data, chunks in zip(numbers, frames.whole(request), stored, pieces, strict=True):
            rows, row = frames.rows(frame), frames.table[frame]
            ids = frames.ids[rows]
            if whole:
                number, lengths = placement.add_frame(), [len(chunk) for chunk in chunks]
                codec, hash_ = Codec(row["codec"]), Digest(row["hash"].tobytes())
                packer.add(number, Frame(codec, bytes(data), hash_, lengths, ids.tobytes()))
                placement.chunks.add(ids, number, frames.inner[rows])
            else:
                framer.add(chunks, ids)
            packer.pack(framer.full())
    packer.pack(framer.full(last=True))
    packer.flush()
