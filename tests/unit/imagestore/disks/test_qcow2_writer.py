"""The deterministic qcow2 is a disk that qemu agrees with, and any range of it is what the whole has there."""

import json
import subprocess
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from imagestore.disks.qcow2 import writer as qcow2_writer
from imagestore.formats.chunking import ChunkerParams
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import Manifest

BLOCK = 4096


def make_manifest(size_bytes: int, runs: list[tuple[int, int]]) -> Manifest:
    """One chunk per (block, bytes)."""
    return Manifest(
        size_bytes=size_bytes,
        architecture="x86_64",
        chunker=ChunkerParams(),
        disk_id=Digest.of(b""),
        run_offsets=np.array([block * BLOCK for block, _ in runs], np.uint64),
        run_chunks=np.ones(len(runs), np.uint32),
        lengths=np.array([length for _, length in runs], np.uint32),
        ids=np.zeros((len(runs), 32), np.uint8),
    )


def make_disk(manifest: Manifest, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(manifest.size_bytes)
        for number, (offset, length, _) in enumerate(manifest.chunks()):
            file.seek(offset)
            file.write(np.random.default_rng(number).bytes(length))


def read(image: qcow2_writer.Qcow2, disk: bytes, start: int, length: int) -> bytes:
    out = b""
    for piece in image.segments(start, length):
        if isinstance(piece, bytes):
            out += piece
        else:
            out += disk[piece[0] : piece[0] + piece[1]].ljust(piece[1], b"\0")
    return out


def check_with_qemu(manifest: Manifest, directory: Path) -> None:
    raw, qcow2 = directory / "disk.raw", directory / "disk.qcow2"
    make_disk(manifest, raw)
    disk = raw.read_bytes() if manifest.size_bytes < 1 << 30 else b""
    image = qcow2_writer.plan(manifest)
    with qcow2.open("wb") as file:
        for piece in image.segments(0, image.size_bytes):
            if isinstance(piece, tuple):
                with raw.open("rb") as source:
                    source.seek(piece[0])
                    file.write(source.read(piece[1]).ljust(piece[1], b"\0"))
            else:
                file.write(piece)
    assert qcow2.stat().st_size == image.size_bytes
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", qcow2], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", qcow2, raw], check=True)
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", "-f", "qcow2", qcow2]))
    assert info["virtual-size"] == -(-manifest.size_bytes // 512) * 512
    if disk:
        whole = qcow2.read_bytes()
        for start, length in ((0, 700), (len(image.metadata) - 5, 70_000), (len(whole) - 3, 9)):
            assert read(image, disk, start, length) == whole[start : start + length]


def test_qemu_agrees_on_an_empty_disk_a_full_one_and_odd_sizes(tmp_path: Path) -> None:
    check_with_qemu(make_manifest(0, []), tmp_path)
    check_with_qemu(make_manifest(1 << 20, []), tmp_path)
    full = [(block, 65536) for block in range(0, 512, 16)]
    check_with_qemu(make_manifest(2 << 20, full), tmp_path)
    check_with_qemu(make_manifest(5 * BLOCK + 77, [(1, BLOCK), (3, 2 * BLOCK + 77)]), tmp_path)


def test_qemu_agrees_on_a_sparse_terabyte(tmp_path: Path) -> None:
    far = [(0, BLOCK), (1 << 20, 131072), ((1 << 28) - 2, 2 * BLOCK)]
    check_with_qemu(make_manifest(1 << 40, far), tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 32)), max_size=12),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
)
def test_any_range_is_what_the_whole_has_there(gaps: list[tuple[int, int]], start: int, length: int) -> None:
    runs, block = [], 0
    for gap, blocks in gaps:
        runs.append((block + gap + 1, blocks * BLOCK))
        block += gap + 1 + blocks
    manifest = make_manifest((block + 1) * BLOCK, runs)
    disk = bytearray(manifest.size_bytes)
    for number, (offset, size, _) in enumerate(manifest.chunks()):
        disk[offset : offset + size] = np.random.default_rng(number).bytes(size)
    image = qcow2_writer.plan(manifest)
    whole = read(image, bytes(disk), 0, image.size_bytes)
    assert len(whole) == image.size_bytes
    assert read(image, bytes(disk), start, length) == whole[start : start + length]
