"""Which old chunk a new one resembles most, blind to file systems: both have samples in common.

Wherever two bytes have a certain sum, the 16 that begin there are hashed; the smallest hashes are a chunk's samples,
and each votes for the old one that alone has it (Broder, On the resemblance of documents; sampled by value, not place).
"""

import numpy as np
import numpy.typing as npt

from imagestore.formats.columns import Numbers

_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_TIMES, _SUM, _SAMPLED = np.uint8(5), np.uint8(77), np.uint64(1 << 62)
"""One place in 256 is hashed, not zeros, and one hash in 4 is a sample."""
Hashes = npt.NDArray[np.uint64]
Samples = tuple[Hashes, Numbers]  # hashes, and the chunk that each is of


def samples(data: npt.NDArray[np.uint8]) -> tuple[Hashes, Numbers]:
    """Hashes, and where in the data each is from."""
    places = np.flatnonzero(data[:-16] + data[1:-15] * _TIMES == _SUM)
    windows = np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))
    hashes = (windows[places] * _MIX[0] + windows[places + 8]) * _MIX[1]
    few = hashes < _SAMPLED
    return hashes[few], places[few]


def once(hashes: Hashes) -> tuple[Hashes, Numbers]:
    """Those that are there once, sorted, and where each is."""
    values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    return values[counts == 1], first[counts == 1]


def meeting(new: Hashes, old: Hashes) -> tuple[Numbers, Numbers]:
    """Which new ones are among sorted old ones, too, and where each is there."""
    there = np.searchsorted(old, new)
    meets = np.flatnonzero(np.append(old, _SAMPLED)[there] == new)  # no sample is so large
    return meets, there[meets]


def most_alike(new: Samples, old: Samples, count: int) -> tuple[Numbers, int]:
    """For each of `count` new chunks the old one with most values in common, or -1; how many values are old ones'."""
    best, (meets, there) = np.full(count, -1, np.int64), meeting(new[0], old[0])
    met, votes = np.unique((new[1][meets] << 32) | old[1][there], return_counts=True)
    met = met[np.argsort(votes, kind="stable")]
    best[met >> 32] = met & 0xFFFFFFFF
    return best, len(meets)
