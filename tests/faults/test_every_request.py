"""Each writing operation, failing at its first request, its second, … on every backend: nothing named is ever lost."""

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend
from imagestore.backends.wrappers import Retried, innermost
from imagestore.copy import copy_name
from imagestore.errors import StoreError
from imagestore.formats.digest import Digest
from imagestore.gc import collect
from imagestore.store.names import Names
from imagestore.store.open import open_backend
from imagestore.store.roots import tag, undelete
from imagestore.store.store import Store
from tests import drills
from tests.faults.faulty import WAYS, Faulty, Killed
from tests.memory import Memory
from tests.world import World, disk

pytestmark = pytest.mark.timeout(1800)
BLOCKS = 4
AT_ONCE = -5.0
"""A grace that is over at once, also for stores that tell whole seconds."""


def push(world: World, store: Store) -> None:
    world.push("new", disk(1, 5, blocks=BLOCKS), store)


def push_again(world: World, store: Store) -> None:
    world.push("one", disk(2, 1, 5, blocks=BLOCKS), store)


def tag_it(world: World, store: Store) -> None:
    digest = store.names.get("one").digest("x86_64")
    tag(store, digest, "again", "v1", "x86_64")


def remove(world: World, store: Store) -> None:
    with contextlib.suppress(StoreError):
        store.names.get("two")
        store.names.remove("two")
        return
    store.names.get("one")


def undo_removal(world: World, store: Store) -> None:
    record = store.names.read("gone", "latest")
    if record.removed:
        undelete(store, "gone")


def copy(world: World, store: Store) -> None:
    other = World(world.directory / f"other-{secrets.token_hex(4)}", cache=f"other-{secrets.token_hex(4)}")
    other.push("new", disk(1, 6, blocks=BLOCKS))
    world.images |= other.images
    copy_name(other.store, store, other.store.names.get("new"))


def gc(world: World, store: Store) -> None:
    for _ in range(2):
        collect(store, grace_s=AT_ONCE)


def repack(world: World, store: Store) -> None:
    for _ in range(2):
        collect(store, grace_s=AT_ONCE, repack_threshold=0)


OPERATIONS = [push, push_again, tag_it, remove, undo_removal, copy, gc, repack]
NAMED = {"one": (1, 2), "two": (2, 3), "gone": (3, 4)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three images that share chunks; one is removed, and a run of the collector has condemned what was its own."""
    world = World(tmp_path_factory.mktemp("start"))
    for name, seeds in NAMED.items():
        world.push(name, disk(*seeds, blocks=BLOCKS))
    world.push("more", disk(3, 7, blocks=BLOCKS))
    world.store.names.remove("more")
    world.now_s += 1
    collect(world.store, grace_s=0.5)
    world.store.names.remove("gone")
    return world


@pytest.fixture(params=["memory", "directory", "seaweedfs", "moto", "rclone"])
def make(request: pytest.FixtureRequest, tmp_path: Path, start: World) -> Iterator[Callable[[], World]]:
    """Makes a world of its own on a backend, with the objects of `start`."""
    count = 0

    def fresh() -> World:
        nonlocal count
        count += 1
        place = f"{secrets.token_hex(6)}"
        backend: Backend
        if request.param == "memory":
            backend = Memory()
        elif request.param == "directory":
            backend = Directory(tmp_path / place)
        else:
            backend = open_backend(base.replace("?", f"{place}?"))
            inner = backend.inner  # type: ignore[attr-defined]
            inner.known = known[inner.address]
        world = World.__new__(World)
        world.directory, world.now_s, world.cache = tmp_path, 0.0, place
        world.images = dict(start.images)
        for key, thing in start.memory.objects.items():
            backend.put(key, thing.data)
        world.store = Store(backend, start.store.info, single_writer=True)
        return world

    base = ""
    known: dict[str, str] = {}
    if request.param not in ("memory", "directory"):
        base = request.getfixturevalue(request.param).url("x/")
        s3: Any = innermost(open_backend(base))
        known = {s3.address: s3.conditions}
    yield fresh


def attempt(
    world: World, operation: Callable[[World, Store], None], at: int, way: str, retried: bool
) -> Faulty:
    faulty = Faulty(world.store.backend, at, way)
    backend: Backend = Retried(faulty, sleep=lambda _: None) if retried else faulty
    store = Store(backend, world.store.info, single_writer=True)
    try:
        operation(world, store)
    except (StoreError, Killed) as err:
        if retried and not isinstance(err, Killed):
            raise
    return faulty


def named(store: Store) -> dict[str, Digest]:
    return {record.name: record.digest("x86_64") for record in Names(store.backend).list()}


@pytest.mark.drill
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_whatever_fails_nothing_named_is_lost_and_the_rerun_succeeds(
    make: Callable[[], World], operation: Callable[[World, Store], None], request: pytest.FixtureRequest
) -> None:
    world = make()
    total = attempt(world, operation, -1, "error", False).requests
    world.check_all()
    expected, images = named(world.store), world.images
    assert total > 1
    cases = [(at, way, retried) for at in range(total) for way in WAYS for retried in (False, True)]
    # Setting up a real server's store costs more than the operation.
    local = "memory" in request.node.name or "directory" in request.node.name
    picked = min(len(cases), drills.rounds(full=len(cases) if local else 40))
    if not drills.everything():
        picked = min(picked, 8 if local else 1)
    for at, way, retried in random.Random(drills.seed()).sample(cases, picked):
        world = make()
        world.images = dict(images)
        attempt(world, operation, at, way, retried)
        where = f"{operation.__name__}, request {at} of {total}, {way}, retried: {retried}"
        try:
            world.check_all()
            if retried and not way.startswith("killed"):
                assert named(world.store) == expected
            operation(world, world.store)
            world.check_all()
            assert named(world.store) == expected
        except BaseException as err:
            err.add_note(where)
            raise
