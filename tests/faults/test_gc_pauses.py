"""A writer or a collector that stops at its n-th request, for every n, while the others go on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from imagestore.gc import collect
from imagestore.store.store import Store
from tests.faults.test_gc_model import GRACE_S, Actor
from tests.world import HOUR, World, disk

Act = Callable[[World, Store], object]


def world_with_trash(directory: Path) -> World:
    """Image `a` is removed, condemned and marked; the next run will delete it. `b` shares a part and stays."""
    world = World(directory)
    world.push("a", disk(1, 2, blocks=2))
    world.push("b", disk(2, 3, blocks=2))
    world.store.names.remove("a")
    world.now_s += 50 * HOUR
    collect(world.store, grace_s=GRACE_S, repack_threshold=0)
    world.now_s += 25 * HOUR
    return world


def push_a(world: World, store: Store) -> None:
    world.push("a", disk(1, 2, blocks=2), store)


def collect_all(world: World, store: Store) -> None:
    collect(store, grace_s=GRACE_S, repack_threshold=0)


def days(world: World) -> None:
    for _ in range(4):
        world.now_s += 25 * HOUR
        collect(world.store, grace_s=GRACE_S, repack_threshold=0)


def remove_b_and_days(world: World) -> None:
    world.store.names.remove("b")
    days(world)


def push_now(world: World) -> None:
    push_a(world, world.store)


def push_and_days(world: World) -> None:
    push_now(world)
    days(world)


@pytest.mark.parametrize(
    ("sleeper", "meanwhile"),
    [
        (collect_all, push_now),
        (collect_all, push_and_days),
        (collect_all, days),
        (push_a, collect_all),
        (push_a, days),
        (push_a, remove_b_and_days),
    ],
    ids=lambda act: act.__name__,
)
def test_whoever_sleeps_before_any_request_harms_nothing_when_it_wakes(
    tmp_path: Path, sleeper: Act, meanwhile: Callable[..., object]
) -> None:
    at, through = 0, False
    while not through:
        world = world_with_trash(tmp_path / f"{at}")
        actor = Actor(world.store, lambda store, world=world: sleeper(world, store))
        actor.steps(at)
        through = not actor.thread.is_alive()
        try:
            meanwhile(world, world.store) if meanwhile is collect_all else meanwhile(world)
            actor.end()
            world.check_all()
            names = {record.name for record in world.store.names.list()}
            assert ("a" in names) == (push_a is sleeper or meanwhile in (push_now, push_and_days))
            days(world)
            world.check_all()
        except BaseException as err:
            err.add_note(f"asleep before request {at}")
            raise
        at += 1
    assert at > 10
