"""Writers at the same time, and what a push promises when it ends with 0."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imagestore.backends.protocol import Backend, Data, ObjectStat
from imagestore.backends.wrappers import Wrapper
from imagestore.formats.keys import LAYOUTS, kind_of
from imagestore.push import push
from imagestore.store.open import open_store
from imagestore.store.store import Store
from tests.world import World, disk


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Then(Wrapper):
    """Does something each time that a layout was written."""

    def __init__(self, inner: Backend, action: Callable[[], object]) -> None:
        super().__init__(inner)
        self._then = action

    def put(
        self, key: str, data: Data, *, if_match: str | None = None, if_none_match: bool = False
    ) -> ObjectStat:
        stat = self.inner.put(key, data, if_match=if_match, if_none_match=if_none_match)
        if kind_of(key) is LAYOUTS:
            self._then()
        return stat


@pytest.mark.parametrize(
    "apart", [False, True], ids=["which know each other", "which know nothing of each other"]
)
def test_pushes_of_one_disk_do_not_chase_each_other(world: World, apart: bool) -> None:
    """D1: each found the other's layout in place of its own and wrote it again, five times over."""
    data, pushes = disk(1, 2), 0

    def other() -> None:
        nonlocal pushes
        pushes += 1
        if apart:
            for key in [key for key in world.memory.objects if key.startswith(("index/", "hooks/"))]:
                del world.memory.objects[key]
        twin = World.__new__(World)
        twin.directory, twin.cache, twin.images, twin.store = (
            world.directory,
            f"cache-{pushes}",
            {},
            world.store,
        )
        twin.push(f"twin-{pushes}", data)

    world.push("one", data, Store(Then(world.memory, other), world.store.info))
    assert 1 <= pushes < 5
    world.check_all()


def test_first_pushes_at_once_into_a_new_store_all_arrive(tmp_path: Path) -> None:
    """D2: who lost the race for store.json was told that there is a store already."""
    failures: list[BaseException] = []

    def first(number: int, at: Path, start: threading.Barrier) -> None:
        path = at.with_suffix(f".{number}")
        path.write_bytes(disk(number, blocks=4))
        start.wait()
        try:
            store = open_store(at.as_uri(), create=True)
            push(store, path, f"disk-{number}", format_="raw", cache=tmp_path / f"cache-{number}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the test says it
            failures.append(error)

    for attempt in range(5):
        at, start = tmp_path / f"store-{attempt}", threading.Barrier(6)
        threads = [threading.Thread(target=first, args=(number, at, start)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(list(open_store(at.as_uri()).names.list())) == 6
