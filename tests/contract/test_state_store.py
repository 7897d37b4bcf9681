"""What every state store promises. Another engine joins by adding its maker to `ENGINES`."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.cluster.state.protocol import ABSENT, MOST_BYTES, MOST_KEYS, StateStore
from compute.cluster.state.sqlite import HISTORY, SqliteStore
from compute.errors import Compacted, ComputeError, LeaseLost, Stale, Unavailable
from tests.drills import everything
from tests.etcd import members

Reopen = Callable[[], StateStore]
Make = Callable[[Path], StateStore]

ENGINES = {"sqlite": 0, "etcd": 1} | ({"three etcds": 3} if everything() else {})
"""How many members of etcd each has."""
SHORT = {"sqlite": HISTORY, "etcd": 100, "three etcds": 100}
"""How much history each keeps here."""


@pytest.fixture(scope="module")
def make() -> Iterator[Callable[[str], Make]]:
    """A maker of stores for an engine, which runs from its first use on."""
    with ExitStack() as running:
        urls: dict[str, str] = {}

        def maker(engine: str) -> Make:
            if engine == "sqlite":
                return lambda path: SqliteStore(path / "sf.db")
            pytest.importorskip("etcd3gw")
            from compute.cluster.state.etcd import EtcdStore

            if engine not in urls:
                urls[engine] = running.enter_context(members(ENGINES[engine])).url
            return lambda path: EtcdStore(f"{urls[engine]}{path}", history=SHORT[engine])

        yield maker


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reopen(engine: str, make: Callable[[str], Make], tmp_path: Path) -> Iterator[Reopen]:
    """Opens the same state again; the one before is closed first."""
    opened: list[StateStore] = []

    def again() -> StateStore:
        if opened:
            opened[-1].close()
        opened.append(make(engine)(tmp_path))
        return opened[-1]

    yield again
    opened[-1].close()


@pytest.fixture
def store(reopen: Reopen) -> StateStore:
    return reopen()


def put(store: StateStore, key: str, value: bytes = b"1", expect: int = ABSENT) -> int:
    return store.commit({key: value}, expect={key: expect})


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    done = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if true():
            return
        done.wait(0.01)
    raise AssertionError("it did not happen")


def test_what_was_committed_is_read_back_with_its_revision(store: StateStore) -> None:
    revision = put(store, "a/1", b"\x00\xff")
    found = store.get("a/1")
    assert found is not None
    assert (found.key, found.value, found.revision) == ("a/1", b"\x00\xff", revision)
    assert store.revision() == revision
    assert store.get("a/2") is None


def test_the_revision_grows_with_every_commit(store: StateStore) -> None:
    revisions = [put(store, f"k{i}") for i in range(5)]
    assert revisions == sorted(set(revisions))


def test_create_update_and_delete_need_the_expected_revision(store: StateStore) -> None:
    first = put(store, "a")
    with pytest.raises(Stale):
        put(store, "a")
    with pytest.raises(Stale):
        put(store, "a", b"2", first - 1 or 99)
    second = put(store, "a", b"2", first)
    with pytest.raises(Stale):
        store.commit({"a": None}, expect={"a": first})
    store.commit({"a": None}, expect={"a": second})
    assert store.get("a") is None
    put(store, "a", b"3")


def test_a_commit_over_several_keys_happens_whole_or_not_at_all(store: StateStore) -> None:
    put(store, "a")
    before = store.revision()
    with pytest.raises(Stale):
        store.commit({"b": b"1", "c": b"1"}, expect={"a": ABSENT})
    assert store.get("b") is None
    assert store.revision() == before
    revision = store.commit({"b": b"1", "c": b"1", "a": None}, expect={"b": ABSENT})
    assert {r.key: r.revision for r in store.list("")} == {"b": revision, "c": revision}


def test_a_comparison_alone_writes_nothing(store: StateStore) -> None:
    before = put(store, "a")
    assert store.commit({}, expect={"a": before}) == before


def test_a_list_is_by_prefix_and_in_key_order(store: StateStore) -> None:
    for key in ("a/2", "b/1", "a/1", "a", "a/é", "a/\U0010fffe"):
        put(store, key)
    assert [r.key for r in store.list("a/")] == ["a/1", "a/2", "a/é", "a/\U0010fffe"]
    assert len(store.list("")) == 6
    assert store.list("z") == []


def test_a_watch_tells_every_change_in_order_deletions_too(store: StateStore) -> None:
    start = store.revision()
    first = put(store, "a/1", b"1")
    put(store, "b/1")
    put(store, "a/1", b"2", first)
    store.commit({"a/1": None}, expect={})
    changes = store.watch("a/", start, 5)
    assert [(c.key, c.value) for c in changes] == [("a/1", b"1"), ("a/1", b"2"), ("a/1", None)]
    assert store.watch("a/", changes[-1].revision, 0.01) == []


def test_a_watch_waits_for_the_change(store: StateStore) -> None:
    start = store.revision()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.watch, "a", start, 30)
        put(store, "other")
        revision = put(store, "a")
        assert [c.revision for c in waiting.result(30)] == [revision]


def test_a_watch_from_too_long_ago_is_told_to_list_again(store: StateStore, engine: str) -> None:
    start = put(store, "a")
    with ThreadPoolExecutor(32) as pool:
        for _ in pool.map(lambda i: store.commit({"b": b"%d" % i}, expect={}), range(2 * SHORT[engine] + 2)):
            pass
    with pytest.raises(Compacted):
        store.watch("", start, 0)


def test_racing_writers_have_one_winner_per_revision(store: StateStore) -> None:
    put(store, "n", b"0")

    def add(_: int) -> None:
        while True:
            found = store.get("n")
            assert found is not None
            try:
                put(store, "n", b"%d" % (int(found.value) + 1), found.revision)
                return
            except Stale:
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(200)))
    found = store.get("n")
    assert found is not None
    assert found.value == b"200"


def test_everything_is_there_after_it_was_opened_again(reopen: Reopen) -> None:
    store = reopen()
    revision = put(store, "a", b"x")
    store.commit({"a": b"y"}, expect={})
    again = reopen()
    found = again.get("a")
    assert found is not None
    assert (found.value, again.revision()) == (b"y", revision + 1)
    with suppress(Compacted):  # it may forget what was before
        assert [c.value for c in again.watch("", revision - 1, 1)] == [b"x", b"y"]
    assert again.watch("", again.revision(), 0.01) == []


def test_a_lease_that_is_refreshed_lives_and_one_that_is_not_takes_its_keys_along(store: StateStore) -> None:
    kept, lost = store.grant(60), store.grant(0.3)
    store.commit({"alive/1": b"", "plain": b""}, expect={}, lease=lost, ephemeral=("alive/1",))
    store.commit({"alive/2": b""}, expect={}, lease=kept, ephemeral=("alive/2",))
    start = store.revision()
    store.refresh(kept)
    changes = store.watch("alive/", start, 10)
    assert [(c.key, c.value) for c in changes] == [("alive/1", None)]
    assert [r.key for r in store.list("")] == ["alive/2", "plain"]
    with pytest.raises(LeaseLost):
        store.refresh(lost)
    with pytest.raises(LeaseLost):
        store.commit({"x": b""}, expect={}, lease=lost)
    assert store.get("x") is None


def test_a_key_written_without_the_lease_outlives_it(store: StateStore) -> None:
    lease = store.grant(0.5)
    store.commit({"a": b"1", "b": b""}, expect={}, lease=lease, ephemeral=("a", "b"))
    store.commit({"a": b"2"}, expect={})
    wait_until(lambda: store.get("b") is None)
    assert store.get("a") is not None


def test_a_lease_outlives_a_restart_by_its_full_time(reopen: Reopen) -> None:
    store = reopen()
    lease = store.grant(0.5)
    store.commit({"alive": b""}, expect={}, lease=lease, ephemeral=("alive",))
    again = reopen()
    assert again.get("alive") is not None
    again.refresh(lease)
    wait_until(lambda: again.get("alive") is None)


def test_after_closing_every_writer_is_told(reopen: Reopen) -> None:
    store = reopen()
    put(store, "a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.watch, "zzz", store.revision(), 30)
        time.sleep(0.01)
        store.close()
        assert waiting.result(5) == []
    store.close()
    with pytest.raises(Unavailable):
        put(store, "b")


KEYS = ("k/a", "k/b", "k/c", "l/a")


@given(
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(KEYS), st.one_of(st.none(), st.binary(max_size=3)), max_size=3),
            st.dictionaries(st.sampled_from(KEYS), st.integers(0, 6), max_size=2),
        ),
        max_size=12,
    )
)
def test_any_sequence_of_commits_ends_where_a_dictionary_would(
    make: Callable[[str], Make],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[dict[str, bytes | None], dict[str, int]]],
) -> None:
    for engine in ENGINES:
        store = make(engine)(tmp_path_factory.mktemp("state"))
        model: dict[str, tuple[bytes, int]] = {}
        base = store.revision()
        try:
            for writes, relative in steps:
                expect = {k: v and base + v for k, v in relative.items()}
                holds = all(model.get(k, (b"", ABSENT))[1] == v for k, v in expect.items())
                try:
                    revision = store.commit(writes, expect=expect)
                    assert holds
                except Stale:
                    assert not holds
                    continue
                for key, value in writes.items():
                    model.pop(key, None)
                    if value is not None:
                        model[key] = (value, revision)
                # An engine may only ask for what changed since it listed them last.
                kind = {key: found for key, found in sorted(model.items()) if key.startswith("k/")}
                assert [(r.key, (r.value, r.revision)) for r in store.list("k/")] == list(kind.items())
            assert {r.key: (r.value, r.revision) for r in store.list("")} == model
        finally:
            store.close()


def test_a_commit_has_its_bounds_and_all_that_is_within_them_is_taken(store: StateStore) -> None:
    whole = {f"k{n}": bytes(MOST_BYTES // MOST_KEYS - 10) for n in range(MOST_KEYS)}
    store.commit(whole, expect=dict.fromkeys(whole, ABSENT))
    assert len(store.list("k")) == MOST_KEYS
    for writes, expect in (
        (dict.fromkeys([*whole, "more"], b""), {}),
        ({"a": b""}, dict.fromkeys([*whole, "more"], ABSENT)),
        ({"a": bytes(MOST_BYTES)}, {}),
    ):
        with pytest.raises(ComputeError, match="too large"):
            store.commit(writes, expect=expect)
    assert store.get("a") is None


def test_a_long_list_is_whole_and_of_one_revision(store: StateStore) -> None:
    keys = [f"k/{n:04d}" for n in range(2100)]
    assert store.list("k/") == []
    for at in range(0, len(keys), MOST_KEYS):
        store.commit(dict.fromkeys(keys[at : at + MOST_KEYS], b"x"), expect={})
    assert [record.key for record in store.list("k/")] == keys
    store.commit({keys[7]: None, "k/": b"y", keys[9]: b"y"}, expect={})
    there = {r.key: r.value for r in store.list("k/")}
    assert list(there) == ["k/", *keys[:7], *keys[8:]] and there[keys[9]] == b"y"


def test_whom_get_shows_a_change_list_shows_it_too(store: StateStore) -> None:
    put(store, "pool/a", b"0")

    def write() -> None:
        for number in range(1, 301):
            record = store.get("pool/a")
            assert record is not None
            writes = {"pool/a": b"%d" % number, f"port/{number:03}": b"1"}
            store.commit(writes, expect={"pool/a": record.revision, f"port/{number:03}": ABSENT})

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            pooled = store.get("pool/a")
            assert pooled is not None and len(store.list("port/")) >= int(pooled.value)
        writing.result()


def test_what_another_server_writes_is_in_the_next_list(
    engine: str, make: Callable[[str], Make], tmp_path: Path
) -> None:
    if engine == "sqlite":
        pytest.skip("its file belongs to one process")
    ours, theirs = make(engine)(tmp_path), make(engine)(tmp_path)
    try:
        for n in range(20):
            theirs.commit({f"k/{n}": b"1", f"k/{n - 3}": None}, expect={})
            assert ours.list("k/") == theirs.list("k/") and len(ours.list("k/")) == min(n + 1, 3)
            ours.commit({f"k/{n}": b"2"}, expect={})
            assert {r.value for r in theirs.list("k/")} == {b"2"}
    finally:
        ours.close()
        theirs.close()


def test_sqlite_runs_with_a_journal_that_survives_power_loss(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sf.db")
    link = store._connect(tmp_path / "sf.db")
    assert link.execute("pragma journal_mode").fetchone() == ("wal",)
    assert link.execute("pragma synchronous").fetchone() == (2,)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    link.close()
    store.close()


def test_sqlite_says_what_is_wrong_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "sf.db").write_bytes(b"no database" * 100)
    with pytest.raises(ComputeError, match=r"sf\.db is damaged: file is not a database"):
        SqliteStore(tmp_path / "sf.db")


def test_sqlite_that_cannot_write_refuses_and_recovers(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sf.db")
    blocker = sqlite3.connect(tmp_path / "sf.db", isolation_level=None)
    store._write.execute("pragma busy_timeout=10")
    blocker.execute("begin immediate")
    with pytest.raises(Unavailable, match="cannot write"):
        store.commit({"a": b""}, expect={})
    blocker.execute("rollback")
    blocker.close()
    store.commit({"a": b""}, expect={})
    store.close()
