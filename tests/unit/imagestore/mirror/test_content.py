"""What a mirror serves of an image is the image, in any range and both formats, with checksums that stay."""

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.errors import Corrupt, StoreError
from imagestore.mirror.content import Content, GroupCache, compute_sums, read_sums, simplestreams_archive
from imagestore.push import push
from imagestore.store.store import Store


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Path, bytes]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    rng = np.random.default_rng(1)
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(40 << 20)
        for offset, size in (
            (0, 100_000),
            (5 << 20, 9 << 20),
            ((30 << 20) + 4096, 70_000),
            ((40 << 20) - 10, 10),
        ):
            file.seek(offset)
            file.write(rng.bytes(size))
    store = Store.init(Directory(tmp_path / "store"))
    result = push(store, disk, "test", architecture="x86_64", os_name="debian", format_="raw")
    return store, disk, result.digest


def test_every_range_of_both_formats_is_what_the_whole_has_there(
    image: tuple[Store, Path, bytes], tmp_path: Path
) -> None:
    store, disk, digest = image
    with ThreadPoolExecutor(2) as pool:
        content = Content(store, digest, GroupCache(4 << 20), pool)
        raw = b"".join(content.read("raw", 0, content.size_bytes("raw")))
        assert raw == disk.read_bytes()
        qcow2 = b"".join(content.read("qcow2", 0, content.size_bytes("qcow2")))
        (tmp_path / "out.qcow2").write_bytes(qcow2)
        subprocess.run(["qemu-img", "check", "-q", tmp_path / "out.qcow2"], check=True)
        subprocess.run(
            ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", tmp_path / "out.qcow2", disk],
            check=True,
        )
        rng = np.random.default_rng(2)
        for whole, format_ in ((raw, "raw"), (qcow2, "qcow2")):
            for _ in range(60):
                start = int(rng.integers(0, len(whole)))
                length = min(int(rng.integers(1, 3 << 20)), len(whole) - start)
                assert b"".join(content.read(format_, start, length)) == whole[start : start + length]


def test_checksums_are_computed_once_and_are_right(image: tuple[Store, Path, bytes]) -> None:
    store, disk, digest = image
    assert read_sums(store, digest) is None
    sums = compute_sums(store, digest)
    assert sums.raw == hashlib.sha256(disk.read_bytes()).hexdigest()
    with ThreadPoolExecutor(2) as pool:
        content = Content(store, digest, GroupCache(), pool)
        qcow2 = b"".join(content.read("qcow2", 0, content.size_bytes("qcow2")))
        archive = simplestreams_archive(content.manifest, sums.created_s)
    assert sums.qcow2 == hashlib.sha256(qcow2).hexdigest()
    assert sums.combined == hashlib.sha256(archive + qcow2).hexdigest()
    assert compute_sums(store, digest) == sums == read_sums(store, digest)


def test_a_flipped_bit_never_comes_out(image: tuple[Store, Path, bytes]) -> None:
    store, _, digest = image
    root = Path(store.url.removeprefix("file://"))
    for pack in (root / "packs").glob("*/*"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.write_bytes(data)
    with ThreadPoolExecutor(2) as pool:
        content = Content(store, digest, GroupCache(), pool)
        with pytest.raises((Corrupt, StoreError)):
            list(content.read("raw", 0, content.size_bytes("raw")))
