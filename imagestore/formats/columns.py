"""Reading and writing the store's binary objects: a magic line, a canonical JSON header, numpy columns.

    magic (one line of ASCII, ends with \\n) | header length (u32) | header | column | column | …

Integers are little-endian. The header is JSON with sorted keys and no spaces; the columns follow in a fixed order
and their lengths follow from the header, so that one value has one encoding.
"""

import json
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt
from imagestore.formats.digest import SIZE_BYTES, Buffer
from imagestore.outside import read_json

MAX_HEADER_BYTES = 1 << 20
Ids = npt.NDArray[np.uint8]  # digests, one per row: shape (n, 32)
Numbers = npt.NDArray[np.int64]
Rows = npt.NDArray[Any]  # of a structured type, as `FRAME`
_NUMBERS = [(name, "<i8") for name in ("pack", "offset", "size", "plain")]
FRAME = np.dtype([*_NUMBERS, ("codec", "u1"), ("hash", "u1", 32)])
"""A frame: the number of its pack, its place in that, stored and plain bytes, codec, BLAKE3 of the stored bytes."""


def encode(magic: bytes, header: dict[str, Any], *columns: npt.NDArray[Any]) -> bytes:
    """The object's bytes; each column's dtype must be little-endian already."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    parts = [magic, len(text).to_bytes(4, "little"), text]
    return b"".join([*parts, *(np.ascontiguousarray(column).tobytes() for column in columns)])


def frame_rows(*of_frames: npt.NDArray[Any] | int) -> Rows:
    """Rows of `FRAME` out of its columns, in their order; the second is an array."""
    rows = np.empty(np.shape(of_frames[1]), FRAME)
    for name, column in zip(FRAME.names or (), of_frames, strict=True):
        rows[name] = column
    return rows


class Columns:
    """Takes columns apart; everything that does not fit exactly is Corrupt."""

    def __init__(self, data: Buffer, what: str) -> None:
        self._data, self._what, self._at = data, what, 0

    def column(self, dtype: str, rows: int) -> npt.NDArray[Any]:
        """The next `rows` values, read-only."""
        size = np.dtype(dtype).itemsize * rows
        if self._at + size > len(self._data):
            raise Corrupt(f"{self._what}: cut short")
        column = np.frombuffer(self._data, dtype, rows, self._at)
        self._at += size
        return column

    def ids(self, rows: int) -> Ids:
        """The next `rows` digests."""
        return self.column("u1", rows * SIZE_BYTES).reshape(rows, SIZE_BYTES)

    def end(self) -> None:
        """Nothing may follow."""
        if self._at != len(self._data):
            raise Corrupt(f"{self._what}: {len(self._data) - self._at} bytes too long")


class Reader(Columns):
    """An encoded object: its header, then its columns."""

    def __init__(self, data: bytes, magic: bytes, what: str, keys: AbstractSet[str]) -> None:
        super().__init__(data, what)
        if not data.startswith(magic):
            raise Corrupt(f"this is no {what} (or one of a newer format)")
        start = len(magic) + 4
        size = int.from_bytes(data[len(magic) : start], "little")
        if size > MAX_HEADER_BYTES or start + size > len(data):
            raise Corrupt(f"{what}: the header is cut short or too long")
        text = data[start : start + size]
        try:
            self.header = read_json(text)
            canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            again = canonical.encode(self.header).encode()
        except ValueError as error:
            raise Corrupt(f"{what}: the header is no JSON: {error}") from error
        if not isinstance(self.header, dict) or again != text:
            raise Corrupt(f"{what}: the header is not in canonical form")
        if self.header.keys() != keys:
            raise Corrupt(f"{what}: keys are missing or unknown")
        self._at = start + size

    def count(self, key: str, limit: int) -> int:
        """A number of rows from the header, 0 to `limit`."""
        value = self.header.get(key)
        if type(value) is not int or not 0 <= value <= limit:
            raise Corrupt(f"{self._what}: bad {key}: {value!r}")
        return value

    def text(self, key: str, limit: int = 4096) -> str:
        """A string from the header."""
        value = self.header.get(key)
        if not isinstance(value, str) or len(value) > limit:
            raise Corrupt(f"{self._what}: bad {key}")
        return value


def starts(lengths: npt.NDArray[Any], counts: npt.NDArray[Any], begins: Numbers | int = 0) -> Numbers:
    """Where each of these begins that adjoin in groups of `counts`, the first of each group at `begins`."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    joined = np.cumsum(lengths, dtype=np.int64) - lengths
    moved: Numbers = joined + np.repeat(begins - joined[np.cumsum(counts) - counts], counts)
    return moved


def first_of_each(ids: Ids) -> npt.NDArray[np.int64]:
    """Where each different digest stands first."""
    rows = np.ascontiguousarray(ids).view(f"V{SIZE_BYTES}").ravel()
    return np.unique(rows, return_index=True)[1]


def keys(ids: Ids) -> npt.NDArray[np.uint64]:
    """The first eight bytes of each digest as a number, to sort and search by; never proof of equality."""
    return np.ascontiguousarray(ids).view("<u8").reshape(-1, 4)[:, 0]


def find_keys(wanted: npt.NDArray[np.uint64], among: npt.NDArray[np.uint64]) -> Numbers:
    """For each key a row of `among` with the same one, the first, or -1."""
    if not len(among):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    at = order[np.minimum(np.searchsorted(among, wanted, sorter=order), len(order) - 1)]
    return np.where(among[at] == wanted, at, -1)


def find(wanted: Ids, among: Ids) -> Numbers:
    """For each digest a row of `among` that holds it, or -1."""
    at = find_keys(keys(wanted), keys(among))
    if len(among):
        at[(among[at] != wanted).any(axis=1)] = -1
    return at
