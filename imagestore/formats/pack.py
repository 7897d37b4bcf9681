"""Packs: frames of neighbouring chunks, appended in disk order, and a footer that names the pack.

    frame | frame | … | footer | footer length (u32) | "sf-pack1"

A frame is up to about 640 KiB of plain chunks, compressed together; its codec is named, its stored bytes have a
hash, so that a cache or a mirror can check one frame alone. The pack's name is the BLAKE3 of its footer. Byte format:
docs/formats.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from threading import local
from typing import Self

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.columns import Ids, Rows
from imagestore.formats.digest import Buffer, Digest

MAGIC = b"sf-footer 1\n"
TRAILER = b"sf-pack1"
FRAME_BYTES = 640 << 10  # a frame is closed before it would grow past this many plain bytes
MAX_FRAME_BYTES = 4 << 20
MAX_PACK_BYTES = 256 << 20
MAX_FRAMES = 1 << 16
MAX_CHUNKS = 1 << 20
LEVEL = 3


class Codec(IntEnum):
    """How a frame is stored. A reader refuses what it does not know (delta frames will be 2)."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A compressed frame on its way into a pack."""

    codec: Codec
    data: Buffer
    hash: Digest
    lengths: Sequence[int]
    ids: bytes  # of its chunks, one after the other


class _Kept(local):
    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


KEPT = _Kept()  # each thread's own


def compress(compressor: zstandard.ZstdCompressor, plain: Buffer) -> tuple[Codec, Buffer]:
    """zstd, or the bytes as they are where that saves less than 1 part in 64."""
    packed = compressor.compress(plain)
    return (Codec.RAW, plain) if len(packed) > len(plain) - len(plain) // 64 else (Codec.ZSTD, packed)


def expand(codec: int, data: Buffer, plain_bytes: int) -> Buffer:
    """The plain bytes of a frame: exactly `plain_bytes`, never more memory than that. Raises Corrupt."""
    if plain_bytes > MAX_FRAME_BYTES:
        raise Corrupt(f"a frame claims {plain_bytes} plain bytes")
    if codec == Codec.RAW:
        plain: Buffer = data
    elif codec == Codec.ZSTD:
        try:
            if zstandard.frame_content_size(data) != plain_bytes:
                raise Corrupt("a frame's content size is not the one its footer says")
            plain = KEPT.decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Corrupt(f"a frame does not decompress: {error}") from error
    else:
        raise Corrupt(f"a frame has codec {codec}, which this version does not know")
    if len(plain) != plain_bytes:
        raise Corrupt("a frame has another length than its footer says")
    return plain


@dataclass(frozen=True, slots=True, eq=False)
class Footer:
    """The table of contents of a pack: columns over its frames and over its chunks."""

    codecs: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.uint32]  # stored bytes of each frame; frames follow each other from offset 0
    plain_sizes: npt.NDArray[np.uint32]
    hashes: Ids  # BLAKE3 of each frame's stored bytes
    counts: npt.NDArray[np.uint32]  # chunks of each frame
    lengths: npt.NDArray[np.uint32]
    ids: Ids
    salt: str = ""  # makes the name new: a pack may not get a name that was, or will be, deleted

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each frame starts in the pack."""
        sizes = self.sizes.astype(np.int64)
        return np.cumsum(sizes) - sizes

    @property
    def data_bytes(self) -> int:
        """Stored bytes of all frames: where the footer starts."""
        return int(self.sizes.sum(dtype=np.uint64))

    @property
    def frame_of_chunk(self) -> npt.NDArray[np.int64]:
        """The frame of each chunk."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)

    @property
    def offset_in_frame(self) -> npt.NDArray[np.int64]:
        """Where each chunk starts in its frame's plain bytes."""
        return columns.starts(self.lengths, self.counts)

    def frames(self, pack: int = 0) -> Rows:
        """The frames, of the pack with this number."""
        return columns.frame_rows(pack, self.offsets, self.sizes, self.plain_sizes, self.codecs, self.hashes)

    def encode(self) -> bytes:
        """The canonical bytes; their BLAKE3 names the pack."""
        header = {"chunks": len(self.lengths), "frames": len(self.sizes), "salt": self.salt}
        small = [a.astype("<u4") for a in (self.sizes, self.plain_sizes, self.counts, self.lengths)]
        return columns.encode(MAGIC, header, self.codecs, *small, self.hashes, self.ids)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read and check an encoded footer. Raises Corrupt."""
        read = columns.Reader(data, MAGIC, "pack footer", {"chunks", "frames", "salt"})
        frames, chunks = read.count("frames", MAX_FRAMES), read.count("chunks", MAX_CHUNKS)
        codecs = read.column("u1", frames)
        sizes, plain_sizes, counts = (read.column("<u4", frames) for _ in range(3))
        lengths, hashes, ids = read.column("<u4", chunks), read.ids(frames), read.ids(chunks)
        footer = cls(codecs, sizes, plain_sizes, hashes, counts, lengths, ids, read.text("salt", 64))
        read.end()
        footer._check()
        return footer

    def _check(self) -> None:
        if not len(self.sizes) or not len(self.lengths):
            raise Corrupt("pack footer: a pack without frames")
        if self.sizes.min() < 1 or self.data_bytes > MAX_PACK_BYTES:
            raise Corrupt("pack footer: a frame's or the pack's size is out of bounds")
        if self.counts.min() < 1 or self.counts.sum(dtype=np.uint64) != len(self.lengths):
            raise Corrupt("pack footer: frames and chunks do not match")
        starts = np.cumsum(self.counts, dtype=np.int64) - self.counts
        plain = np.add.reduceat(self.lengths.astype(np.int64), starts)
        if self.lengths.min() < 1 or (plain != self.plain_sizes).any() or plain.max() > MAX_FRAME_BYTES:
            raise Corrupt("pack footer: chunks do not fill their frames")


def make_pack(frames: Sequence[Frame], salt: str = "") -> tuple[Digest, Footer, list[Buffer]]:
    """The name of the pack of these frames, its footer and the pieces that make its bytes."""
    footer = Footer(
        codecs=np.array([f.codec for f in frames], np.uint8),
        sizes=np.array([len(f.data) for f in frames], np.uint32),
        plain_sizes=np.array([sum(f.lengths) for f in frames], np.uint32),
        hashes=np.frombuffer(b"".join(f.hash for f in frames), np.uint8).reshape(-1, 32),
        counts=np.array([len(f.lengths) for f in frames], np.uint32),
        lengths=np.array([length for f in frames for length in f.lengths], np.uint32),
        ids=np.frombuffer(b"".join(f.ids for f in frames), np.uint8).reshape(-1, 32),
        salt=salt,
    )
    encoded = footer.encode()
    end = len(encoded).to_bytes(4, "little") + TRAILER  # from which the footer is found
    return Digest.of(encoded), footer, [*(f.data for f in frames), encoded + end]
