import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.backends.protocol import Object, ObjectStat
from imagestore.backends.wrappers import Wrapper
from imagestore.errors import Conflict, Corrupt, Denied, Invalid, NotFound, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import HOOKS_KEY, INFO, PACKS
from imagestore.formats.sealed import seal, unseal
from imagestore.push import push
from imagestore.store.index import LocalIndex
from imagestore.store.open import open_store
from imagestore.store.store import Store
from tests import web
from tests.memory import Memory
from tests.world import disk


def test_a_store_is_made_once_and_opened_again() -> None:
    memory = Memory()
    made = Store.init(memory)
    assert Store.open(memory).info == made.info
    with pytest.raises(Conflict):
        Store.init(memory)


def test_what_is_remembered_of_a_store_is_no_other_ones_that_has_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path))
    said = web.body(Store.init(Memory()).info.encode())
    with web.misbehaving({"/one/store.json": said, "/two/store.json": said}) as url:
        stores = [open_store(f"{url}/{name}") for name in ("one", "two", "one")]
        one, two, again = (store.names.local for store in stores)
        assert one and two and again
        one.remember("names", {"names/debian/12": ["etag", "record"]})
        assert (two.recall("names"), again.recall("names")) == ({}, one.recall("names")) != ({}, {})
        for store in stores:
            store.backend.close()


def test_a_hint_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    local, limits = LocalIndex("store", tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    local.remember("names", {"a": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        local.remember("names", {"a": "b" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["names.json"]
    assert local.recall("names") == {"a": 1}


def test_hooks_that_come_cut_short_are_a_hint_that_is_missing(tmp_path: Path) -> None:
    class Short(Wrapper):
        def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
            if key == HOOKS_KEY:
                raise Corrupt(f"{key}: the answer ended early")
            return super().get(key, start, length)

    path = tmp_path / "disk"
    path.write_bytes(disk(1))
    store = Store.init(Short(Memory()))
    digest = push(store, path, "name", format_="raw", architecture="x86_64", cache=tmp_path).digest
    assert store.names.get("name").digest("x86_64") == digest


def test_where_there_is_none_it_says_so() -> None:
    with pytest.raises(NotFound, match="no image store"):
        Store.open(Memory())


def test_a_store_json_with_any_byte_changed_is_corrupt() -> None:
    memory = Memory()
    data = Store.init(memory).info.encode()
    for at in range(len(data)):
        memory.put(INFO.tree, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(Corrupt):
            Store.open(memory)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", seal({"requires": [], "id": "x"})])
def test_what_is_no_store_json_is_corrupt(data: bytes) -> None:
    memory = Memory()
    memory.put(INFO.tree, data)
    with pytest.raises(Corrupt):
        Store.open(memory)


@pytest.mark.parametrize("change", [{"format": 2}, {"requires": ["x"]}])
def test_what_a_later_version_made_is_refused(change: dict[str, object]) -> None:
    memory = Memory()
    body = unseal(Store.init(memory).info.encode(), "store.json")
    memory.put(INFO.tree, seal({**body, **change}))
    with pytest.raises(Unsupported):
        Store.open(memory)


def test_without_conditional_writes_a_single_writer_has_to_be_promised() -> None:
    memory = Memory(conditional=False)
    with pytest.raises(Unsupported):
        Store.init(memory).check_writable()
    Store.open(memory, single_writer=True).check_writable()
    with pytest.raises(Conflict):
        Store.init(memory)


def test_a_read_only_store_refuses_writers() -> None:
    memory = Memory()
    memory.read_only = True
    with pytest.raises(Denied):
        Store.init(memory).check_writable()


def test_open_store_makes_a_directory_only_when_asked(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with pytest.raises(NotFound):
        open_store(url)
    assert not (tmp_path / "store").exists()
    made = open_store(url, create=True)
    assert open_store(str(tmp_path / "store")).info == made.info
    assert open_store(url, create=True).info == made.info


@pytest.mark.parametrize(
    "url", ["", "ftp://h/x", "file://host/x", "file:x", "s3:///x", "https:///x", "s3://ab"]
)
def test_a_url_of_no_known_form_is_invalid(url: str) -> None:
    with pytest.raises(Invalid):
        open_store(url)


class Listed(Memory):
    """Counts what a list hands out, and questions about single objects."""

    listed = asked = 0

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        for stat in super().list(prefix):
            self.listed += 1
            yield stat

    def stat(self, key: str) -> ObjectStat:
        self.asked += 1
        return super().stat(key)


def some_packs(count: int) -> dict[Digest, int]:
    return {Digest.of(b"%d" % number): 3 for number in range(count)}


@pytest.mark.parametrize(("others", "wanted"), [(0, 4), (20, 8), (5000, 8), (5000, 200), (900, 900)])
def test_packs_are_asked_for_in_lists_while_these_find_some_and_one_by_one_otherwise(
    others: int, wanted: int
) -> None:
    memory = Listed()
    store, sizes = Store.init(memory), some_packs(wanted)
    for number in range(others):
        memory.put(PACKS.key(Digest.of(b"other %d" % number)), b"xxx")
    gone, short, *there = sizes
    for pack in (short, *there):
        memory.put(PACKS.key(pack), b"xx" if pack == short else b"xxxx")
    assert store.has_packs(sizes) == set(there) and gone not in there
    requests = -(-memory.listed // 1000) + memory.asked
    assert requests <= wanted + 1
    if (
        wanted > 4 and wanted * 250 > others
    ):  # a list of them all is worth it: but for two it tells everything
        assert memory.asked == 2
