"""A disk that was an image once is stored by a look at what changed: the same image as by a look at all of it."""

import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagestore import (
    Changes,
    Digest,
    NbdDisk,
    Store,
    Unavailable,
    open_store,
    pull,
    push,
    push_changed,
    verify_store,
)
from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.backends.wrappers import Wrapper
from imagestore.disks.disk import RawDisk
from imagestore.errors import Corrupt
from imagestore.formats import groups
from imagestore.formats.keys import GROUPS, SUMS
from tests.world import write_pages

CLUSTER = 1 << 16


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    store = open_store(str(tmp_path / "store"), create=True)
    yield store
    store.backend.close()


class Counting(RawDisk):
    """What is read of it."""

    read_bytes = 0

    def read(self, offset: int, out: memoryview) -> None:
        self.read_bytes += len(out)
        super().read(offset, out)


def changed(
    store: Store, path: Path, base: Digest, stretches: list[tuple[int, int]]
) -> tuple[Digest, int, str]:
    """The digest, the bytes read and the note of a push of what changed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        disk = Counting(descriptor, str(path))
        rows = np.array(stretches, np.int64).reshape(-1, 2)
        result = push_changed(store, disk, Changes(base, rows), {"of": "web"})
        return result.digest, disk.read_bytes, " ".join(result.notes)
    finally:
        os.close(descriptor)


def noisy(rng: random.Random, size: int) -> bytearray:
    data = bytearray(size)
    for at in range(0, size, 1 << 19):
        if rng.random() < 0.6:
            data[at : at + (1 << 19)] = rng.randbytes(min(1 << 19, size - at))
    return data


@pytest.mark.parametrize("seed", range(12))
def test_whatever_changed_it_is_the_image_that_a_look_at_everything_finds(
    store: Store, tmp_path: Path, seed: int
) -> None:
    rng, path = random.Random(seed), tmp_path / "disk"
    size = rng.choice([24 << 20, (24 << 20) + 4096 * 3, (20 << 20) + 512, 5 << 20])
    data = noisy(rng, size)
    path.write_bytes(data)
    base = push(store, path, "web", format_="raw").digest
    if rng.random() < 0.5:
        data += bytes(rng.choice([0, 4096, 9 << 20]) // 512 * 512)
    stretches = []
    for _ in range(rng.randrange(8)):
        at = rng.randrange(len(data) // CLUSTER) * CLUSTER
        end = min(at + CLUSTER * rng.randrange(1, 4), len(data))
        middle = rng.randrange(at, end, 512)
        data[middle:end] = rng.choice([rng.randbytes, bytes])(end - middle)
        stretches.append((at, end))
    path.write_bytes(data)
    digest, _, note = changed(store, path, base, sorted(set(stretches)))
    manifest = store.manifest(digest)
    assert note == "" and manifest.parent == base and dict(manifest.labels) == {"of": "web"}
    assert manifest.disk_id == store.manifest(push(store, path, "all", format_="raw").digest).disk_id
    store.names.set("kept", "1", "x86_64", digest)
    pull(store, digest, tmp_path / "out", format_="raw")
    assert (tmp_path / "out").read_bytes() == data
    assert not verify_store(store, full=True).problems


def test_a_small_change_of_a_large_disk_reads_little_and_adds_little(store: Store, tmp_path: Path) -> None:
    path, data = tmp_path / "disk", bytearray(random.Random(1).randbytes(64 << 20))
    path.write_bytes(data)
    base = push(store, path, "web", format_="raw").digest
    data[30 << 20 : (30 << 20) + 8192] = random.Random(2).randbytes(8192)
    path.write_bytes(data)
    digest, read, _ = changed(store, path, base, [(30 << 20, (30 << 20) + CLUSTER)])
    assert read < 5 << 20
    before, after = (set(map(bytes, store.manifest(d).ids)) for d in (base, digest))
    assert len(after - before) <= 4


class Asked(Wrapper):
    """Counts requests; a list is one."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.requests = Counter[str]()

    def _do(self, verb: str, key: str, action: Any) -> Any:
        self.requests[f"{verb} {key.partition('/')[0]}"] += verb != "now"
        return action()

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        self.requests[f"list {prefix}"] += 1
        return self.inner.list(prefix)


@pytest.mark.parametrize("pages", [None, 1 << 20])
def test_a_snapshot_makes_at_most_twenty_requests(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int | None
) -> None:
    monkeypatch.setattr("imagestore.store.packing.PACK_BYTES", 4 << 20)
    write_pages(pages)
    try:
        path, data = tmp_path / "disk", bytearray(random.Random(1).randbytes(24 << 20))
        path.write_bytes(data)
        base = push(store, path, "web", format_="raw").digest
        assert len(store.layout(base).packs) > 5
        data[9 << 20 : (9 << 20) + 8192] = random.Random(2).randbytes(8192)
        path.write_bytes(data)
        asked = Asked(store.backend)
        monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "another node's"))
        changed(Store.open(asked), path, base, [(9 << 20, (9 << 20) + CLUSTER)])
        assert asked.requests.total() <= 20, asked.requests
    finally:
        write_pages(None)


def test_without_the_bases_sums_or_with_others_all_is_read_and_that_is_said(
    store: Store, tmp_path: Path
) -> None:
    path, data = tmp_path / "disk", random.Random(1).randbytes(6 << 20)
    path.write_bytes(data)
    base = push(store, path, "web", format_="raw").digest
    sums = store.backend.get(GROUPS.key(base)).data
    for broken in (b"", sums[:-1], sums[:-1] + bytes([sums[-1] ^ 1]), sums + b"\0"):
        store.backend.put(GROUPS.key(base), broken)
        digest, read, note = changed(store, path, base, [])
        assert read == len(data) and "all of the disk was read" in note
        assert store.manifest(digest).disk_id == store.manifest(base).disk_id
    store.backend.delete(GROUPS.key(base))
    assert "all of the disk was read" in changed(store, path, base, [])[2]
    with pytest.raises(Corrupt):
        groups.decode(sums, len(data), Digest(bytes(32)))
    assert SUMS.key(base) != GROUPS.key(base)


def test_an_export_of_qemu_is_a_disk_and_says_what_an_overlay_holds(tmp_path: Path) -> None:
    base, overlay, socket = tmp_path / "base.raw", tmp_path / "o.qcow2", tmp_path / "s"
    data = bytearray(random.Random(1).randbytes(4 << 20))
    data[1 << 20 : 2 << 20] = bytes(1 << 20)
    base.write_bytes(data)
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", "-b", base, "-F", "raw", overlay, "8M"], **quiet)
    write = ["-c", "write -P 7 3M 64k", "-c", "write -z 2M 64k", "-c", "write -P 9 6M 100k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *write, overlay], **quiet)
    served = subprocess.Popen(
        [
            "qemu-nbd",
            "-r",
            "-A",
            "-t",
            "-e",
            "2",
            "--pid-file",
            tmp_path / "pid",
            "-k",
            socket,
            "-f",
            "qcow2",
            overlay,
        ]
    )
    try:
        while not (tmp_path / "pid").exists():
            assert served.poll() is None
        with (
            closing(NbdDisk(socket, "", "qemu:allocation-depth")) as depths,
            closing(NbdDisk(socket, "")) as disk,
        ):
            held = [(start, end) for start, end, depth in depths.extents() if depth == 1]
            assert held == [
                (2 << 20, (2 << 20) + 65536),
                (3 << 20, (3 << 20) + 65536),
                (6 << 20, (6 << 20) + 131072),
            ]
            assert disk.next_data(4 << 20) == (6 << 20, (6 << 20) + 131072)
            out = bytearray(8 << 20)
            disk.read(0, memoryview(out))
            data[3 << 20 : (3 << 20) + 65536], data[2 << 20 : (2 << 20) + 65536] = b"\7" * 65536, bytes(65536)
            data += bytes(2 << 20) + b"\x09" * 102400 + bytes((2 << 20) - 102400)
            assert out == data and disk.read_bytes == 8 << 20
            served.kill()
            with pytest.raises(Unavailable):
                disk.read(0, memoryview(out))
    finally:
        served.kill()
        served.wait()
    with pytest.raises(Unavailable):
        NbdDisk(socket, "")
