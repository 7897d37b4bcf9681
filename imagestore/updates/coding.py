"""A frame of an update: chunks with old ones as their dictionary; or all chunks of a file that gzip compressed.

One changed byte changes all of such a file, not what it expands to. Its frame has what is before and after the deflate
stream in its chunks, and what that expands to, of which gzip makes it again; what the old one expands to is before it.
"""

import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore.errors import Corrupt
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer
from imagestore.formats.pack import LEVEL

_MAGIC, _HEAD, _LOCK = b"sf-gzip1", struct.Struct("<8s3I"), Lock()  # one such file in memory at a time
_FIRST, _STORED, _PLAIN, _TRIED, _LAST_BLOCK = 1 << 18, 48 << 20, 60 << 20, 8 << 20, 1 << 17
# Tables with room for the dictionary: the level's own would have forgotten its beginning.
_FAST = {"strategy": zstandard.STRATEGY_FAST, "hash_log": 18, "min_match": 6, "window_log": 24}
_WIDE = {"strategy": zstandard.STRATEGY_GREEDY, "hash_log": 24, "min_match": 6, "window_log": 27}
File = tuple[tuple[int, int], int, bytes, bytes, bytes]
"""The chunks that it is in; its place in these, what they have before and after its stream, what that expands to."""


def files(data: npt.NDArray[np.uint8], firsts: Numbers) -> Iterator[File]:
    """Large ones, at a sector's start, that are gzip's own work as far as that tells, in chunks that begin there."""
    view, end = memoryview(data.data), 0
    blocks = data[: len(data) & -512].reshape(-1, 512)[:, :4] & (255, 255, 255, 247)
    for start in (512 * np.flatnonzero((blocks == (31, 139, 8, 0)).all(1))).tolist():
        one, plain, first, rest = zlib.decompressobj(31), b"", start + _FIRST, start + _STORED
        with suppress(zlib.error):
            plain = one.decompress(view[start:first], _PLAIN) if start >= end else b""
            plain += one.decompress(view[first:rest], _PLAIN) if len(plain) > _FIRST and not one.eof else b""
        if one.eof and _TRIED < len(plain) <= _PLAIN:
            stream = start + 10 + (bytes(view[start + 10 : first]).index(0) + 1 if data[start + 3] else 0)
            again, end = _deflated(plain[:_TRIED])[:-_LAST_BLOCK], min(rest, len(data)) - len(one.unused_data)
            if again and view[stream : stream + len(again)] == again:
                first, last = np.searchsorted(firsts, (start, end), "right") - (1, 0)
                begin, stop = firsts[[first, last]].tolist()
                around = bytes(view[begin:stream]), bytes(view[end - 8 : stop])
                yield (int(first), int(last)), start - begin, *around, plain


def pack(plain: bytes, base: bytes, matcher: dict[str, int] = _FAST) -> bytes:
    """A frame of chunks."""
    raw = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    params = zstandard.ZstdCompressionParameters.from_level(LEVEL, **matcher)
    return zstandard.ZstdCompressor(dict_data=raw, compression_params=params).compress(plain)


def pack_file(one: File, other: File) -> bytes:
    """A frame of a file, for who has the chunks of another."""
    (*_, before, after, plain), (_, start, *_, base) = one, other
    return _HEAD.pack(_MAGIC, start, len(before), len(after)) + pack(before + after + plain, base, _WIDE)


def unpack(frame: Buffer, base: bytes, size: int) -> bytes:
    """The chunks of a frame, `size` bytes. Raises Corrupt, ZstdError, zlib.error, struct.error, OSError."""
    if frame[: len(_MAGIC)] != _MAGIC:
        if zstandard.frame_content_size(frame) != size:
            raise Corrupt("an update's frame is not as large as its chunks")
        raw = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        return zstandard.ZstdDecompressor(dict_data=raw).decompress(frame, allow_extra_data=False)
    with _LOCK:
        (_, start, before, after), frame = _HEAD.unpack_from(frame), frame[_HEAD.size :]
        base = zlib.decompressobj(31).decompress(memoryview(base)[start:], _PLAIN)
        plain = unpack(frame, base, min(zstandard.frame_content_size(frame), 2 * _PLAIN))
        around, stream = plain[: before + after], _deflated(plain[before + after :])
        return around[:before] + stream + around[before:]


def _deflated(plain: bytes) -> bytes:
    """The bare stream. Raises OSError where there is no gzip."""
    return subprocess.run(["gzip", "-cn6"], input=plain, capture_output=True).stdout[10:-8]
