"""A fence command: a lost node's guests go once it has confirmed for this loss, and nothing else waits for it.

The real upkeep and real processes; nodes are those of test_losses, silent for as long as a test says.
"""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from compute.cluster import liveness, upkeep
from compute.cluster.liveness import LOST_S
from compute.cluster.records.networks import Network, create_network
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.config import Config, load
from compute.errors import Stale
from imagestore import Settings
from imagestore.errors import Invalid
from tests.unit.compute.cluster.leases import lapse
from tests.unit.compute.cluster.test_losses import Played

COMMAND = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> calls
how=$(cat "how-$1-$2" 2>/dev/null || echo well)
case $how in
    well) ;;
    refused) echo first; printf 'no \\033[31mBMC\\n' >&2; exit 1 ;;
    chatty) exec yes ;;
    hanging) sleep 600 & echo $! > pid.new; mv pid.new "pid-$2"; wait ;;
esac
"""


class Fenced(Played):
    """With a command whose end for each node a test chooses."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "sf.db")
        self.directory = directory
        program = directory / "fence"
        program.write_text(COMMAND)
        program.chmod(0o755)
        self.command = (str(program),)

    def ends(self, node: str, how: str, verb: str = "off") -> None:
        (self.directory / f"how-{verb}-{node}").write_text(how)

    def calls(self, node: str = "n2") -> int:
        path = self.directory / "calls"
        return path.read_text().splitlines().count(f"off {node}") if path.exists() else 0

    def hung(self, node: str = "n2") -> int:
        path = self.directory / f"pid-{node}"
        return int(path.read_text()) if path.exists() else 0

    def silence(self, name: str) -> None:
        lease = self.store.get(f"alive/{name}")
        assert lease is not None
        lapse(self.store, int(lease.value))

    @asynccontextmanager
    async def upkept(self) -> AsyncIterator[None]:
        config = Config(fence_command=self.command)
        self.controller.feed.start()
        task = asyncio.create_task(
            upkeep.keep_up(self.store, self.controller.feed, self.controller.nodes, config, lambda node: None)
        )
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fenced]:
    for name, s in (("LOST_S", 0.2), ("_FENCED_S", 0.1), ("_LOOK_S", 0.02), ("_FENCE_AGAIN_S", 0.05)):
        monkeypatch.setattr(upkeep, name, s)
    monkeypatch.setattr(liveness, "LEASE_S", 600.0)
    made = Fenced(tmp_path)
    made.silence("n3")
    made.controller.nodes.renew("n3")
    yield made
    made.controller.feed.stop()
    made.store.close()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def test_guests_go_once_the_command_has_confirmed(fenced: Fenced) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    fenced.lose("n2")
    assert fenced.one(web).node == "n2" and fenced.look() == {"n2"}
    assert "not confirmed" in fenced.one(web).progress and fenced.events(web).count("is lost") == 1

    async def story() -> None:
        async with fenced.upkept():
            await until(lambda: fenced.one(web).node == "n3")

    asyncio.run(story())
    assert fenced.calls() == 1
    assert "fence command: exit code 0" in fenced.events("n2", "node")


def test_what_it_has_confirmed_holds_for_the_next_server_too(fenced: Fenced) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    fenced.lose("n2")
    transact(fenced.store, lambda txn: txn.writes.update({"off/n2": b""}))
    assert fenced.look() == set()
    assert fenced.one(web).node == "n3" and not fenced.calls()


def test_a_node_whose_fence_did_not_confirm_is_never_replaced(
    fenced: Fenced, caplog: pytest.LogCaptureFixture
) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    fenced.ends("n2", "refused")

    async def story() -> None:
        fenced.silence("n2")
        async with fenced.upkept():
            await until(lambda: fenced.calls() >= 4)
            assert fenced.one(web).node == "n2"
            said = fenced.events("n2", "node")
            assert said.count("exit code 1") == 1 and "BMC" not in said and "first" not in said
            assert caplog.text.count("off n2: exit code 1: no [31mBMC") == 1
            fenced.ends("n2", "chatty")
            await until(lambda: fenced.events("n2", "node").count("fence command") == 2)
            assert fenced.one(web).node == "n2"
            fenced.ends("n2", "well")
            await until(lambda: fenced.one(web).node == "n3")

    asyncio.run(story())


def test_one_that_hangs_is_ended_and_delays_nothing_else(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Network(uuid=new_uuid(), name="lan", namespace="system", netblock="10.0.0.0/24", vni=0)
    lan = transact(fenced.store, lambda txn: create_network(txn, made, excluded=(), router_nodes=["n3"]))
    web, db = fenced.guest("web", on_node_loss="restart"), fenced.guest("db", "n3", on_node_loss="restart")
    fenced.ends("n2", "hanging")
    fenced.silence("n2")

    async def story() -> None:
        async with fenced.upkept():
            await until(fenced.hung)
            fenced.silence("n3")
            await until(lambda: Transaction(fenced.store).get(Network, lan.uuid).router_node == "n1")
            await until(lambda: fenced.one(db).node == "n1")
            assert fenced.one(web).node == "n2" and not gone(fenced.hung())
        await until(lambda: gone(fenced.hung()))
        monkeypatch.setattr(upkeep, "_FENCE_S", 0.2)
        async with fenced.upkept():
            await until(lambda: "exit code 124" in fenced.events("n2", "node"))
            assert fenced.one(web).node == "n2"
        await until(lambda: gone(fenced.hung()))

    asyncio.run(story())


def test_a_server_that_ends_in_the_middle_has_it_ended_and_the_next_one_calls_it_again(
    fenced: Fenced,
) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    fenced.ends("n2", "hanging")

    async def story() -> None:
        fenced.silence("n2")
        async with fenced.upkept():
            await until(fenced.hung)
        await until(lambda: gone(fenced.hung()))
        assert fenced.one(web).node == "n2"
        fenced.ends("n2", "well")
        async with fenced.upkept():
            await until(lambda: fenced.one(web).node == "n3")

    asyncio.run(story())
    assert fenced.calls() == 2


def test_a_node_that_answers_meanwhile_is_left_alone(fenced: Fenced) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    fenced.ends("n2", "hanging")

    async def story() -> None:
        fenced.silence("n2")
        async with fenced.upkept():
            await until(fenced.hung)
            fenced.controller.nodes.renew("n2")
            await until(lambda: gone(fenced.hung()))
            await asyncio.sleep(0.3)  # longer than it waits before it calls again

    asyncio.run(story())
    assert fenced.one(web).node == "n2" and fenced.calls() == 1
    assert fenced.store.get("off/n2") is None and "fence command" not in fenced.events("n2", "node")


def test_what_was_confirmed_for_one_loss_counts_for_no_other(fenced: Fenced) -> None:
    fenced.guest("full1", "n1", memory_mib=1500)
    fenced.guest("full3", "n3", memory_mib=1000)
    web = fenced.guest("web", on_node_loss="restart", memory_mib=2200, order=1)
    db = fenced.guest("db", on_node_loss="restart", memory_mib=1300, order=2)  # no room is left for it then

    async def story() -> None:
        fenced.silence("n2")
        async with fenced.upkept():
            await until(lambda: fenced.one(web).node == "n3")
            fenced.controller.nodes.renew("n2")
            assert (
                fenced.store.get("off/n2") is None and fenced.node("n2").fence
            )  # it has not said what is off
            transact(fenced.store, lambda txn: txn.update(replace(txn.get(Claims, "n3"), memory_mib=0)))
            fenced.ends("n2", "refused")
            fenced.silence("n2")
            await until(lambda: "exit code 1" in fenced.events("n2", "node"))
            assert fenced.one(db).node == "n2"

    asyncio.run(story())


def test_a_confirmation_that_a_lease_voids_in_that_moment_gives_nothing(fenced: Fenced) -> None:
    fenced.guest("web", on_node_loss="restart")
    fenced.lose("n2")
    transact(fenced.store, lambda txn: txn.writes.update({"off/n2": b""}))
    txn, config = Transaction(fenced.store), Config(fence_command=fenced.command)
    assert upkeep.bring_back(txn, fenced.controller.nodes, config, lambda node: None, set()) and txn.writes
    fenced.controller.nodes.renew("n2")
    fenced.silence("n2")
    with pytest.raises(Stale):
        txn.commit()


def test_no_power_is_taken_where_no_guest_would_go(fenced: Fenced) -> None:
    fenced.guest("stays")
    fenced.guest("full1", "n1", memory_mib=1500)
    fenced.guest("full3", "n3", memory_mib=3000)
    web = fenced.guest("web", on_node_loss="restart", memory_mib=1024)
    fenced.lose("n2", LOST_S)
    assert fenced.look() == set() and "memory free" in fenced.one(web).progress


def test_the_log_tells_of_power_that_it_cannot_see(fenced: Fenced, caplog: pytest.LogCaptureFixture) -> None:
    fenced.ends("n3", "refused", "status")

    async def story() -> None:
        async with fenced.upkept():
            await until(lambda: "status n3: exit code 1: no [31mBMC" in caplog.text)
        fenced.command = ("/no/such/program",)
        async with fenced.upkept():
            await until(lambda: "status n3: exit code 127" in caplog.text)

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert "status n1" not in caplog.text and "/no/such/program" in caplog.text
    assert "off" not in (fenced.directory / "calls").read_text()


def test_the_setting_is_words_as_a_shell_has_them() -> None:
    assert load(Settings({"fence_command": "/etc/sf/fence 'a b'"}, {})).fence_command == (
        "/etc/sf/fence",
        "a b",
    )
    assert load(Settings({}, {})).fence_command == ()
    with pytest.raises(Invalid, match="fence_command"):
        load(Settings({"fence_command": "/etc/sf/fence 'a"}, {}))


def test_a_machine_that_can_start_no_process_has_confirmed_nothing_and_goes_on(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    web = fenced.guest("web", on_node_loss="restart")
    whole = upkeep.TemporaryFile

    def full() -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async def story() -> None:
        monkeypatch.setattr(upkeep, "TemporaryFile", full)
        fenced.silence("n2")
        async with fenced.upkept():
            await until(lambda: "exit code -1" in fenced.events("n2", "node"))
            assert "exit code -1: [Errno 28] no space" in caplog.text
            assert fenced.one(web).node == "n2" and not fenced.calls()
            monkeypatch.setattr(upkeep, "TemporaryFile", whole)
            await until(lambda: fenced.one(web).node == "n3")

    asyncio.run(story())
