"""What guests are to do when their node's machine has started."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.controller import Controller
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.wire.spec import InstanceState, NodeFacts, Power


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "sf.db")
    yield store
    store.close()


def guest(store: SqliteStore, name: str, **changes: Any) -> str:
    given = {"node": "n1", "state": InstanceState.CREATED, **changes}
    made = Instance(uuid=new_uuid(), name=name, namespace="system", cpus=1, memory_mib=64, disks=(), **given)
    transact(store, lambda txn: txn.create(made))
    return made.uuid


def registers(controller: Controller, boot: str) -> None:
    asyncio.run(controller.register("n1", NodeFacts(2, 4096, boot=boot), None))  # type: ignore[arg-type]


def test_only_another_start_of_the_machine_changes_what_guests_are_to_do(store: SqliteStore) -> None:
    controller = Controller(store, "0badcafe", Config(node_name="n1"))
    asyncio.run(controller.start())
    controller.feed.stop()
    registers(controller, "monday")
    always = guest(store, "always", power=Power.OFF, autostart="yes")
    ended = guest(store, "ended", power=Power.ON, power_state="off", autostart="yes")
    never = guest(store, "never", power=Power.ON, power_state="on", autostart="no")
    last = guest(store, "last", power=Power.OFF)
    elsewhere = guest(store, "elsewhere", power=Power.OFF, autostart="yes", node="n2")
    before = {one.uuid: one for one in Transaction(store).list(Instance)}
    for boot in ("monday", ""):  # its agent is restarted; one of an earlier version does not say
        registers(controller, boot)
    assert {one.uuid: one for one in Transaction(store).list(Instance)} == before
    registers(controller, "monday")
    registers(controller, "tuesday")
    now = {one.uuid: one for one in Transaction(store).list(Instance)}
    assert (now[always].power, now[never].power) == (Power.ON, Power.OFF)
    assert now[ended].reboot_hard == before[ended].reboot_hard + 1
    assert now[last] == before[last] and now[elsewhere] == before[elsewhere]
