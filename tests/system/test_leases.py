"""A joined node under its lease: a real server, and a process in the place of a guest's qemu."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compute.agent import link as remote
from compute.agent.memory import Lease, boot, cut_first, now_s
from compute.cluster import liveness
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import fence
from compute.cluster.records.transaction import Transaction, transact
from compute.wire.codec import to_plain
from compute.wire.spec import DiskSpec, InstanceSpec, InstanceState, NodeDesired
from net import NodeNetworks
from tests.api_server import Running, running
from tests.system.test_api_agents import listening
from tests.system.test_remote_agent import FACTS, Desk, node, ssl_pem, token_of
from tests.unit.compute.test_remote import Wires

WEB, DB = "11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002"


@contextmanager
def qemu(*uuids: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    argv = [sys.executable, "-c", "import time; time.sleep(600)", "-uuid"]
    made = [subprocess.Popen([*argv, uuid, "-m", "1"]) for uuid in uuids]
    while any("-uuid" not in Path(f"/proc/{process.pid}/cmdline").read_text() for process in made):
        time.sleep(0.01)  # Popen returns in the middle of exec
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()


def guests(server: Running) -> None:
    """One that others may be given, and one that stays."""
    for uuid, leased_s in ((WEB, 5.0), (DB, 0.0)):
        made = Instance(
            uuid=uuid, name=uuid[:4], namespace="system", node="node2", cpus=1, memory_mib=64,
            disks=(DiskSpec("vda"),), state=InstanceState.CREATED, leased_s=leased_s,
            on_node_loss="restart" if leased_s else "leave",
        )  # fmt: skip
        transact(server.services.store, lambda txn, made=made: txn.create(made))


def wires(home: Path) -> Wires:
    made = Wires()
    made.power = Lease(home / "lease")
    return made


async def firm(far: remote.RemoteController) -> None:
    async with asyncio.timeout(30):
        while not far._power.firm():
            await far.desired("node2")
            await asyncio.sleep(0.05)


async def ended(process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(30):
        while process.poll() is None:
            await asyncio.sleep(0.02)


def test_without_its_server_a_node_stops_what_others_may_be_given_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_RENEW_S", 0.2)
    monkeypatch.setattr(remote, "_AWAY_S", 0.1)
    monkeypatch.setattr(liveness, "GUESTS_S", 3.0)
    home = tmp_path / "n"

    async def joins(url: str, text: str) -> None:
        identity = await remote.join(home, url, text, "node2")
        async with node(identity, home, wires(home)) as far:
            await far.register("node2", FACTS, Desk())
            await firm(far)
            with qemu(WEB) as (web,):
                await asyncio.sleep(4)  # longer than a lease lasts
                assert web.poll() is None

    async def away() -> None:
        identity = remote.load(home)
        assert identity is not None and (home / "lease").exists()
        (home / "lease").write_text(f"{boot()} {now_s() + 6}")  # the server took a while to end
        with qemu(WEB, DB) as (web, db):
            async with node(identity, home, wires(home)) as far:  # after a kill -9, with some time left
                assert far._power.firm() and web.poll() is None
                await ended(web)
                assert not far._power.held() and db.poll() is None
        with qemu(WEB, DB) as (web, db):
            async with node(identity, home, wires(home)) as far:  # and one for which none is
                await far.desired("node2")
                await ended(web)
                assert db.poll() is None

    with running(tmp_path / "state") as server, listening(server) as address:
        guests(server)
        asyncio.run(joins(f"https://{address[0]}:{address[1]}", token_of(server)))
    asyncio.run(away())


def test_what_was_given_to_others_is_stopped_before_the_agent_hears_of_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_RENEW_S", 0.2)
    home = tmp_path / "n"

    async def story(server: Running, url: str) -> None:
        identity = await remote.join(home, url, token_of(server), "node2")

        def give(txn: Transaction) -> None:
            fence(txn, "node2", DB)

        async with node(identity, home, wires(home)) as far:
            await far.register("node2", FACTS, Desk())
            await firm(far)
            with qemu(DB) as (db,):
                transact(server.services.store, give)
                told = await far.desired("node2")
                assert told.given == (DB,) and told.fence
                assert db.wait(30) == -9

    with running(tmp_path / "state") as server, listening(server) as address:
        asyncio.run(story(server, f"https://{address[0]}:{address[1]}"))


def test_systemd_hears_that_the_agent_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = remote.Identity("https://127.0.0.1:1", "node2", "secret", "0123abcd", ssl_pem(tmp_path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0sf-notify-{tmp_path.name}-{time.time_ns()}")
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname().decode().replace("\0", "@", 1))

        async def story() -> None:
            async with node(identity, tmp_path, wires(tmp_path)):
                async with asyncio.timeout(30):
                    for _ in range(3):
                        said = await asyncio.get_running_loop().sock_recv(systemd, 100)
                        assert said == b"WATCHDOG=1"

        asyncio.run(story())


def test_a_server_that_starts_without_its_etcd_first_stops_what_others_may_be_given(tmp_path: Path) -> None:
    """Its link begins when it has asked the state; others may have this node's guests by then."""
    specs = (
        InstanceSpec(uuid, uuid[:4], "system", 1, 64, (), leased_s=s) for uuid, s in ((WEB, 5.0), (DB, 0.0))
    )
    told = NodeDesired(1, NodeNetworks("0badcafe", "n1"), instances=tuple(specs))
    (tmp_path / "desired.json").write_text(json.dumps(to_plain(told)))
    argv = [Path(sys.executable).with_name("sf"), "serve", "--state", "etcd://127.0.0.1:1"]
    told_by = {**os.environ, "SF_STATE_DIR": str(tmp_path), "SF_LISTEN": "127.0.0.1:0"}
    with qemu(WEB, DB) as (web, db):
        (tmp_path / "lease").write_text(f"{boot()} {now_s() + 600}")
        cut_first(tmp_path)
        assert web.poll() is None
        (tmp_path / "lease").unlink()
        ended = subprocess.run(argv, env=told_by, capture_output=True, text=True, timeout=120)
        assert "127.0.0.1:1" in ended.stderr and ended.returncode == 8
        assert web.wait(30) == -9 and db.poll() is None
