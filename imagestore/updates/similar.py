"""Which old chunk a new one resembles most, blind to file systems: both have samples in common.

Wherever two bytes meet a mask, the 16 that begin there are hashed; the smallest hashes are a chunk's samples, and
each votes for the first old one that has it (Broder, On the resemblance of documents; sampled by value, not place).
"""

import numpy as np
import numpy.typing as npt

from imagestore.formats.columns import Numbers

_PAIR, _MIX = np.uint16(0x9E37), np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_HASHED, _SAMPLED = np.uint16(1 << 10), np.uint64(1 << 60)
"""One place in 64 is hashed, one hash in 16 is a sample."""
Samples = tuple[npt.NDArray[np.uint32], Numbers]
"""Values, and the chunk that each is of."""


def samples(data: npt.NDArray[np.uint8], ends: Numbers) -> Samples:
    """Of chunks that lie one after the other in `data` and end there."""
    pairs = (np.ndarray(max(0, len(data) - 16) // 2, "<u2", data, odd) for odd in (0, 1))
    found_at = [2 * np.flatnonzero(two * _PAIR + _PAIR < _HASHED) + odd for odd, two in enumerate(pairs)]
    places = np.concatenate(found_at)
    windows = np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))
    hashes = (windows[places] * _MIX[0] + windows[places + 8]) * _MIX[1]
    few = np.flatnonzero(hashes < _SAMPLED)
    chunks = np.searchsorted(ends, places[few], "right")
    found = np.unique((chunks << 32) | (hashes[few] >> np.uint64(28)).astype(np.int64))
    return found.astype(np.uint32), found >> 32


def most_alike(new: Samples, old: Samples, count: int) -> Numbers:
    """For each of `count` new chunks the old one with most values in common, or -1."""
    best, (values, first) = np.full(count, -1, np.int64), np.unique(old[0], return_index=True)
    if len(values):
        place = np.minimum(np.searchsorted(values, new[0]), len(values) - 1)
        meets = values[place] == new[0]
        pairs = (new[1][meets] << 32) | old[1][first[place[meets]]]
        met, votes = np.unique(pairs, return_counts=True)
        met = met[np.argsort(votes, kind="stable")]
        best[met >> 32] = met & 0xFFFFFFFF
    return best
