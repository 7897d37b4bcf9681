"""Writers, readers, instances and collectors on one store, at any point of each other's work, with a simulated clock.

Writers and collectors run in threads that stop before every request until the model lets them go on, so that every
interleaving of requests can happen, and any of them can sleep for days between two requests, or die.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from imagestore.backends.protocol import Backend
from imagestore.backends.wrappers import Wrapper
from imagestore.errors import Conflict, Corrupt, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.sealed import unseal
from imagestore.gc import collect
from imagestore.store.roots import hold, release, tag, undelete
from imagestore.store.store import Store
from imagestore.verify import verify_image, verify_store
from tests.faults.faulty import Killed
from tests.world import HOUR, World, disk, write_pages

GRACE_S = 24 * HOUR
NAMES = ["a", "b", "c"]


class Stepped(Wrapper):
    """Lets its requests through one at a time, when it is told to. `list` is one request."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._allowed = threading.Semaphore(0)
        self._asked = threading.Condition()
        self.waiting = 0
        self.free = False
        self.dead = False

    def _do(self, verb: str, key: str, action: Callable[[], Any]) -> Any:
        if not self.free:
            with self._asked:
                self.waiting += 1
                self._asked.notify_all()
            self._allowed.acquire()
        if self.dead:
            raise Killed
        return action()

    def list(self, prefix: str) -> Iterator[Any]:
        yield from self._do("list", prefix, lambda: list(self.inner.list(prefix)))

    def settle(self, thread: threading.Thread) -> None:
        """Wait until a request is asked for or the thread has ended."""
        with self._asked:
            while not self.waiting and thread.is_alive():
                self._asked.wait(0.002)

    def step(self) -> None:
        with self._asked:
            self.waiting -= 1
        self._allowed.release()

    def let_go(self, *, dead: bool) -> None:
        """All requests from now on, or none."""
        self.dead, self.free = dead, True
        for _ in range(64):
            self._allowed.release()


class Actor:
    """A writer or collector in a thread of its own."""

    def __init__(self, store: Store, act: Callable[[Store], object]) -> None:
        self.stepped = Stepped(store.backend)
        self.defect: BaseException | None = None
        self.slept = False
        own = Store(self.stepped, store.info)

        def run() -> None:
            try:
                act(own)
            except (StoreError, Killed):
                pass
            except BaseException as err:  # noqa: BLE001 - raised again by end()
                self.defect = err

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.stepped.settle(self.thread)
            if not self.thread.is_alive():
                return
            self.stepped.step()
        self.stepped.settle(self.thread)

    def end(self, *, dead: bool = False) -> None:
        self.stepped.let_go(dead=dead)
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.defect is not None:
            raise self.defect


class Cloud(RuleBasedStateMachine):
    actors = Bundle("actors")
    instances = Bundle("instances")
    readers = Bundle("readers")

    @initialize(pages=st.booleans())
    def start(self, pages: bool) -> None:
        write_pages(64 << 10 if pages else None)
        self.directory = TemporaryDirectory()
        self.world = World(Path(self.directory.name))
        self.store = self.world.store
        self.running: list[Actor] = []
        self.count = 0
        # What a push would store, found out beforehand in a store of its own: pushes in threads tell nothing.
        self.scratch = World(Path(self.directory.name) / "scratch", cache="scratch")
        for name in NAMES[:2]:
            self.world.push(name, disk(ord(name), 1, blocks=2))

    def _spawn(self, act: Callable[[Store], object]) -> Actor:
        actor = Actor(self.store, act)
        self.running.append(actor)
        return actor

    # Moves

    @rule(
        target=actors,
        name=st.sampled_from(NAMES),
        seeds=st.sampled_from([(1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3)]),
        count=st.integers(0, 24),
    )
    def push(self, name: str, seeds: tuple[int, ...], count: int) -> Actor:
        """Stops in the middle, as if suspended, or is through with few requests to go."""
        data = disk(*seeds, blocks=2)
        self.world.images[self.scratch.push("x", data)] = data
        actor = self._spawn(lambda store: self.world.push(name, data, store))
        actor.steps(count)
        return actor

    @rule(target=actors, threshold=st.sampled_from([0.0, 0.5]), count=st.integers(0, 40))
    def collect(self, threshold: float, count: int) -> Actor:
        actor = self._spawn(lambda store: collect(store, grace_s=GRACE_S, repack_threshold=threshold))
        actor.steps(count)
        return actor

    @rule(days=st.integers(1, 4))
    def days_with_a_collection_each_pass(self, days: int) -> None:
        for _ in range(days):
            self.time_passes(25)
            try:
                collect(self.store, grace_s=GRACE_S, repack_threshold=0)
            except Corrupt:
                # A writer that slept in the middle of its last requests mends what it named when it goes on.
                assert self._sleepers()
            except (Conflict, NotFound):
                continue

    @rule(target=actors, name=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def tag(self, name: str, new: str) -> Actor:
        def act(store: Store) -> None:
            tag(store, store.names.get(name).digest("x86_64"), new, "latest", "x86_64")

        return self._spawn(act)

    @rule(actor=actors, count=st.integers(1, 8))
    def go_on(self, actor: Actor, count: int) -> None:
        actor.steps(count)

    @rule(actor=consumes(actors))
    def finish(self, actor: Actor) -> None:
        actor.end()

    @rule(actor=consumes(actors))
    def kill(self, actor: Actor) -> None:
        """Not one that slept for longer than the grace in the middle of its last requests: docs/adr/0004."""
        actor.end(dead=not actor.slept)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self.store.names.remove(name)

    @rule(name=st.sampled_from(NAMES))
    def undelete(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            undelete(self.store, name)

    @rule(target=instances, name=st.sampled_from(NAMES))
    def create_instance(self, name: str) -> Any:
        self.count += 1
        try:
            digest = self.store.names.get(name).digest("x86_64")
            hold(self.store, f"instance{self.count}", [digest])
        except NotFound:
            return multiple()
        return f"instance{self.count}", digest

    @rule(instance=consumes(instances))
    def delete_instance(self, instance: tuple[str, Digest]) -> None:
        release(self.store, instance[0])

    @rule(target=readers, name=st.sampled_from(NAMES))
    def read_layout(self, name: str) -> Any:
        try:
            digest = self.store.names.get(name).digest("x86_64")
        except NotFound:
            return multiple()
        return self.world.now_s, digest, self.store.layout(digest)

    @rule(reader=consumes(readers))
    def read_with_a_cached_layout(self, reader: tuple[float, Digest, Layout]) -> None:
        """Good for as long as the grace, whatever was repacked meanwhile."""
        since_s, digest, layout = reader
        if self.world.now_s - since_s < GRACE_S and digest in self._reachable():
            for pack in layout.packs:
                self.store.backend.stat(PACKS.key(pack))

    @rule(hours=st.sampled_from([0.1, 2, 10, 30]))
    def time_passes(self, hours: float) -> None:
        self.world.now_s += hours * HOUR
        if hours * HOUR > GRACE_S / 2:
            for actor in self.running:
                actor.slept = True

    # What always holds

    def _reachable(self) -> set[Digest]:
        found = {digest for record in self.store.names.list() for digest in record.images.values()}
        for key, thing in self.world.memory.objects.items():
            if key.startswith("refs/"):
                found |= set(map(Digest.parse, unseal(thing.data, key)["images"]))
        return found

    @invariant()
    def nothing_reachable_is_lost(self) -> None:
        if not hasattr(self, "world"):
            return
        if not self._sleepers():
            for digest in self._reachable():
                assert verify_image(self.store, digest).problems == []

    def _sleepers(self) -> bool:
        return any(actor.thread.is_alive() and actor.slept for actor in self.running)

    def teardown(self) -> None:
        write_pages(None)
        if not hasattr(self, "world"):
            return
        for actor in self.running:
            actor.end()
        for digest in self._reachable():
            assert verify_image(self.store, digest).problems == []
        report = verify_store(self.store, full=True)
        assert report.problems == [], report.problems
        self.world.check_all()
        self._frees_everything()
        self.directory.cleanup()

    def _frees_everything(self) -> None:
        for record in list(self.store.names.list()):
            self.store.names.remove(record.name, record.tag)
        for key in [key for key in self.world.memory.objects if key.startswith("refs/")]:
            release(self.store, key.removeprefix("refs/"))
        for _ in range(5):
            self.world.now_s += GRACE_S + 1
            try:
                collect(self.store, grace_s=GRACE_S, repack_threshold=0)
            except Conflict:
                raise AssertionError("there is no other collector") from None
        trees = ("packs", "manifests", "layouts", "index", "names", "leases")
        assert [self.world.stored(f"{tree}/") for tree in trees] == [0] * len(trees)


TestCloud = pytest.mark.timeout(3600)(Cloud.TestCase)
