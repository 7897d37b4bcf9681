"""A frame of an update: chunks with old ones as their dictionary; or all chunks of a file that gzip compressed.

One changed byte changes all of such a file, not what it expands to. Its frame has what is before and after the deflate
stream in its chunks, and what that expands to, of which gzip makes it again: by block where the old one's contents have
something alike, and what differs from that. (zstd needs a second to find it, with all of that as a dictionary.)
"""

import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Lock

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore.errors import Corrupt
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer
from imagestore.formats.pack import LEVEL
from imagestore.updates.similar import meeting, once, samples

_MAGIC, _HEAD, _LOCK = b"sf-gzip2", struct.Struct("<8s4I"), Lock()  # one such file in memory at a time
_FIRST, _STORED, _LEAST, _PLAIN, _TRIED, _LAST_BLOCK = 1 << 18, 48 << 20, 8 << 20, 60 << 20, 1 << 19, 1 << 16
_BLOCK, _SLAB, _NOWHERE = 256, 1 << 11, 1 << 30  # so many blocks at once stay in a processor's cache
_FAST = {"strategy": zstandard.STRATEGY_FAST, "min_match": 6, "window_log": 24}
File = tuple[tuple[int, int], int, bytes, bytes, bytes]
"""The chunks that it is in; its place in these, what they have before and after its stream, what that expands to."""


def starts(data: npt.NDArray[np.uint8]) -> Iterator[int]:
    """Where large files seem to begin in some chunks: at sectors. Others' may all seem to, so the work is bounded."""
    left = _PLAIN
    for start in (512 * np.flatnonzero(data[:-9:512] == 31)).tolist():
        one, head = zlib.decompressobj(31), bytes(data[start : start + 9])
        if left > 0 and head[1:3] == b"\x8b\x08" and head[3] in (0, 8) and not head[8]:  # `gzip -9` writes 2
            with suppress(zlib.error):
                plain = one.decompress(data.data[start : start + _FIRST], _LEAST + 1)
                left -= len(plain)
                if len(plain) > _LEAST or not one.eof:
                    yield start


def files(
    data: npt.NDArray[np.uint8], firsts: Numbers, heads: Sequence[int], *, again: bool = True
) -> Iterator[File]:
    """Large ones that begin at some places, in chunks from `firsts` on; `again`: that gzip seems to make again."""
    view, end = memoryview(data.data), 0
    for start in heads:
        one, plain = zlib.decompressobj(31), b""
        with suppress(zlib.error):
            plain = one.decompress(view[start : start + _STORED], _PLAIN) if start >= end else b""
        if one.eof and len(plain) > _LEAST:
            name = bytes(view[start + 10 : start + _FIRST]) if data[start + 3] else b""
            stream = start + 10 + name.find(0) + 1
            begun = _deflated(plain[:_TRIED])[:-_LAST_BLOCK] if again else view[stream : stream + 1]
            end = min(start + _STORED, len(data)) - len(one.unused_data)
            if begun and view[stream : stream + len(begun)] == begun:
                first, last = np.searchsorted(firsts, (start, end), "right") - (1, 0)
                begin, stop = firsts[[first, last]].tolist()
                around = bytes(view[begin:stream]), bytes(view[end - 8 : stop])
                yield (int(first), int(last)), start - begin, *around, plain


def pack(plain: Buffer, base: bytes) -> bytes:
    """A frame of chunks."""
    raw = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    # A table with room for the dictionary: the level's own would have forgotten its beginning.
    log = 17 if len(base) < 1 << 20 else 18
    params = zstandard.ZstdCompressionParameters.from_level(LEVEL, **_FAST, hash_log=log)
    return zstandard.ZstdCompressor(dict_data=raw, compression_params=params).compress(plain)


def pack_file(one: File, other: File) -> bytes:
    """A frame of a file, for who has the chunks of another."""
    (*_, before, after, plain), (_, start, *_, base) = one, other
    (hashes, places), (old_hashes, old) = (samples(np.frombuffer(data, np.uint8)) for data in (plain, base))
    values, lone = once(old_hashes)
    meets, there = meeting(hashes, values)
    shifts = np.append(old[lone[there]] - places[meets], _NOWHERE)
    left = np.zeros((-(-len(plain) // _BLOCK), _BLOCK), np.uint8)
    left.reshape(-1)[: len(plain)] = np.frombuffer(plain, np.uint8)
    at, base = _BLOCK * np.arange(len(left)), base + bytes(_BLOCK)
    shift = shifts[np.searchsorted(places[meets], at + 2 * _BLOCK) - 1]
    for begin in range(0, len(left), _SLAB):
        some = slice(begin, begin + _SLAB)
        apart = left[some] ^ _old_blocks(base, at[some] + shift[some])
        alike = np.count_nonzero(apart.view(np.uint64), axis=1) <= _BLOCK // 16  # half of its words
        left[some][alike] = apart[alike]
        shift[some][~alike] = _NOWHERE
    body = b"".join((shift.astype("<i4").data, before, after, left.data))
    return _HEAD.pack(_MAGIC, start, len(before), len(after), len(plain)) + pack(body, b"")


def unpack(frame: Buffer, base: bytes, size: int) -> bytes:
    """The chunks of a frame, `size` bytes. Raises Corrupt, ZstdError, zlib.error, struct.error, OSError."""
    if frame[: len(_MAGIC)] != _MAGIC:
        return _expand(frame, base, size)
    with _LOCK:
        _, start, before, after, length = _HEAD.unpack_from(frame)
        count = -(-length // _BLOCK)
        begin, end = 4 * count, 4 * count + before + after
        if not length or end + count * _BLOCK > 2 * _PLAIN:
            raise Corrupt("an update's file has no size that one may have")
        body = _expand(frame[_HEAD.size :], b"", end + count * _BLOCK)
        base = zlib.decompressobj(31).decompress(memoryview(base)[start:], _PLAIN)
        left = np.frombuffer(body, np.uint8, offset=end).reshape(-1, _BLOCK)
        places = np.frombuffer(body, "<i4", count) + _BLOCK * np.arange(count)
        plain = left ^ _old_blocks(base + bytes(_BLOCK), places)
        stream = _deflated(plain.tobytes()[:length])
        return body[begin : begin + before] + stream + body[begin + before : end]


def _expand(frame: Buffer, base: bytes, size: int) -> bytes:
    if zstandard.frame_content_size(frame) != size:
        raise Corrupt("an update's frame is not as large as its chunks")
    raw = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=raw).decompress(frame, allow_extra_data=False)


def _old_blocks(base: bytes, places: Numbers) -> npt.NDArray[np.uint8]:
    """What a file's old contents have at some places; where that is none, the zeros that were put at their end."""
    none = len(base) - _BLOCK
    at = np.where((places >= 0) & (places < none), places, none)
    return np.ndarray((none + 1, _BLOCK), np.uint8, base, strides=(1, 1))[at]


def _deflated(plain: bytes) -> bytes:
    """The bare stream. Raises OSError where there is no gzip."""
    return subprocess.run(["gzip", "-cn6"], input=plain, capture_output=True).stdout[10:-8]
