"""Upkeep is one server's: who lost the lease changes nothing more, and another takes it up."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from compute.cluster import upkeep
from compute.cluster.liveness import Server, known
from compute.cluster.records.taken import Taken, take
from compute.cluster.records.transaction import Transaction, pieces, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import LeaseLost
from tests.unit.compute.cluster.leases import lapse


def test_a_change_of_upkeep_proves_the_lease_in_its_transaction(tmp_path: Path) -> None:
    store, said = SqliteStore(tmp_path / "sf.db"), list[str]()
    granted = list[int]()
    grant = store.grant

    def remembered(ttl_s: float) -> int:
        granted.append(grant(ttl_s))
        return granted[-1]

    store.grant = remembered  # type: ignore[method-assign]

    async def part() -> None:
        await asyncio.to_thread(transact, store, lambda txn: take(txn, "request/first", "x"))
        lapse(store, granted[0])  # as if this server had been paused for too long
        try:
            await asyncio.to_thread(transact, store, lambda txn: take(txn, "request/second", "x"))
        except LeaseLost:
            said.append("lost")
        await asyncio.sleep(3600)

    async def story() -> None:
        with pytest.raises(ExceptionGroup):  # it ends with its lease, and `process.lasting` begins anew
            async with asyncio.timeout(60):
                await upkeep.alone(store, part)
        assert said == ["lost"]

    try:
        asyncio.run(story())
        read = Transaction(store)
        assert read.find(Taken, "request/first") and not read.find(Taken, "request/second")
        transact(store, lambda txn: take(txn, "request/second", "x"))  # what is no upkeep needs no lease
    finally:
        store.close()


def test_its_lease_is_renewed_whatever_fills_the_loops_own_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, go_on, renewed = SqliteStore(tmp_path / "sf.db"), threading.Event(), list[int]()
    refresh = store.refresh

    def counted(lease: int) -> None:
        refresh(lease)
        renewed.append(lease)

    monkeypatch.setattr(store, "refresh", counted)
    monkeypatch.setattr(upkeep, "_RENEW_S", 0.01)

    async def story() -> None:
        busy = [asyncio.create_task(asyncio.to_thread(go_on.wait, 20)) for _ in range(64)]
        await asyncio.sleep(0)
        leads = asyncio.create_task(upkeep.alone(store))
        try:
            async with asyncio.timeout(10):
                while len(renewed) < 3:
                    await asyncio.sleep(0.01)
        finally:
            leads.cancel()
            go_on.set()
        assert all(await asyncio.gather(*busy))

    try:
        asyncio.run(story())
    finally:
        store.close()


def test_what_was_good_once_is_forgotten_when_nobody_can_show_it_any_more(tmp_path: Path) -> None:
    store, now = SqliteStore(tmp_path / "sf.db"), time.time()
    ages = {
        "request/a": 80_000,
        "request/b": 90_000,
        "ticket/a": 60,
        "ticket/b": 4000,
        "join/a": 600,
        "join/b": 4000,
    }
    made = [Taken(name=name, owner="", created_s=now - age) for name, age in ages.items()]
    made.append(Taken(name="vni/7", owner="lan", created_s=1.0))
    try:
        transact(store, lambda txn: [txn.create(one) for one in made])
        pieces(store, upkeep._sweep)
        left = [one.name for one in Transaction(store).list(Taken)]
        assert left == ["join/a", "request/a", "ticket/a", "vni/7"]
    finally:
        store.close()


def test_a_server_that_was_not_seen_for_a_week_is_no_longer_told_of(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sf.db")

    async def story() -> None:
        saying = asyncio.create_task(
            known(store, Server(name="10.0.0.2:13001", url="https://10.0.0.2:13000"))
        )
        async with asyncio.timeout(60):
            while "10.0.0.2:13001" not in names():
                await asyncio.sleep(0.02)
        saying.cancel()

    def names() -> list[str]:
        return [one.name for one in Transaction(store).list(Server)]

    try:
        transact(store, lambda txn: txn.update(Server(name="10.0.0.1:13001", seen_s=1.0)))
        asyncio.run(story())
        assert names() == ["10.0.0.2:13001"]
    finally:
        store.close()
