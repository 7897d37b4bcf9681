"""The agent's side of the wire: compute.remote against a real server over real TLS, without guests."""

import asyncio
import json
import stat
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from compute.agent import link as remote
from compute.agent.memory import now_s
from compute.cluster.certificates import certificate
from compute.cluster.records.nodes import make_token
from compute.cluster.records.transaction import transact
from compute.errors import ComputeError, Denied, Invalid, Unavailable
from compute.wire.spec import InstanceState, InstanceStatus, JoinToken, NodeFacts
from tests.api_server import Running, running
from tests.system.test_api_agents import address, listening, server
from tests.unit.compute.test_remote import Wires

__all__ = ["address", "server"]  # fixtures

FACTS = NodeFacts(cpus=8, memory_mib=16384, address="192.0.2.2")


class Desk:
    """What a node answers to the server."""

    async def console(self, instance_uuid: str, length: int) -> bytes:
        return b"\x00login: "

    async def clear_console(self, instance_uuid: str) -> None:
        raise Invalid(f"no instance {instance_uuid} here")

    async def ping(self, network_uuid: str, address: str) -> tuple[list[str], list[str]]:
        return [f"1 packet to {address}"], []

    async def doctor(self) -> list[tuple[str, str, str]]:
        return [("lan", "a rule is missing", "sf network doctor")]


def token(server: Running) -> str:
    return str(server.call("POST", "/nodes/token").body["token"])


@asynccontextmanager
async def node(identity: remote.Identity, directory: Path, plane: Wires) -> Any:
    controller = remote.RemoteController(identity, directory, plane)
    running_task = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        running_task.cancel()
        await asyncio.gather(running_task, return_exceptions=True)


def test_a_join_keeps_an_identity_that_only_root_can_read_and_uses_the_token_up(
    server: Running, address: tuple[str, int], tmp_path: Path
) -> None:
    url, text = f"https://{address[0]}:{address[1]}", token(server)
    identity = asyncio.run(remote.join(tmp_path / "n", url, text, "node2"))
    assert remote.load(tmp_path / "n") == identity and identity.installation == "0123abcd"
    assert stat.S_IMODE((tmp_path / "n" / "agent.json").stat().st_mode) == 0o600
    with pytest.raises(ComputeError, match="token"):
        asyncio.run(remote.join(tmp_path / "m", url, text, "node3"))
    assert remote.load(tmp_path / "m") is None
    assert str(identity.local_address()) == "127.0.0.1"


def test_a_server_with_another_certificate_learns_nothing(
    server: Running, address: tuple[str, int], tmp_path: Path
) -> None:
    url, real = f"https://{address[0]}:{address[1]}", JoinToken.parse(token(server))
    with pytest.raises(Denied, match="certificate"):
        asyncio.run(remote.join(tmp_path, url, str(JoinToken(b"\1" * 32, real.secret)), "node2"))
    asyncio.run(remote.join(tmp_path, url, str(real), "node2"))  # the token was not used up


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "https://"])
def test_what_is_no_url_of_a_server_is_refused(server: Running, tmp_path: Path, url: str) -> None:
    with pytest.raises(Invalid):
        asyncio.run(remote.join(tmp_path, url, token(server), "node2"))


def test_a_server_that_is_not_there_is_said_in_one_line(server: Running, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        asyncio.run(remote.join(tmp_path, "https://127.0.0.1:1", token(server), "node2"))


def test_a_node_registers_reports_answers_and_may_route(
    server: Running, address: tuple[str, int], tmp_path: Path
) -> None:
    async def story() -> None:
        url = f"https://{address[0]}:{address[1]}"
        identity = await remote.join(tmp_path, url, token(server), "node2")
        async with node(identity, tmp_path, Wires()) as far:
            await far.register("node2", FACTS, Desk())
            async with asyncio.timeout(30):
                while not far._lease.firm():
                    await far.desired("node2", 0, 0)
                    await asyncio.sleep(0.05)
            await far.report("node2", [InstanceStatus("nobody", InstanceState.CREATED)], [])
            asked = await server.services.controller.nodes.operations("node2")
            loop = server.loop
            calls = (asked.console("i", 10), asked.ping("n", "10.0.0.2"), asked.doctor())
            answers = [
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, loop)) for call in calls
            ]
            assert answers[0] == b"\x00login: "
            assert answers[1] == (["1 packet to 10.0.0.2"], [])
            assert answers[2] == [("lan", "a rule is missing", "sf network doctor")]
            with pytest.raises(ComputeError, match="no instance i here"):
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked.clear_console("i"), loop))

    asyncio.run(story())


def test_what_a_node_cannot_do_yet_may_be_asked_again(
    server: Running, address: tuple[str, int], tmp_path: Path
) -> None:
    """A publication in the moment of an agent's start was a 404."""

    async def story() -> None:
        identity = await remote.join(tmp_path, f"https://{address[0]}:{address[1]}", token(server), "node2")
        async with node(identity, tmp_path, Wires()) as far:  # nothing is registered
            await far.desired("node2")  # the server knows now where it may ask
            async with asyncio.timeout(30):  # and that it lives, once it has a lease
                while not server.services.controller.nodes.alive("node2"):
                    await asyncio.sleep(0.05)
            asked = (await server.services.controller.nodes.operations("node2")).listening()
            with pytest.raises(Unavailable, match="not ready"):
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, server.loop))

    asyncio.run(story())


def test_while_the_server_is_away_the_last_desired_state_holds_without_routers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_AWAY_S", 0.1)

    async def until_routing(far: remote.RemoteController) -> None:
        async with asyncio.timeout(30):
            while not far._lease.firm():
                await far.desired("node2", 0, 0)
                await asyncio.sleep(0.05)

    async def before(url: str, text: str) -> None:
        identity = await remote.join(tmp_path / "n", url, text, "node2")
        async with node(identity, tmp_path / "n", Wires()) as far:
            await far.register("node2", FACTS, Desk())
            await until_routing(far)

    async def away() -> None:
        identity = remote.load(tmp_path / "n")
        assert identity is not None
        plane = Wires()
        async with node(identity, tmp_path / "n", plane) as far:
            await far.register("node2", FACTS, Desk())  # does not wait for the server
            found = await far.desired("node2")
            assert found.networks.installation == "0123abcd"
            assert not far._lease.firm()
            with pytest.raises(Unavailable):
                await far.report("node2", [InstanceStatus("i", InstanceState.CREATED)], [])
        assert json.loads((tmp_path / "n" / "desired.json").read_text())["revision"] == found.revision

    with running(tmp_path / "state") as server, listening(server) as address:
        url = f"https://{address[0]}:{address[1]}"
        asyncio.run(before(url, token_of(server)))
    asyncio.run(away())


def token_of(server: Running) -> str:
    *_, fingerprint = certificate(server.services.config.state_dir / "auth")
    return str(transact(server.services.store, lambda txn: make_token(txn, fingerprint)))


def test_a_node_that_never_reached_its_server_has_nothing_to_act_on(tmp_path: Path) -> None:
    pem = ssl_pem(tmp_path)
    identity = remote.Identity("https://127.0.0.1:1", "node2", "secret", "0123abcd", pem)

    async def story() -> None:
        async with node(identity, tmp_path, Wires()) as far:
            with pytest.raises(Unavailable):
                await far.desired("node2")

    asyncio.run(story())


def ssl_pem(directory: Path) -> str:
    directory.mkdir(exist_ok=True)
    return certificate(directory)[0].read_text()


def test_routers_are_dropped_once_the_lease_runs_out(server: Running, tmp_path: Path) -> None:
    with listening(server) as address:
        url = f"https://{address[0]}:{address[1]}"
        identity = asyncio.run(remote.join(tmp_path, url, token(server), "node2"))

    async def story() -> None:
        plane = Wires()
        async with node(identity, tmp_path, plane) as far:
            far._lease.renewed(now_s(), 0.5)
            async with asyncio.timeout(30):
                while plane.dropped == 0:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.6)
            assert plane.dropped == 1

    asyncio.run(story())
