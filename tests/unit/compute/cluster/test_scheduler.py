"""Placement: a pure function of what nodes have, hold and do; and the records around it."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.cluster.records.instances import Instance, delete_instance, finish_delete, rehome
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.scheduler import Judged, Room, create_instance, judge, liking, place, set_instance, weigh
from compute.cluster.state.protocol import StateStore
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import NoCapacity, NotFound
from compute.wire.spec import DiskSpec, InstanceState, NodeFacts
from tests import invariants

LIMITS = Config(cpu_ratio=2.0, memory_reserve_mib=512, disk_ratio=2.0, disk_reserve=2 << 30)
GIB = 1 << 30


def room(node: str, used_mib: int = 0, used_cpus: int = 0, used_gib: int = 0, **more: Any) -> Room:
    facts = NodeFacts(4, 4096, disk_bytes=more.pop("disk", 0) * GIB)
    claims = Claims(name=node, cpus=used_cpus, memory_mib=used_mib, disk_bytes=used_gib * GIB)
    return Room(node, facts, claims, **more)


def taken(rooms: list[Room], cpus: int = 1, memory_mib: int = 512, gib: int = 0, **told: Any) -> str:
    return place(judge(rooms, cpus, memory_mib, gib * GIB, limits=LIMITS, **told))


def test_the_node_with_most_free_memory_takes_it() -> None:
    assert taken([room("a", 1000), room("b"), room("c", 1)]) == "b"


def test_a_node_that_holds_the_image_comes_first() -> None:
    assert taken([room("a", 1000), room("b")], holders=["a"]) == "a"


def test_equal_nodes_are_taken_by_name() -> None:
    assert taken([room("b"), room("a")]) == "a"


def test_the_wanted_node_takes_it_or_nobody() -> None:
    rooms = [room("a", 4000), room("b")]
    assert taken(rooms, wanted="b") == "b"
    with pytest.raises(NoCapacity, match=r"no room: a has 0 MiB of memory free$"):
        taken(rooms, wanted="a")
    with pytest.raises(NotFound):
        taken(rooms, wanted="c")


def test_each_node_says_why_it_does_not_fit() -> None:
    rooms = [
        room("a", 3000),
        room("b", used_cpus=8),
        room("c", why_not="is drained"),
        room("d", used_gib=15, disk=10),
        room("e", disk=10, used={"disk_total_bytes": 10 * GIB, "disk_bytes": 9 * GIB}),
    ]
    with pytest.raises(NoCapacity) as refused:
        taken(rooms, 1, 600, 6)
    assert str(refused.value) == (
        "no room: a has 584 MiB of memory free; b has 0 vCPUs free; c is drained; "
        "d has 5.0 GiB of disk free; e has 1.0 GiB left for disks"
    )
    with pytest.raises(NoCapacity, match="there is no node"):
        taken([])


def test_disks_may_have_more_than_the_file_system_by_the_factor_and_a_node_that_does_not_say_has_no_limit() -> (
    None
):
    assert taken([room("a", used_gib=15, disk=10)], gib=5) == "a"
    with pytest.raises(NoCapacity):
        taken([room("a", used_gib=15, disk=10)], gib=6)
    assert taken([room("a", used_gib=1000)], gib=1000) == "a"
    nearly_full = room("a", disk=10, used={"disk_total_bytes": 10 * GIB, "disk_bytes": 9 * GIB})
    assert taken([nearly_full]) == "a", "nothing is added to its disks"


def test_a_part_of_each_nodes_memory_is_kept_for_guests_that_come_back() -> None:
    kept = replace(LIMITS, restart_reserve=25.0)
    (found,) = judge([room("a")], 1, 2561, limits=kept)
    assert (found.fits, found.memory_mib) == (False, 4096 - 1024 - 512)
    assert place(judge([room("a")], 1, 2560, limits=kept)) == taken([room("a")], 1, 2561) == "a"


def busy(share: float | None) -> dict[str, Any]:
    return {"cpu_share": share}


def test_a_much_busier_node_comes_later_and_a_little_does_not_count() -> None:
    rooms = [room("a", used=busy(0.9)), room("b", 1000, used=busy(0.2))]
    assert taken(rooms) == taken(rooms, holders=["a"]) == "b"
    assert taken([room("a", used=busy(0.6)), room("b", 1000, used=busy(0.2))]) == "a"
    assert taken([room("a", used=busy(0.9)), room("b", 1000)]) == "a", "nobody knows of b"
    assert taken([room("a", used=busy(None)), room("b", 1000, used=busy(0.0))]) == "a"


def test_affinity_comes_before_all_else_and_is_no_reason_not_to_fit() -> None:
    rooms = [room("a", used=busy(0.9)), room("b"), room("c", 4000)]
    assert taken(rooms, liking={"a": 1, "c": 9}, holders=["b"]) == "a"
    assert taken(rooms, liking={"b": -1}) == "a"
    assert taken(rooms[1:], liking={"b": -100}) == "b"


def test_those_that_fit_are_told_what_the_first_has_before_them() -> None:
    rooms = [room(name, used=busy(0.1)) for name in "fe"] + [
        room("d", 1),
        room("c", used=busy(0.7)),
        room("b"),
    ]
    rooms += [room("a", 4000)]
    found = judge(rooms, 1, 512, limits=LIMITS, liking={"b": -1}, holders=["e", "c", "f", "b"])
    assert [(one.name, one.fits, one.why_not) for one in found] == [
        ("e", True, ""),
        ("f", True, "fits, but e is first by name"),
        ("d", True, "fits, but e holds the image"),
        ("c", True, "fits, but e is less busy"),
        ("b", True, "fits, but e suits its affinity"),
        ("a", False, "has 0 MiB of memory free"),
    ]
    assert found[0] == Judged("e", True, "", 8, 3584, None)
    (more,) = judge([room("a"), room("b", 1)], 1, 512, limits=LIMITS)[1:]
    assert more.why_not == "fits, but a has more memory free"


HELD = st.tuples(
    st.integers(0, 8), st.integers(0, 4096), st.integers(0, 40), st.integers(0, 20), st.booleans()
)
LOADS = st.one_of(st.none(), st.floats(0, 1e300))


@given(
    st.lists(st.tuples(HELD, LOADS, st.booleans(), st.floats(-1e6, 1e6)), max_size=6),
    st.integers(1, 8),
    st.integers(1, 4096),
    st.integers(0, 10),
    st.randoms(use_true_random=False),
)
def test_a_placement_always_fits_is_found_when_there_is_one_and_does_not_depend_on_the_order_of_nodes(
    nodes: list[Any], cpus: int, memory_mib: int, gib: int, random: Any
) -> None:
    rooms, holders, liked, fits = [], [], {}, set[str]()
    for i, ((c, m, d, size, ok), load, holds, like) in enumerate(nodes):
        used = busy(load) | ({"disk_total_bytes": size * GIB, "disk_bytes": GIB} if load else {})
        rooms.append(room(f"n{i}", m, c, d, disk=size, why_not="" if ok else "is away", used=used))
        holders += [f"n{i}"] if holds else []
        liked[f"n{i}"] = like
        full = gib and ((size and d + gib > 2 * size) or (load and size - 1 < 2))
        if ok and c + cpus <= 8 and m + memory_mib <= 4096 - 512 and not full:
            fits.add(f"n{i}")
    told: dict[str, Any] = {"limits": LIMITS, "holders": holders, "liking": liked}
    found = judge(rooms, cpus, memory_mib, gib * GIB, **told)
    assert {one.name for one in found} == {one.node for one in rooms}
    assert {one.name for one in found if one.fits} == fits
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert [one.name for one in found if not one.why_not] == [one.name for one in found[:1] if one.fits]
    random.shuffle(rooms)
    again = judge(rooms, cpus, memory_mib, gib * GIB, **told)
    assert [one for one in again if one.fits] == [one for one in found if one.fits]
    if fits:
        assert place(found) in fits and liked[place(found)] == max(liked[name] for name in fits)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "sf.db")
    for number, name in enumerate(("n1", "n2")):
        facts = {"cpus": 64, "memory_mib": 8192 - number, "disk_bytes": 100 * GIB}
        made = Node(uuid=new_uuid(), name=name, facts=facts)
        transact(store, lambda txn, made=made: txn.create(made))  # type: ignore[misc]
        transact(store, lambda txn, name=name: txn.create(Claims(name=name)))  # type: ignore[misc]
    yield store
    store.close()


SEEN: Mapping[str, Any] = {"limits": LIMITS, "usable": {"n1": "", "n2": ""}, "used": lambda _: None}


def guest(name: str, gib: int = 1, **more: Any) -> Instance:
    disks = (
        DiskSpec("vda", size_bytes=gib * GIB),
        DiskSpec("vdb", size_bytes=9 * GIB, bus="sata", cdrom=True),
    )
    told: dict[str, Any] = {
        "namespace": "system",
        "node": "",
        "cpus": 1,
        "memory_mib": 64,
        "disks": disks,
    } | more
    return Instance(uuid=new_uuid(), name=name, **told)


def make(store: StateStore, name: str, gib: int = 1, **more: Any) -> Instance:
    one = guest(name, gib, **more)
    return transact(store, lambda txn: create_instance(txn, one, (), **SEEN))


def held(store: StateStore, node: str = "n1") -> Claims:
    return Transaction(store).get(Claims, node)


def created(store: StateStore, uuid: str) -> None:
    def started(txn: Transaction) -> None:
        txn.update(replace(txn.get(Instance, uuid), state=InstanceState.CREATED))

    transact(store, started)


def test_disks_are_claimed_grow_move_and_are_given_back(store: SqliteStore) -> None:
    web = make(store, "web", 10)
    assert held(store).disk_bytes == 10 * GIB, "a CD-ROM takes nothing"
    created(store, web.uuid)
    transact(store, lambda txn: set_instance(txn, web.uuid, {"disks": {"vda": 20}}, **SEEN))
    assert held(store).disk_bytes == 20 * GIB
    away = SEEN | {"usable": {"n2": ""}}
    transact(store, lambda txn: set_instance(txn, web.uuid, {"disks": {"vda": 30}}, **away))
    with pytest.raises(NoCapacity, match="n1 does not answer"):
        transact(store, lambda txn: set_instance(txn, web.uuid, {"memory_mib": 65}, **away))
    assert held(store).disk_bytes == 30 * GIB
    before = store.revision()
    with pytest.raises(NoCapacity, match=r"n1 has 170.0 GiB of disk free"):
        transact(store, lambda txn: set_instance(txn, web.uuid, {"disks": {"vda": 201}}, **SEEN))
    with pytest.raises(NoCapacity, match=r"n1 has 170.0 GiB of disk free; n2 has 200.0 GiB of disk free"):
        make(store, "big", 201)
    assert store.revision() == before
    invariants.check(store)
    transact(store, lambda txn: rehome(txn, web.uuid, "n2", "it is asked to"))
    assert held(store).disk_bytes == 0
    invariants.check(store)
    transact(store, lambda txn: finish_delete(txn, txn.get(Instance, web.uuid)))
    assert (held(store).disk_bytes, held(store, "n2").disk_bytes) == (0, None), (
        "nothing was placed on n2 by name"
    )
    invariants.check(store)


def test_claims_of_a_version_that_counted_no_disks_are_counted_by_the_next_placement(
    store: SqliteStore,
) -> None:
    make(store, "web", 150, node="n1")

    def older(txn: Transaction) -> None:
        txn.update(replace(held(store), disk_bytes=None))

    transact(store, older)
    with pytest.raises(NoCapacity, match=r"n1 has 50.0 GiB of disk free"):
        make(store, "db", 51, node="n1")
    gone = make(store, "db", 50, node="n1")
    assert held(store).disk_bytes == 200 * GIB
    transact(store, older)
    transact(store, lambda txn: finish_delete(txn, txn.get(Instance, gone.uuid)))
    assert held(store).disk_bytes is None
    make(store, "last", 1, node="n1")
    assert held(store).disk_bytes == 151 * GIB
    invariants.check(store)


def test_nothing_is_lost_or_counted_twice_when_many_create_grow_and_delete_at_once(
    store: SqliteStore,
) -> None:
    def one(number: int) -> None:
        try:
            made = make(store, f"g{number}", 1 + number % 7, memory_mib=16)
            created(store, made.uuid)
            grown = {"disks": {"vda": 10}, "memory_mib": 32}
            transact(store, lambda txn: set_instance(txn, made.uuid, grown, **SEEN))
            if number % 3 == 0:
                transact(store, lambda txn: delete_instance(txn, made.uuid))
                transact(store, lambda txn: finish_delete(txn, txn.get(Instance, made.uuid)))
        except NoCapacity as err:
            refused.append(str(err))

    refused: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(80)))
    invariants.check(store)
    sums = [held(store, name).disk_bytes or 0 for name in ("n1", "n2")]
    assert max(sums) <= 200 * GIB and sum(sums) > 300 * GIB
    assert refused and all("of disk free" in why for why in refused)


def test_labels_and_the_processors_of_nodes_are_asked_for(store: SqliteStore) -> None:
    def label(txn: Transaction) -> None:
        txn.update(replace(txn.get(Node, "n2"), metadata={"rack": "a", "tier": 1}))

    transact(store, label)
    assert make(store, "web", node_labels={"rack": "a"}).node == "n2"
    for labels, why in (
        ({"rack": "b"}, "n1 is not rack=b; n2 is not rack=b"),
        ({"tier": "1"}, "n2 is not tier=1"),
        ({"architecture": "aarch64"}, "n1 is not architecture=aarch64; n2 is not architecture=aarch64"),
    ):
        with pytest.raises(NoCapacity, match=why):
            make(store, "db", node_labels=labels)
    with pytest.raises(NoCapacity, match="n1 is not rack=a"):
        make(store, "db", node="n1", node_labels={"rack": "a"})
    with pytest.raises(NoCapacity) as refused:
        make(store, "db", node_labels={"rack": "x" * 10**6})
    assert len(str(refused.value)) < 1000, "not once for each node"
    arm = SEEN | {"limits": replace(LIMITS, architecture="aarch64")}
    with pytest.raises(NoCapacity, match="n1 is not architecture=aarch64"):
        transact(store, lambda txn: create_instance(txn, guest("db"), (), **arm))


def test_affinity_is_read_as_shaken_fist_has_it_and_labels_are_tags(store: SqliteStore) -> None:
    web = make(store, "web", node="n2", metadata={"tags": ["web", 7, {}], "role": "front", "odd": {}})
    others = {"namespace": "shop", "node": "n1", "metadata": {"tags": ["web"]}}
    make(store, "other", **others)
    for affinity, node in (
        ({"web": -10}, "n1"),
        ({"cpu": {"web": 10}}, "n2"),
        ({"role=front": 1}, "n2"),
        ({"role=front": 1, "web": -2}, "n1"),
        ({"nobody": 5}, "n1"),
    ):
        there = weigh(Transaction(store), guest("db", metadata={"affinity": affinity}), **SEEN)[1]
        assert there[0].name == node, affinity
    for odd in (None, 7, "x", [], {"cpu": 3}, {"web": "x"}, {"web": None}, {"web": 10**400}, {"cpu": [1]}):
        assert not any(liking(Transaction(store), guest("db", metadata={"affinity": odd})).values()), odd
    assert not liking(Transaction(store), replace(web, metadata={"affinity": {"web": 1}})), (
        "itself is no company"
    )
