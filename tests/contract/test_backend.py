"""What every writable backend promises (imagestore/backends/protocol.py), asked of each."""

import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from compute.api import problems
from compute.api.images import stores
from compute.config import Config
from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.backends.wrappers import RateLimited, Retried
from imagestore.errors import Conflict, Corrupt, Invalid, NotFound, Unsupported
from imagestore.formats.chunking import ChunkerParams
from imagestore.store.open import open_backend
from imagestore.store.store import Store, StoreInfo
from tests.counted import Counted
from tests.memory import Memory
from tests.web import serving

SERVERS = ["seaweedfs", "moto", "rclone"]
WRITABLE = ["memory", "directory", "wrapped directory", "wire", *SERVERS, "SF_TEST_S3_URL"]


@pytest.fixture(params=WRITABLE)
def backend(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    if request.param == "memory":
        made: Backend = Memory()
    elif request.param == "directory":
        made = Directory(tmp_path / "store")
    elif request.param == "wrapped directory":
        made = RateLimited(Retried(Counted(Directory(tmp_path / "store"))), 1e9)
    elif request.param == "wire":
        monkeypatch.setattr(stores, "admit", lambda *_, **__: None)
        monkeypatch.setattr(stores, "reserve", reserve_nothing)
        monkeypatch.setattr(stores, "shown", lambda key: True)
        store = Store(Directory(tmp_path / "store"), StoreInfo("0" * 32, ChunkerParams()))
        served = stores.OwnStores(SimpleNamespace(config=Config(state_dir=tmp_path)))  # type: ignore[arg-type]

        async def one(scope: Scope, receive: Receive, send: Send) -> None:
            await served.serve(store, "n", scope["path"][1:], scope, receive, send)

        app = FastAPI()
        problems.install(app)
        app.mount("/", one)
        with serving(app) as url:
            made = open_backend(f"sf+{url}")
            yield made
            made.close()
        return
    else:
        if request.param in SERVERS:
            url = request.getfixturevalue(request.param).url(f"sf/{secrets.token_hex(4)}")
        else:
            parts = urlsplit(os.environ.get("SF_TEST_S3_URL", ""))
            if not parts.scheme:
                pytest.skip("SF_TEST_S3_URL names no server")
            url = parts._replace(path=f"{parts.path}/{secrets.token_hex(8)}").geturl()
        made = open_backend(url)
    yield made
    made.close()


async def reserve_nothing(*_: object) -> None: ...


@pytest.fixture
def conditional(backend: Backend) -> Backend:
    if not backend.conditional:
        pytest.skip("this backend has no conditional writes")
    return backend


def assert_same(one: ObjectStat, other: ObjectStat) -> None:
    """Some servers tell whole seconds with one verb and parts of them with another."""
    assert replace(one, modified_s=0) == replace(other, modified_s=0)
    assert abs(one.modified_s - other.modified_s) < 2


def listed(backend: Backend, prefix: str) -> list[str]:
    return sorted(stat.key for stat in backend.list(prefix))


def test_what_was_put_can_be_read_whole_and_in_ranges(backend: Backend) -> None:
    data = bytes(range(256)) * 40
    stat = backend.put("packs/ab/cd", data)
    whole = backend.get("packs/ab/cd")
    assert whole.data == data
    assert_same(whole.stat, stat)
    assert_same(backend.stat("packs/ab/cd"), stat)
    assert stat.size_bytes == len(data)
    assert backend.get("packs/ab/cd", 10, 5).data == data[10:15]
    assert backend.get("packs/ab/cd", len(data) - 3, 3).data == data[-3:]
    assert backend.get("packs/ab/cd", 100).data == data[100:]
    assert_same(backend.get("packs/ab/cd", 0, 1).stat, stat)


def test_pieces_are_joined_and_an_object_may_be_empty(backend: Backend) -> None:
    backend.put("a/pieces", [b"one", bytearray(b"two"), memoryview(b"three")])
    backend.put("a/empty", b"")
    assert backend.get("a/pieces").data == b"onetwothree"
    assert backend.get("a/empty").data == b""
    assert backend.stat("a/empty").size_bytes == 0


def test_a_large_object_survives(backend: Backend) -> None:
    data = bytes(1 << 20) + b"x" * ((16 << 20) + 13)
    backend.put("packs/large", [data[:5_000_000], data[5_000_000:]])
    assert backend.stat("packs/large").size_bytes == len(data)
    assert backend.get("packs/large", (1 << 20) - 1, 3).data == b"\0xx"
    assert backend.get("packs/large").data == data


def test_a_range_beyond_the_end_is_corrupt(backend: Backend) -> None:
    backend.put("a/short", b"12345")
    for start, length in [(0, 6), (4, 2), (5, 1), (9, 1)]:
        with pytest.raises(Corrupt):
            backend.get("a/short", start, length)


def test_what_is_not_there_is_not_found(backend: Backend) -> None:
    for ask in (backend.get, backend.stat):
        with pytest.raises(NotFound):
            ask("names/debian/12")
    backend.put("names/debian/12", b"x")
    with pytest.raises(NotFound):
        backend.get("names/debian")


def test_deleting_is_idempotent(backend: Backend) -> None:
    backend.put("a/b", b"x")
    backend.delete("a/b")
    backend.delete("a/b")
    with pytest.raises(NotFound):
        backend.stat("a/b")


def test_a_listing_holds_every_key_once_and_is_filtered_by_prefix(backend: Backend) -> None:
    keys = [
        "a/b",
        "a-b",
        "a.b",
        "a/b.c/d",
        "a/b-c",
        "a/c/d/e",
        "b",
        "names/debian/12",
        "names/debian-edge/12",
    ]
    for key in keys:
        backend.put(key, key.encode())
    assert listed(backend, "") == sorted(keys)
    assert listed(backend, "a/") == sorted(key for key in keys if key.startswith("a/"))
    assert listed(backend, "a/b") == ["a/b", "a/b-c", "a/b.c/d"]
    assert listed(backend, "names/debian/") == ["names/debian/12"]
    assert listed(backend, "names/debian") == ["names/debian-edge/12", "names/debian/12"]
    assert list(backend.list("zebra/")) == []
    for stat in backend.list(""):
        assert_same(stat, backend.stat(stat.key))


def test_replacing_changes_etag_and_content(backend: Backend) -> None:
    etags = {backend.put("a/b", b"same length %d" % turn).etag for turn in range(5)}
    assert len(etags) == 5
    assert backend.get("a/b").data == b"same length 4"


def test_times_are_the_stores(backend: Backend) -> None:
    before = backend.now()
    stat = backend.put("a/b", b"x")
    after = backend.now()
    # Stores tell whole seconds at worst.
    assert before - 1.5 <= stat.modified_s <= after + 1.5


def test_keys_that_could_leave_the_store_are_refused(backend: Backend) -> None:
    for key in [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        ".lock",
        "a/.tmp",
        "a\0b",
        "a b",
        "é",
        "a" * 300,
    ]:
        with pytest.raises(Invalid):
            backend.put(key, b"x")
        with pytest.raises(Invalid):
            backend.get(key)


def test_if_none_match_creates_only(conditional: Backend) -> None:
    conditional.put("names/a/b", b"first", if_none_match=True)
    with pytest.raises(Conflict):
        conditional.put("names/a/b", b"second", if_none_match=True)
    assert conditional.get("names/a/b").data == b"first"


def test_if_match_replaces_only_what_was_seen(conditional: Backend) -> None:
    first = conditional.put("names/a/b", b"first")
    second = conditional.put("names/a/b", b"second", if_match=first.etag)
    with pytest.raises(Conflict):
        conditional.put("names/a/b", b"third", if_match=first.etag)
    assert conditional.get("names/a/b").stat.etag == second.etag
    conditional.delete("names/a/b")
    with pytest.raises(Conflict):
        conditional.put("names/a/b", b"fourth", if_match=second.etag)


def test_a_conditional_delete_removes_only_what_was_seen_or_says_that_it_cannot(conditional: Backend) -> None:
    first = conditional.put("names/a/b", b"first")
    second = conditional.put("names/a/b", b"second")
    try:
        with pytest.raises(Conflict):
            conditional.delete("names/a/b", if_match=first.etag)
    except Unsupported:
        assert conditional.get("names/a/b").data == b"second"
        return
    assert conditional.get("names/a/b").data == b"second"
    conditional.delete("names/a/b", if_match=second.etag)
    conditional.delete("names/a/b", if_match=second.etag)
    with pytest.raises(NotFound):
        conditional.stat("names/a/b")


def test_a_condition_that_names_no_etag_is_one_that_nothing_meets(conditional: Backend) -> None:
    conditional.put("names/a/b", b"first")
    with pytest.raises(Conflict):
        conditional.put("names/a/b", b"second", if_match="")
    with pytest.raises((Conflict, Unsupported)):
        conditional.delete("names/a/b", if_match="")
    assert conditional.get("names/a/b").data == b"first"


def test_a_listing_goes_on_past_a_page(backend: Backend) -> None:
    if backend.url.startswith("s3:") and not backend.conditional:
        pytest.skip("slow, and the same code")
    keys = [f"a/{number:04}" for number in range(250 if backend.url.startswith("http") else 1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: backend.put(key, b""), keys))
    assert listed(backend, "a/") == keys


@pytest.mark.parametrize("exists", [False, True])
def test_exactly_one_of_racing_writers_wins(conditional: Backend, exists: bool) -> None:
    etag = conditional.put("names/a/race", b"start").etag if exists else None
    won: list[int] = []
    lost: list[int] = []

    def write(number: int) -> None:
        try:
            conditional.put("names/a/race", b"%d" % number, if_match=etag, if_none_match=not exists)
            won.append(number)
        except Conflict:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    assert conditional.get("names/a/race").data == b"%d" % won[0]
