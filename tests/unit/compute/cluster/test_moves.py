"""A guest moves by way of a snapshot: whatever is killed or repeated, it has one owner, and its disks are whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compute.cluster import desired
from compute.cluster.feed import Feed
from compute.cluster.images.snapshots import Snapshots, remove
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.records.instances import Instance, delete_instance, finish_delete, rehome
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.nodes import Node, drain
from compute.cluster.records.snapshots import Snapshot, finish, snapshots_of, take
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.reports import settle
from compute.cluster.scheduler import create_instance, destination
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import ComputeError, Conflict, NoCapacity, NotFound, Unavailable
from compute.wire.codec import to_plain
from compute.wire.spec import DiskSpec, InstanceSpec, InstanceState, InstanceStatus, NodeFacts, Power
from imagestore import Digest, open_store, push
from tests.unit.imagestore.images import make_raw

WEB = "11111111-0000-4000-8000-000000000001"
S = InstanceState


def nobody(_: Node) -> None:
    """Nothing is measured."""


class Cloud:
    """Nodes a, b, c, the guest WEB on a, made of an image and a CD-ROM; `step` is what the server does next."""

    def __init__(self, directory: Path) -> None:
        self.records = SqliteStore(directory / "sf.db")
        self.usable = dict.fromkeys("abc", "")
        self.images = open_store(str(directory / "store"), create=True)
        self.base = push(self.images, make_raw(directory / "disk.raw"), "tiny").digest
        self.act(lambda txn: txn.create(Namespace(name="shop")))
        for number, name in enumerate("abc"):
            facts = NodeFacts(4, 2048, address=f"127.0.0.{number + 1}", architecture="x86_64")
            for made in (Node(uuid=new_uuid(), name=name, facts=to_plain(facts)), Claims(name=name)):
                self.act(lambda txn, made=made: txn.create(made))  # type: ignore[misc]
        own = NamespaceStores(self.records, lambda: str(directory / "store"), directory)
        self.fits = partial(destination, limits=Config(), usable=lambda: self.usable, used=nobody)
        stores = lambda: {"local": self.images}  # noqa: E731
        self.worker = Snapshots(self.records, own, stores, Feed(self.records), self.fits, self.pass_on)
        self.passes: Callable[[], None] = lambda: None
        cdrom = DiskSpec("sda", "b3:" + 64 * "1", bus="sata", cdrom=True)
        disks = DiskSpec("vda", str(self.base), size_bytes=1 << 20), cdrom
        made = Instance(
            uuid=WEB, name="web", namespace="shop", node="a", cpus=2, memory_mib=512, disks=disks, state=S.CREATED,
            power_state="on",
        )  # fmt: skip
        self.act(lambda txn: create_instance(txn, made, (), limits=Config(), usable=self.usable, used=nobody))

    def act(self, action: Callable[[Transaction], Any]) -> Any:
        return transact(self.records, action)

    def change(self, **changes: Any) -> None:
        self.act(lambda txn: txn.update(replace(txn.get(Instance, WEB), **changes)))

    @property
    def web(self) -> Instance:
        return Transaction(self.records).get(Instance, WEB)

    @property
    def taken(self) -> Snapshot | None:
        return next(iter(snapshots_of(Transaction(self.records), WEB)), None)

    def claimed(self) -> dict[str, int]:
        return {c.name: c.memory_mib for c in Transaction(self.records).list(Claims)}

    def told(self, node: str) -> InstanceSpec | None:
        return next(iter(desired.read(Transaction(self.records), node, "0" * 8, list("abc")).instances), None)

    def pass_on(self, one: Snapshot, node: str) -> None:
        """What both nodes are told while it passes; and what happens meanwhile."""
        source, destination = self.told("a"), self.told("b")
        assert (node, one.state) == ("a", "initial") and source and destination
        assert (source.leaving, source.coming, source.power) == (one.uuid, "", Power.ON)
        assert (destination.leaving, destination.coming, destination.delete) == ("", one.uuid, False)
        self.passes()

    def begin(self, to: str = "b", *, running: bool = False) -> None:
        def action(txn: Transaction) -> None:
            take(txn, WEB, to=self.fits(txn, WEB, to), running=running)

        self.act(action)

    def step(self, one: Snapshot | None = None) -> None:
        one = one or self.taken
        assert one is not None
        found = self.web if self.web.state == S.CREATED else None
        self.worker._advance(one, found)

    def stored(self, **said: Any) -> None:
        """The node says what became of it."""
        assert self.taken is not None
        order = replace(self.taken.order, digests={"vda": str(self.base)}, **said)
        status = InstanceStatus(WEB, S.CREATED, "off", snapshots=(order,))
        self.act(lambda txn: settle(txn, "a", status))

    def stays(self, why: str) -> None:
        """It is where it was, as it is wanted, and the reason is said."""
        assert (self.web.node, self.web.moving, self.web.left, self.web.arriving) == ("a", "", (), False)
        assert self.taken is not None and self.taken.state == "error" and why in self.taken.order.error
        assert self.claimed() == {"a": 512, "b": 0, "c": 0}
        assert all(self.told(node) is None for node in "bc")


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "index"))
    made = Cloud(tmp_path)
    yield made
    made.images.backend.close()
    made.worker._own.close()
    made.records.close()


def test_it_runs_until_its_images_are_kept_then_is_off_then_its_other_nodes(cloud: Cloud) -> None:
    cloud.begin()
    (told,) = (cloud.told("a"),)
    assert told is not None and told.power == Power.ON and not told.snapshots
    cloud.step()
    told = cloud.told("a")
    assert told is not None and told.power == Power.OFF and told.snapshots[0].at_rest
    assert cloud.web.power == Power.ON and cloud.web.moving == "b"
    cloud.stored()
    told = cloud.told("a")
    assert told is not None and told.power == Power.OFF and not told.snapshots, "it must not start again now"
    cloud.step()
    assert cloud.taken is None and cloud.claimed() == {"a": 0, "b": 512, "c": 0}
    gone, here = cloud.told("a"), cloud.told("b")
    assert gone is not None and gone.delete
    assert here is not None and (here.power, here.delete, here.arriving) == (Power.ON, False, True)
    disk, cdrom = cloud.web.disks
    assert (disk.image, disk.store, disk.size_bytes) == (str(cloud.base), "shop", 1 << 20)
    assert (cdrom.image, cdrom.store) == ("b3:" + 64 * "1", "")
    assert not list(cloud.worker._own.of("shop").names.list())


def test_steps_that_are_done_again_do_nothing_more(cloud: Cloud) -> None:
    """As a server does that was killed after it had written and before it knew."""
    cloud.begin()
    cloud.step()
    cloud.stored()
    cloud.stored(error="late")
    former = cloud.taken
    cloud.step()
    moved = cloud.web
    with pytest.raises(NotFound):
        cloud.step(former)
    assert cloud.web == moved and cloud.claimed() == {"a": 0, "b": 512, "c": 0}


@pytest.mark.parametrize("power", [Power.ON, Power.PAUSED, Power.OFF])
@pytest.mark.parametrize(
    ("said", "why"),
    [({"error": "no room for what it overwrote"}, "no room"), ({"at_rest": False}, "did not wait")],
)
def test_what_its_node_cannot_do_leaves_it_as_it_was(cloud: Cloud, said: Any, why: str, power: Power) -> None:
    cloud.change(power=power)
    cloud.begin()
    cloud.step()
    cloud.stored(**said)
    cloud.step()
    cloud.stays(why)
    told = cloud.told("a")
    assert told is not None and told.power == power


def test_a_place_that_is_gone_by_the_time_it_is_stored_leaves_it_as_it_was(cloud: Cloud) -> None:
    for late, why in (
        (lambda: cloud.usable.update(b="does not answer"), "b does not answer"),
        (lambda: cloud.act(lambda txn: drain(txn, "b", drained=True, router_nodes=[])), "b is drained"),
        (lambda: cloud.change(tpm=True), "TPM"),
    ):
        cloud.begin()
        cloud.step()
        cloud.stored()
        late()
        cloud.step()
        cloud.stays(why)
        cloud.usable["b"] = ""
        cloud.act(lambda txn: drain(txn, "b", drained=False, router_nodes=[]))
        time.sleep(1.1)  # the next one's tag


def test_one_that_was_given_away_meanwhile_moves_no_more(cloud: Cloud) -> None:
    cloud.begin()
    cloud.step()
    cloud.stored()
    cloud.act(lambda txn: rehome(txn, WEB, "c", "a was lost", gone=True))
    cloud.step()
    assert cloud.web.node == "c" and cloud.taken is not None and cloud.taken.state == "error"
    here = cloud.told("c")
    assert here is not None and here.power == Power.ON


def test_one_that_is_deleted_meanwhile_is_gone(cloud: Cloud) -> None:
    for at in range(3):
        cloud.begin()
        for step in (cloud.step, cloud.stored)[:at]:
            step()
        cloud.act(lambda txn: delete_instance(txn, WEB))
        cloud.step()
        assert cloud.taken is not None and "gone" in cloud.taken.order.error
        told = cloud.told("a")
        assert told is not None and told.delete
        cloud.change(state=S.CREATED)
        time.sleep(1.1)
    cloud.act(lambda txn: finish_delete(txn, txn.get(Instance, WEB)))
    assert cloud.claimed() == {"a": 0, "b": 0, "c": 0}


def test_a_move_that_is_taken_away_leaves_the_guest_as_it_was(cloud: Cloud) -> None:
    """Its snapshot is in the list as long as it is under way, and can be deleted like any other."""
    cloud.begin()
    cloud.step()
    assert cloud.taken is not None
    remove(cloud.records, cloud.worker._own, cloud.taken)
    told = cloud.told("a")
    assert cloud.taken is None and cloud.web.moving == "" and told is not None and told.power == Power.ON
    cloud.begin()


def test_one_that_ended_by_itself_is_not_started_by_its_move(cloud: Cloud) -> None:
    cloud.change(power_state="crashed")
    cloud.begin()
    cloud.step()
    cloud.stored()
    cloud.step()
    here = cloud.told("b")
    assert here is not None and here.power == Power.OFF


def test_what_cannot_move_is_said_before_anything_is_done(cloud: Cloud) -> None:
    before = cloud.web
    told: tuple[tuple[dict[str, Any], type[ComputeError], str], ...] = (
        ({"uefi": True}, Conflict, "UEFI"),
        ({"tpm": True}, Conflict, "TPM"),
        ({"ephemeral": True}, Conflict, "over once it is off"),
        ({"held_s": 9e9}, Conflict, "over once it is off"),
        ({"arriving": True}, Conflict, "just been moved"),
        ({"state": S.ERROR}, Conflict, "state error"),
        ({"left": ("b", "c")}, NoCapacity, "b has an old copy"),
    )
    for changes, error, why in told:
        cloud.change(**changes)
        with pytest.raises(error, match=why):
            cloud.begin("b" if "left" in changes else "")
        cloud.change(**{name: getattr(before, name) for name in changes})
    for node, why in (("a", "a has it now"), ("b", "b does not answer"), ("c", "an old copy")):
        cloud.usable["b"] = "does not answer"
        cloud.act(lambda txn: txn.update(replace(txn.get(Node, "c"), given=(WEB,))))
        with pytest.raises(NoCapacity, match=why):
            cloud.begin(node)
    with pytest.raises(NotFound):
        cloud.begin("nowhere")
    with pytest.raises(NoCapacity):
        cloud.begin("")
    cloud.usable["b"] = ""
    other = to_plain(NodeFacts(4, 2048, address="127.0.0.9", architecture="aarch64"))
    cloud.act(lambda txn: txn.update(replace(txn.get(Node, "b"), facts=other)))
    with pytest.raises(NoCapacity, match="b is not architecture=x86_64"):
        cloud.begin("b")
    assert cloud.taken is None


def test_one_at_a_time(cloud: Cloud) -> None:
    cloud.begin("b")
    for to in ("b", "c"):
        with pytest.raises(Conflict, match="under way"):
            cloud.begin(to)
    with pytest.raises(Conflict, match="under way"):
        cloud.act(lambda txn: take(txn, WEB))


def test_a_digest_that_its_store_does_not_have_moves_nothing(cloud: Cloud) -> None:
    """A node that somebody else owns by now says what it likes."""
    cloud.begin()
    cloud.step()
    assert cloud.taken is not None
    order = replace(cloud.taken.order, digests={"vda": str(Digest.of(b"absent"))})
    cloud.act(lambda txn: settle(txn, "a", InstanceStatus(WEB, S.CREATED, "off", snapshots=(order,))))
    cloud.step()
    cloud.stays("")


def test_one_that_passes_while_it_runs_is_the_others_in_one_transaction(cloud: Cloud) -> None:
    cloud.begin(running=True)
    cloud.step()
    assert (cloud.web.node, cloud.web.left, cloud.web.arriving, cloud.web.power_state) == (
        "b",
        ("a",),
        False,
        "on",
    )
    assert (cloud.web.passing, cloud.web.moving, cloud.taken) == ("", "", None)
    source, destination = cloud.told("a"), cloud.told("b")
    assert source and source.delete and destination and not destination.delete and destination.made
    assert (source.leaving, destination.coming) == ("", "") and cloud.claimed() == {"a": 0, "b": 512, "c": 0}


def raises(error: ComputeError) -> None:
    raise error


@pytest.mark.parametrize("who", ["a node", "the server", "somebody"])
def test_one_that_did_not_pass_runs_on_where_it_was_and_what_came_is_removed(cloud: Cloud, who: str) -> None:
    cloud.begin(running=True)
    assert cloud.taken is not None
    one = cloud.taken
    if who == "a node":
        cloud.passes = lambda: raises(Unavailable("b fell silent"))
        cloud.step()
    else:
        cloud.passes = lambda: raises(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):  # killed meanwhile
            cloud.step()
        assert cloud.taken and cloud.taken.state == "passing"
        cloud.step() if who == "the server" else remove(cloud.records, cloud.worker._own, cloud.taken)
    assert (cloud.web.node, cloud.web.left, cloud.web.passing, cloud.web.moving) == ("a", ("b",), "", "")
    assert (source := cloud.told("a")) and (source.leaving, source.power) == ("", Power.ON)
    assert (left := cloud.told("b")) and left.delete and cloud.claimed() == {"a": 512, "b": 0, "c": 0}
    with suppress(NotFound):  # whoever carried it and did not hear of that
        cloud.act(partial(finish, uuid=one.uuid, fits=cloud.fits))
    assert cloud.web.node == "a"


def test_one_that_cannot_pass_moves_cold_once_what_came_is_removed(cloud: Cloud) -> None:
    cloud.passes = lambda: raises(Conflict("b: unlike on the other node: machine"))
    cloud.begin(running=True)
    cloud.step()
    assert cloud.taken and (cloud.taken.state, cloud.taken.running) == ("initial", False)
    assert (cloud.web.node, cloud.web.left, cloud.web.moving) == ("a", ("b",), "")
    cloud.worker._look()
    assert not cloud.worker._busy, "b has not removed it yet"
    cloud.act(lambda txn: settle(txn, "b", InstanceStatus(WEB, S.DELETED)))
    cloud.step()
    assert cloud.taken.state == "ordered" and (told := cloud.told("a")) and told.power is Power.OFF


@pytest.mark.parametrize("meanwhile", ["it is deleted", "its node is lost"])
def test_what_happens_while_it_passes_comes_first(cloud: Cloud, meanwhile: str) -> None:
    def happens() -> None:
        if meanwhile == "it is deleted":
            cloud.act(lambda txn: delete_instance(txn, WEB))
        else:
            with pytest.raises(Conflict):
                cloud.act(lambda txn: rehome(txn, WEB, "b", "a is lost", gone=True))
            cloud.act(lambda txn: rehome(txn, WEB, "c", "a is lost", gone=True))

    cloud.begin(running=True)
    cloud.passes = happens
    cloud.step()
    assert (web := cloud.web).left == ("b",) and not web.passing and not web.moving
    assert (web.node, web.state) == (("a", S.DELETE_WAIT) if "deleted" in meanwhile else ("c", S.CREATED))
    assert (left := cloud.told("b")) and left.delete
