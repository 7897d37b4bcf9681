"""How chunk, frame and zstd parameters trade bytes for time: the figures behind docs/adr/0003-chunking.md.

Counts what A (a full Debian disk) costs and what A2 and B add after it, for each setting alone; nothing is stored.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zstandard
from guest_images.debian_image import corpus

from benchmarks._harness import Bench
from imagestore.disks.filesystems import look
from imagestore.disks.open import open_disk
from imagestore.disks.windows import Special, Windows
from imagestore.formats.chunking import ChunkerParams

KIB = 1 << 10
_PLAIN = Special(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))


def _chunks(path: Path, params: ChunkerParams, cuts: bool) -> Iterator[tuple[bytes, memoryview]]:
    with open_disk(path, "raw") as disk, ThreadPoolExecutor(2) as pool:
        special = look(disk, sparsify=False) if cuts else _PLAIN
        for window in Windows(disk, params, pool, special):
            view = window.data.data
            for at, (start, length) in enumerate(
                zip(window.starts.tolist(), window.lengths.tolist(), strict=True)
            ):
                yield window.ids[at].tobytes(), view[start : start + length]


def _stored(chunks: Iterator[tuple[bytes, memoryview]], known: set[bytes], frame: int, level: int) -> int:
    """Bytes of the frames of the chunks that are not `known`, which they are afterwards."""
    compressor, total, pieces, filled = zstandard.ZstdCompressor(level=level), 0, [], 0
    for id_, data in chunks:
        if id_ in known:
            continue
        known.add(id_)
        if filled + len(data) > frame and pieces:
            total += len(compressor.compress(b"".join(pieces)))
            pieces, filled = [], 0
        pieces.append(data)
        filled += len(data)
    return total + (len(compressor.compress(b"".join(pieces))) if pieces else 0)


def run(bench: Bench) -> None:
    disks = corpus()
    settings = [
        ("c16", 16, 640, 3, True), ("c32", 32, 640, 3, True), ("c64", 64, 640, 3, True),
        ("c32_nocuts", 32, 640, 3, False), ("c16_nocuts", 16, 640, 3, False), ("f128", 32, 128, 3, True),
        ("f256", 32, 256, 3, True), ("f512", 32, 512, 3, True), ("f1024", 32, 1024, 3, True),
        ("z1", 32, 640, 1, True), ("z2", 32, 640, 2, True), ("z5", 32, 640, 5, True),
    ]  # fmt: skip
    only = os.environ.get("SF_BENCH_ONLY", "").split()
    for name, average, frame, level, cuts in settings:
        if only and name not in only:
            continue
        params = ChunkerParams("blocks-1", max(4, average // 4) * KIB, average * KIB, 4 * average * KIB)
        known: set[bytes] = set()
        for disk in ("A", "A2", "B"):
            before, began = len(known), time.process_time()
            size = _stored(_chunks(disks[disk], params, cuts), known, frame * KIB, level)
            bench.number(f"{name}_{disk.lower()}", size, "B")
            if disk == "A":
                bench.number(f"{name}_a_cpu", time.process_time() - began, "s")
                bench.number(f"{name}_a_chunks", len(known) - before, "chunks")
