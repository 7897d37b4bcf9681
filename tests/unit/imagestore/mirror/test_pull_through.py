"""A pull-through mirror: each frame crosses once however many ask, is verified, kept, and let go when room is short."""

import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend
from imagestore.backends.wrappers import Wrapper
from imagestore.errors import Corrupt, NotFound, StoreError, Unavailable, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import MANIFESTS
from imagestore.mirror.pull_through import PullThrough
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.store import Store
from tests.counted import Counted

T = TypeVar("T")


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "index"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(np.random.default_rng(3).bytes(12 << 20))
    store = Store.init(Directory(tmp_path / "origin"))
    push(store, disk, "test", architecture="x86_64", format_="raw")
    return store


def through(origin: Store, tmp_path: Path, limit_bytes: int = 1 << 30) -> tuple[Counted, Store]:
    counted = Counted(origin.backend)
    return counted, Store.open(PullThrough(counted, tmp_path / "kept", limit_bytes))


def test_ten_clients_at_once_make_upstream_send_each_frame_once(origin: Store, tmp_path: Path) -> None:
    counted, mirror = through(origin, tmp_path)
    digest = origin.names.get("test").images["x86_64"]
    outputs = [tmp_path / f"out-{number}.raw" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda out: pull(mirror, digest, out, format_="raw"), outputs))
    assert all(out.read_bytes() == (tmp_path / "disk.raw").read_bytes() for out in outputs)
    stored = sum(stat.size_bytes for stat in origin.backend.list("packs/"))
    everything = sum(stat.size_bytes for stat in origin.backend.list(""))
    # Names and layouts are asked for each time; of the packs nothing is sent twice.
    assert stored <= counted.received_bytes < stored + 40 * (everything - stored) + 1000
    before = counted.received_bytes
    pull(mirror, digest, tmp_path / "again.raw", format_="raw")
    assert counted.received_bytes - before < 300_000


def test_what_was_kept_is_served_while_upstream_is_away_also_after_a_restart(
    origin: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mirror = through(origin, tmp_path)
    digest = mirror.names.get("test").images["x86_64"]
    pull(mirror, digest, tmp_path / "first.raw", format_="raw")

    def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("upstream does not answer")

    monkeypatch.setattr(origin.backend, "get", away)
    monkeypatch.setattr(origin.backend, "stat", away)
    _, again = through(origin, tmp_path)
    assert again.names.get("test").images["x86_64"] == digest
    pull(again, digest, tmp_path / "second.raw", format_="raw")
    assert (tmp_path / "second.raw").read_bytes() == (tmp_path / "first.raw").read_bytes()


def test_a_wrong_byte_from_upstream_is_neither_served_nor_kept(origin: Store, tmp_path: Path) -> None:
    pack = next((tmp_path / "origin" / "packs").glob("*/*"))
    good = pack.read_bytes()
    pack.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    _, mirror = through(origin, tmp_path)
    key = f"packs/{pack.parent.name}/{pack.name}"
    with pytest.raises(Corrupt):
        mirror.backend.get(key, 4000, 2000)
    pack.write_bytes(good)
    assert mirror.backend.get(key, 4000, 2000).data == good[4000:6000]
    assert mirror.backend.get(key).data == good
    kept = tmp_path / "kept" / "frames" / pack.name
    kept.write_bytes(b"x" * 100 + kept.read_bytes()[100:])
    assert mirror.backend.get(key, 0, 3000).data == good[:3000]


def test_any_range_of_a_pack_is_what_upstream_has_there(origin: Store, tmp_path: Path) -> None:
    _, mirror = through(origin, tmp_path)
    rng = np.random.default_rng(4)
    for pack in (tmp_path / "origin" / "packs").glob("*/*"):
        good, key = pack.read_bytes(), f"packs/{pack.parent.name}/{pack.name}"
        for _ in range(40):
            start = int(rng.integers(0, len(good)))
            length = int(rng.integers(0, min(len(good) - start, 1 << 20) + 1))
            assert mirror.backend.get(key, start, length).data == good[start : start + length]
        with pytest.raises(Corrupt):
            mirror.backend.get(key, len(good) - 5, 6)


def test_packs_unused_for_longest_go_when_room_is_short(origin: Store, tmp_path: Path) -> None:
    disk = tmp_path / "other.raw"
    for number in range(3):
        disk.write_bytes(np.random.default_rng(10 + number).bytes(4 << 20))
        push(origin, disk, f"other-{number}", architecture="x86_64", format_="raw")
    _, mirror = through(origin, tmp_path, limit_bytes=9 << 20)
    for number in range(3):
        digest = mirror.names.get(f"other-{number}").images["x86_64"]
        pull(mirror, digest, tmp_path / "out.raw", format_="raw")
        for path in (tmp_path / "kept" / "frames").iterdir():
            os.utime(path, (0, path.stat().st_mtime - 10))
    kept = sum(path.stat().st_blocks * 512 for path in (tmp_path / "kept" / "frames").iterdir())
    assert 0 < kept <= 9 << 20
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()


def test_what_was_fetched_again_takes_no_more_room_than_it_did(origin: Store, tmp_path: Path) -> None:
    disk = tmp_path / "other.raw"
    disk.write_bytes(np.random.default_rng(10).bytes(1 << 20))
    push(origin, disk, "other", architecture="x86_64", format_="raw")
    _, mirror = through(origin, tmp_path, limit_bytes=15 << 20)
    for name in ("other", "test"):
        pull(mirror, mirror.names.get(name).digest("x86_64"), tmp_path / "out.raw", format_="raw")
    kept = {path: path.stat().st_blocks for path in (tmp_path / "kept" / "frames").iterdir()}
    large = max(kept, key=lambda path: kept[path])
    for _ in range(3):
        large.write_bytes(b"")
        mirror.backend.get(f"packs/{large.name[:2]}/{large.name}")
    assert all(path.exists() for path in kept)


class Away(Wrapper):
    """Answers nothing before `go`, and what it is asked for is not there (or `error`)."""

    def __init__(self, inner: Backend, error: type[StoreError]) -> None:
        super().__init__(inner)
        self.go, self.error = threading.Event(), error

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        self.go.wait()
        raise self.error(f"{verb} {key}")


@pytest.mark.parametrize("error", [NotFound, Unavailable])
def test_what_upstream_has_not_or_cannot_give_is_that_for_all_who_ask_at_once(
    origin: Store, tmp_path: Path, error: type[StoreError]
) -> None:
    """An upstream that is away is not one that has no such object: then clients would go on to another remote."""
    away = Away(origin.backend, error)
    backend, key = PullThrough(away, tmp_path / "kept", 1 << 30), MANIFESTS.key(Digest.of(b"none"))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(backend.get, key) for _ in range(4)]
        away.go.set()
        assert [type(one.exception(60)) for one in asked] == [error] * 4


def test_on_a_full_disk_it_serves_what_it_cannot_keep(origin: Store, tmp_path: Path) -> None:
    _, mirror = through(origin, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for stat in origin.backend.list(""):
            assert mirror.backend.get(stat.key).data == origin.backend.get(stat.key).data
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_footer_that_a_bad_disk_changed_is_fetched_again(origin: Store, tmp_path: Path) -> None:
    _, mirror = through(origin, tmp_path)
    stat = next(origin.backend.list("packs/"))
    good = mirror.backend.get(stat.key).data
    kept = next((tmp_path / "kept" / "objects" / "tails").iterdir())
    kept.write_bytes(kept.read_bytes()[:-40] + bytes(40))
    _, again = through(origin, tmp_path)
    assert again.backend.get(stat.key).data == good


def test_it_takes_no_writes(origin: Store, tmp_path: Path) -> None:
    _, mirror = through(origin, tmp_path)
    with pytest.raises(Unsupported):
        mirror.backend.put("names/a/b", b"")
    with pytest.raises(Unsupported):
        mirror.backend.delete("names/a/b")
