"""Which old chunk a new one resembles most, blind to file systems: both have samples in common.

Wherever two bytes have a certain sum, the 16 that begin there are hashed; the smallest hashes are a chunk's samples,
and each votes for the old one that alone has it (Broder, On the resemblance of documents; sampled by value, not place).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from imagestore.formats.columns import Numbers

_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_TIMES, _SUM, _SAMPLED = np.uint8(5), np.uint8(77), np.uint64(1 << 62)
"""One place in 256 is hashed, not zeros, and one hash in 4 is a sample."""
_WINDOW_BYTES = 1 << 20  # what is computed on the way stays in a processor's cache
Samples = tuple[npt.NDArray[np.uint32], Numbers]
"""Values, and the chunk that each is of."""


def marks(data: npt.NDArray[np.uint8]) -> tuple[Numbers, npt.NDArray[np.uint64]]:
    """Where samples begin, and their hashes."""
    begins = range(0, max(1, len(data)), _WINDOW_BYTES)
    places, hashes = zip(*(_marks(data[at : at + _WINDOW_BYTES + 16], at) for at in begins), strict=True)
    return np.concatenate(places), np.concatenate(hashes)


def _marks(data: npt.NDArray[np.uint8], begin: int) -> tuple[Numbers, npt.NDArray[np.uint64]]:
    places = np.flatnonzero(data[:-16] + data[1:-15] * _TIMES == _SUM)
    windows = np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))
    hashes = (windows[places] * _MIX[0] + windows[places + 8]) * _MIX[1]
    few = hashes < _SAMPLED
    return places[few] + begin, hashes[few]


def samples(data: npt.NDArray[np.uint8], ends: Numbers) -> Samples:
    """Of chunks that lie one after the other in `data` and end there."""
    places, hashes = marks(data)
    chunks = np.searchsorted(ends, places, "right")
    found = np.unique((chunks << 32) | (hashes >> np.uint64(30)).astype(np.int64))
    return found.astype(np.uint32), found >> 32


def meeting(new: npt.NDArray[Any], old: npt.NDArray[Any]) -> tuple[Numbers, Numbers]:
    """Which new values are old ones, too, and where each is among these: of those that are there once."""
    values, first, counts = np.unique(old, return_index=True, return_counts=True)
    values, first = values[counts == 1], first[counts == 1]
    meets = np.flatnonzero(np.isin(new, values))
    return meets, first[np.searchsorted(values, new[meets])]


def most_alike(new: Samples, old: Samples, count: int) -> Numbers:
    """For each of `count` new chunks the old one with most values in common, or -1."""
    best, (meets, there) = np.full(count, -1, np.int64), meeting(new[0], old[0])
    met, votes = np.unique((new[1][meets] << 32) | old[1][there], return_counts=True)
    met = met[np.argsort(votes, kind="stable")]
    best[met >> 32] = met & 0xFFFFFFFF
    return best
