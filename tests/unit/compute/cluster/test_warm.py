"""The server's side of warm states: who may become one, what it is called, to whom it is offered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.auth import delete_namespace
from compute.cluster.images.snapshots import Snapshots, offered
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.snapshots import Snapshot, finish, settle_snapshot, take
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import Transaction, pieces, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import Conflict
from compute.wire.spec import AGENT_CHANNEL, Capture, InstanceState, Warm
from imagestore import Store, push
from tests.unit.compute.cluster.test_snapshots import DB, WEB, advance, guest
from tests.unit.compute.cluster.test_snapshots import images as images
from tests.unit.compute.cluster.test_snapshots import store as store
from tests.unit.compute.cluster.test_snapshots import worker as worker
from tests.unit.imagestore.images import make_raw

CAN = {"side_channels": (AGENT_CHANNEL,)}


def test_a_state_is_offered_to_what_fits_in_its_own_namespace_until_its_name_is_gone(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    maker = guest(store, WEB, base, held_s=1.0, **CAN)
    uuid = transact(store, lambda txn: take(txn, WEB, warm=True)).uuid
    name = advance(store, worker, WEB).order.warm
    own = worker._own.of("shop")
    memory = push(own, make_raw(tmp_path / "memory.raw", seed=2), None, architecture="memory").digest
    labels = {"memory": str(memory), "fit": "f" * 99}
    disk = push(own, make_raw(tmp_path / "disk.raw"), None, labels=labels).digest

    def settled(*devices: str) -> str:
        digests = {"vda": str(disk), "memory": str(memory)}
        said = Capture(uuid, digests={device: digests[device] for device in devices}, warm="another-name")
        transact(store, lambda txn: settle_snapshot(txn, maker, said))
        return advance(store, worker, WEB).state

    assert settled("vda", "memory") == "created"
    assert own.names.get(name).images == {"x86_64": disk, "memory": memory}
    # Its maker goes, and was only held: what else was made of it goes with it.
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), state=InstanceState.DELETED)))
    worker._look()
    worker._pool.shutdown()
    new = guest(store, DB, base, name="db", **CAN)

    def seen(instance: Instance) -> Warm | None:
        return offered(Transaction(store), worker._own, instance, "x86_64").warm

    assert seen(new) == Warm(str(disk), str(memory), "f" * 64)
    transact(store, lambda txn: txn.create(Namespace(name="other")))
    larger, other = replace(new.disks[0], size_bytes=9 << 20), replace(new.disks[0], image=str(disk))
    others: list[dict[str, Any]] = [
        {"memory_mib": 65}, {"cpus": 2}, {"namespace": "other"}, {"side_channels": ()}, {"configdrive": "none"},
        {"uefi": True}, {"tpm": True}, {"video": {"vdi": "vnc"}},
        {"disks": new.disks * 2}, {"disks": (larger,)}, {"disks": (other,)},
    ]  # fmt: skip
    for changes in others:
        assert seen(replace(new, **changes)) is None, changes
    own.names.remove(name)
    assert seen(new) is None
    # The namespace's own keys write into its store: memory that no node made is never qemu's to read.
    forged = push(own, make_raw(tmp_path / "forged.raw", seed=3), None, architecture="memory").digest
    push(own, make_raw(tmp_path / "disk.raw"), name, labels={"memory": str(forged), "fit": "f" * 64})
    assert own.names.get(name).images["x86_64"] != disk and seen(new) is None
    own.names.set(name, "latest", "x86_64", disk)
    assert seen(new) == Warm(str(disk), str(memory), "f" * 64)
    # A second one takes the place of the first.
    again = push(own, make_raw(tmp_path / "again.raw", seed=4), name, labels=labels).digest
    digests = {"sda": str(again), "memory": str(memory)}
    done = replace(Transaction(store).get(Snapshot, uuid).order, digests=digests)
    transact(store, lambda txn: txn.update(replace(txn.get(Snapshot, uuid), state="stored", order=done)))
    transact(store, lambda txn: finish(txn, uuid))
    assert seen(new) == Warm(str(again), str(memory), "f" * 64)
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, DB), state=InstanceState.DELETED)))
    pieces(store, lambda txn: delete_namespace(txn, "shop"))
    assert not Transaction(store).list(Taken, "warm/")


def test_what_has_something_of_its_own_becomes_no_state_and_half_of_one_is_none(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    maker = guest(store, WEB, base, **CAN)
    for changes in (
        {"ssh_key": "ssh-ed25519 x"},
        {"user_data": b"x"},
        {"side_channels": ()},
        {"power_state": "off"},
    ):
        transact(store, lambda txn, c=changes: txn.update(replace(txn.get(Instance, WEB), **c)))  # type: ignore[misc]
        with pytest.raises(Conflict):
            transact(store, lambda txn: take(txn, WEB, warm=True))
        old = {key: getattr(maker, key) for key in changes}
        transact(store, lambda txn, o=old: txn.update(replace(txn.get(Instance, WEB), **o)))  # type: ignore[misc]
    uuid = transact(store, lambda txn: take(txn, WEB, warm=True)).uuid
    assert advance(store, worker, WEB).state == "ordered"
    transact(store, lambda txn: settle_snapshot(txn, maker, Capture(uuid, digests={"vda": str(base)})))
    assert advance(store, worker, WEB).state == "error" and not list(worker._own.of("shop").names.list())
