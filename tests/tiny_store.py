"""Small images written straight into a backend, and backends that misbehave: for tests of what reads a store."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import zstandard

from imagestore.backends.protocol import Backend, Object, ObjectStat
from imagestore.formats.chunking import ChunkerParams
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import LAYOUTS, MANIFESTS, PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import Frame, compress, make_pack
from imagestore.store.store import Store

CHUNK = 32 << 10


def disk(seed: int, chunks: int, hole_every: int = 5) -> bytes:
    """A disk of `chunks` 32-KiB chunks, some of them holes; text-like, so that it compresses a little."""
    rng = random.Random(seed)
    parts = []
    for at in range(chunks):
        if hole_every and at % hole_every == hole_every - 1:
            parts.append(bytes(CHUNK))
        else:
            parts.append(bytes(rng.choices(range(64), k=64)) + rng.randbytes(CHUNK - 64))
    return b"".join(parts)


def put_image(store: Store, data: bytes, *, frame_chunks: int = 4) -> Digest:
    """Write manifest, layout and one pack for `data`."""
    pieces = [(at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
    pieces = [(at, piece) for at, piece in pieces if piece.strip(b"\0")]
    runs: list[list[int]] = []
    for at, piece in pieces:
        if runs and runs[-1][0] + runs[-1][2] == at:
            runs[-1][1] += 1
            runs[-1][2] += len(piece)
        else:
            runs.append([at, 1, len(piece)])
    ids = [Digest.of(piece) for _, piece in pieces]
    manifest = Manifest(
        size_bytes=len(data),
        architecture="x86_64",
        chunker=ChunkerParams(),
        disk_id=Digest.of(data),
        run_offsets=np.array([run[0] for run in runs], np.uint64),
        run_chunks=np.array([run[1] for run in runs], np.uint32),
        lengths=np.array([len(piece) for _, piece in pieces], np.uint32),
        ids=np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32),
    )
    encoded = manifest.encode()
    digest = Digest.of(encoded)
    packed_frames, compressor = list[Frame](), zstandard.ZstdCompressor(level=3)
    frames = [range(at, min(at + frame_chunks, len(pieces))) for at in range(0, len(pieces), frame_chunks)]
    for members in frames:
        plain = b"".join(pieces[i][1] for i in members)
        codec, packed = compress(compressor, plain)
        lengths = [len(pieces[i][1]) for i in members]
        packed_frames.append(
            Frame(codec, packed, Digest.of(packed), lengths, b"".join(ids[i] for i in members))
        )
    name, footer, parts = make_pack(packed_frames)
    places = (footer.frame_of_chunk.astype(np.uint32), footer.offset_in_frame.astype(np.uint32))
    layout = Layout(digest, (name,), footer.frames(), *places)
    store.backend.put(PACKS.key(name), parts)
    store.backend.put(LAYOUTS.key(digest), layout.encode())
    store.backend.put(MANIFESTS.key(digest), encoded)
    return digest


class Meddled:
    """A backend whose answers to `get` of packs go through `meddle`; counts what was asked for."""

    def __init__(self, inner: Backend, meddle: Callable[[bytes], bytes] | None = None) -> None:
        self.inner = inner
        self.url = "meddled+" + inner.url
        self.read_only, self.conditional = inner.read_only, inner.conditional
        self.meddle = meddle
        self.delay_s = 0.0
        self.lock = threading.Lock()
        self.ranges: list[tuple[int, int]] = []

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        if not key.startswith("packs/"):
            return self.inner.get(key, start, length)
        with self.lock:
            self.ranges.append((start, length or 0))
        time.sleep(self.delay_s)
        found = self.inner.get(key, start, length)
        return Object(self.meddle(found.data), found.stat) if self.meddle else found

    def stat(self, key: str) -> ObjectStat:
        return self.inner.stat(key)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        return self.inner.list(prefix)

    def put(
        self,
        key: str,
        data: Buffer | Sequence[Buffer],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectStat:
        return self.inner.put(key, data, if_match=if_match, if_none_match=if_none_match)

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        self.inner.delete(key, if_match=if_match)

    def now(self) -> float:
        return self.inner.now()

    def close(self) -> None:
        self.inner.close()
