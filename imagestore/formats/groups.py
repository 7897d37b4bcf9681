"""The sums of each 4 MiB that a disk's id is made of, kept beside the manifest: a changed disk's id costs what changed.

"sf-groups 1\\n" | header {"groups"} | number of each group (u32, ascending) | its BLAKE3
"""

from collections.abc import Mapping

import numpy as np
from blake3 import blake3

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.digest import Digest

GROUP_BYTES = 4 << 20  # changing it changes every disk id
MAGIC = b"sf-groups 1\n"

Groups = Mapping[int, bytes]
"""Number of each group that is not all zero → BLAKE3 of a bitmap of its non-zero blocks and of these blocks."""


def disk_id(size_bytes: int, groups: Groups) -> Digest:
    """BLAKE3 over the size and, of each group that is not all zero, its number and sum."""
    whole = blake3(b"sf-disk 1\n" + size_bytes.to_bytes(8, "little"))
    for number, sum_ in sorted(groups.items()):
        whole.update(number.to_bytes(8, "little") + sum_)
    return Digest(whole.digest())


def encode(groups: Groups) -> bytes:
    """The object's bytes."""
    sums = np.frombuffer(b"".join(groups[number] for number in sorted(groups)), np.uint8)
    return columns.encode(MAGIC, {"groups": len(groups)}, np.array(sorted(groups), "<u4"), sums)


def decode(data: bytes, size_bytes: int, wanted: Digest) -> dict[int, bytes]:
    """Those of the disk with this size and id. Raises Corrupt."""
    read = columns.Reader(data, MAGIC, "group sums", {"groups"})
    count = read.count("groups", -(-size_bytes // GROUP_BYTES))
    numbers, sums = read.column("<u4", count), read.ids(count)
    read.end()
    groups = dict(zip(numbers.tolist(), map(bytes, sums), strict=True))
    if disk_id(size_bytes, groups) != wanted:
        raise Corrupt("group sums: they are another disk's")
    return groups
