"""Ranges of packs: which frames one request reads, and which an image had better not use, as they lie too far apart."""

import numpy as np
import numpy.typing as npt

from imagestore.formats.columns import Numbers
from imagestore.formats.pack import MAX_PACK_BYTES

REQUEST_BYTES = 8 << 20
"""Stored bytes that one request asks for at most."""
_READ_OVER, _REQUESTS = 0.12, 1.3
"""Gaps are read over while requests are more than so many times the fewest, up to this share of the bytes."""
_SPARSE, _SCATTERED = 1.22, 1.6
"""A pull may fetch this many times the bytes, in this many times the requests, before chunks are stored again."""


def plan_requests(packs: Numbers, offsets: Numbers, sizes: Numbers) -> list[Numbers]:
    """Frames grouped into ranges of packs, one request each: the smallest gaps between them are read over.

    Of each frame the pack's number, its place there and its stored bytes; what comes back are positions in these.
    """
    order = np.lexsort((offsets, packs))
    packs, starts = packs[order], offsets[order]
    ends = starts + sizes[order]
    gaps = np.where(packs[1:] == packs[:-1], starts[1:] - ends[:-1], MAX_PACK_BYTES)
    smallest = np.argsort(gaps, kind="stable")
    total = int((ends - starts).sum())
    surplus = int(np.count_nonzero(gaps)) + 1 - int(_REQUESTS * total / REQUEST_BYTES)
    few = np.cumsum(gaps[smallest] > 0) <= surplus
    joined = np.zeros(len(order), np.bool_)
    joined[1:][smallest[few & (np.cumsum(gaps[smallest]) <= _READ_OVER * total)]] = True
    joined[1:] |= gaps == 0
    requests, first = [], 0
    for at in range(1, len(order) + 1):
        if at == len(order) or not joined[at] or ends[at] - starts[first] > REQUEST_BYTES:
            requests.append(order[first:at])
            first = at
    return requests


def too_scattered(
    packs: Numbers, starts: Numbers, sizes: Numbers, live: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Frames to leave so that a pull of this image needs few requests and few bytes that it does not use.

    live: how many of each frame's `sizes` stored bytes the image uses. Looked at in zones of packs as large as a
    request: a zone is left as a whole, for a frame left alone would be a gap that is read or that costs a request.
    """
    _, zone = np.unique(packs * MAX_PACK_BYTES + starts // REQUEST_BYTES, return_inverse=True)
    count = int(zone.max(initial=-1)) + 1
    first, last = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(first, zone, starts)
    np.maximum.at(last, zone, starts + sizes)
    needed = np.bincount(zone, live, count)
    waste = last - first - needed
    total = needed.sum()
    order = np.argsort(-waste / np.maximum(needed, 1), kind="stable")
    too_much = waste.sum() - np.concatenate([[0], np.cumsum(waste[order])]) > (_SPARSE - 1) * total
    # A zone that is left needs its share of new requests.
    kept = count - np.arange(count + 1) + np.concatenate([[0], np.cumsum(needed[order])]) / REQUEST_BYTES
    too_many = kept > _SCATTERED * total / REQUEST_BYTES + 4
    left: npt.NDArray[np.bool_] = np.isin(zone, order[: int(np.argmin(too_much | too_many))])
    return left
