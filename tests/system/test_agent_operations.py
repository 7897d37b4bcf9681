"""/instances/R/agent and /agentoperations, as Shaken Fist's clients use them. The node is played, whatever it says."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from compute.api import inside
from compute.errors import Unavailable
from compute.wire.streams import Stream
from tests.api_server import Running, running
from tests.system.machine import within

Play = Callable[[str, dict[str, Any], Stream], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, running(tmp_path_factory.mktemp("operations")) as found:
        patch.setenv("SF_CACHE_DIR", str(tmp_path_factory.mktemp("hints")))
        found.agent.agent_state = "ready"
        made = found.instance("web", found.network()["uuid"]).body
        found.wait_for(f"/instances/{made['uuid']}", "created")
        found.call("POST", "/auth/namespaces", {"namespace": "rival", "key_name": "k", "key": "rival-key"})
        found.tokens["rival"] = found.login("rival", "rival-key").body["access_token"]
        yield found


@pytest.fixture
def plays(server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[Play], None]:
    """The node's end of every stream from now on."""

    def plays(play: Play) -> None:
        async def stream(kind: str, target: str, options: dict[str, Any], ticket: str) -> None:
            end = await server.agent.controller.dial(server.agent.node, ticket)

            async def serve() -> None:
                with suppress(Unavailable):
                    await play(kind, options, end)
                await end.aclose()

            server.agent.echoes.append(asyncio.create_task(serve()))

        monkeypatch.setattr(server.agent, "stream", stream)

    return plays


def ended(server: Running, made: Any) -> Any:
    """How an operation ended, polled as the client does."""
    assert made.status == 200, made.body
    found = server.wait_for(f"/agentoperations/{made.body['uuid']}", "complete")
    return found["results"]["0"]


def busy() -> list[Any]:
    return [task for _, task in inside._operations.values() if not task.done()]


def execute(server: Running, line: str = "true") -> Any:
    return server.call("POST", "/instances/web/agent/execute", {"command_line": line})


def test_a_command_line_is_the_shells_and_its_code_and_texts_come_back(
    server: Running, plays: Callable[[Play], None]
) -> None:
    asked = []

    async def play(kind: str, options: dict[str, Any], end: Stream) -> None:
        asked.append((kind, options))
        for message in (b"\1out ", b"\2errors", b"\1more\xff", '{"exit": 7}'):
            await end.send(message)

    plays(play)
    made = execute(server, "ls | wc")
    assert (made.body["state"], made.body["results"]) == ("executing", {})
    result = ended(server, made)
    assert result == {"return-code": 7, "stdout": "out more\ufffd", "stderr": "errors"}
    assert asked == [("exec", {"argv": ["/bin/sh", "-c", "ls | wc"], "input": False})]
    shown = server.get("/instances/web/agentoperations", {"all": True})[-1]
    assert shown["commands"] == [{"command": "execute", "commandline": "ls | wc"}]
    assert shown["uuid"] not in [one["uuid"] for one in server.get("/instances/web/agentoperations")]


@pytest.mark.parametrize(
    "said",
    [
        "null", "[]", '"x"', "{}", '{"exit": "0"}', '{"exit": -1}', '{"exit": 1e400}', '{"exit": NaN}', "x",
        "[" * 5000, '{"error": "no such guest", "hint": "x"}', '{"error": {"a": 1}}', b"", b"\7x", None,
    ],
)  # fmt: skip
def test_whatever_a_node_says_an_operation_ends_and_says_why(
    server: Running, plays: Callable[[Play], None], said: Any
) -> None:
    async def play(kind: str, options: dict[str, Any], end: Stream) -> None:
        if said is not None:
            await end.send(said)

    plays(play)
    result = ended(server, execute(server))
    assert result["return-code"] == -1 and result["error"] and result["stderr"] == result["error"]


def test_endless_output_is_cut_and_the_cut_is_said(server: Running, plays: Callable[[Play], None]) -> None:
    async def play(kind: str, options: dict[str, Any], end: Stream) -> None:
        for _ in range(200):
            await end.send(b"\1" + b"y" * 50_000)
        await end.send('{"exit": 0}')

    plays(play)
    result = ended(server, execute(server, "yes"))
    assert len(result["stdout"]) == 1 << 14 and "cut" in result["stderr"]


def test_a_file_of_the_guest_becomes_a_blob_of_its_namespace_and_a_blob_a_file(
    server: Running, plays: Callable[[Play], None]
) -> None:
    file, seen = os.urandom(200_001), []

    async def hand_out(kind: str, options: dict[str, Any], end: Stream) -> None:
        assert options["argv"] == ["cat", "--", "/etc/-it"]
        for at in range(0, len(file), 60_000):
            await end.send(b"\1" + file[at : at + 60_000])
        await end.send('{"exit": 0}')

    async def take_in(kind: str, options: dict[str, Any], end: Stream) -> None:
        given = b""
        while isinstance(piece := await end.receive(), bytes):
            assert len(piece) <= 1 << 16
            given += piece
        seen.append((options["input"], options["argv"][4:], given))
        await end.send('{"exit": 0}')

    plays(hand_out)
    blobs = []
    for _ in range(2):
        made = server.call("POST", "/instances/web/agent/get", {"path": "/etc/-it"})
        blobs.append(ended(server, made)["content_blob"])
    assert blobs[0] == blobs[1], "the same bytes are the same version"
    assert server.call("GET", f"/blobs/{blobs[0]}/data").body == file
    assert server.call("GET", f"/blobs/{blobs[0]}/data", namespace="rival").status == 404
    plays(take_in)
    body = {"blob_uuid": blobs[0], "path": "/tmp/a b", "mode": 0o100755}
    assert ended(server, server.call("POST", "/instances/web/agent/put", body))["return-code"] == 0
    assert seen == [(True, ["/tmp/a b", "755"], file)]
    assert server.call("POST", "/instances/web/agent/put", {**body, "blob_uuid": "none"}).status == 404
    assert not list(server.services.config.state_dir.glob("tmp*")), "nothing is left on the server"


def test_what_hands_out_nothing_too_much_or_fails_is_no_blob(
    server: Running, plays: Callable[[Play], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside, "_FILE_BYTES", 1 << 20)
    before = server.get("/artifacts")

    def say(*messages: Any) -> Play:
        async def play(kind: str, options: dict[str, Any], end: Stream) -> None:
            for message in messages:
                await end.send(message)

        return play

    endless = [b"\1" + bytes(1 << 16)] * 100
    cases: list[tuple[Any, ...]] = [
        ('{"exit": 0}',),
        (b"\1x", '{"exit": 1}'),
        (b"\1x",),
        (*endless, '{"exit": 0}'),
    ]
    for case in cases:
        plays(say(*case))
        result = ended(server, server.call("POST", "/instances/web/agent/get", {"path": "../../etc/x"}))
        assert result["error"] and "content_blob" not in result
        assert server.call("GET", "/instances/web/screenshot").status in (409, 503)
    assert server.get("/artifacts") == before
    assert not list(server.services.config.state_dir.glob("tmp*"))


def test_a_screenshot_is_a_blob_that_its_namespace_sees(
    server: Running, plays: Callable[[Play], None]
) -> None:
    async def play(kind: str, options: dict[str, Any], end: Stream) -> None:
        assert (kind, options) == ("screen", {})
        await end.send(b"\1\x89PNG")
        await end.send('{"exit": 0}')

    plays(play)
    uuid = server.get("/instances/web/screenshot")
    assert server.call("GET", f"/blobs/{uuid}/data").body == b"\x89PNG"
    assert server.call("GET", "/instances/system%2Fweb/screenshot", namespace="rival").status == 404


async def for_ever(kind: str, options: dict[str, Any], end: Stream) -> None:
    """Until whoever asked has left."""
    while await end.receive() is not None:
        pass


def test_one_that_does_not_end_is_given_up_when_it_is_deleted_and_bounded_in_number(
    server: Running, plays: Callable[[Play], None]
) -> None:
    plays(for_ever)
    within(10, lambda: not busy(), "nothing of other tests is left")
    made = [execute(server).body["uuid"] for _ in range(16)]
    refused = execute(server)
    assert refused.status == 406 and "too many" in refused.body["error"]
    assert len(server.get("/instances/web/agentoperations")) == 16
    for uuid in made:
        assert server.call("GET", f"/agentoperations/{uuid}", namespace="rival").status == 404
        assert server.call("DELETE", f"/agentoperations/{uuid}", namespace="rival").status == 404
        assert server.call("DELETE", f"/agentoperations/{uuid}").status == 200
        assert server.call("GET", f"/agentoperations/{uuid}").status == 404
    assert not busy()


def test_a_namespace_keeps_no_other_from_having_operations(
    server: Running, plays: Callable[[Play], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plays(for_ever)
    within(10, lambda: not busy(), "nothing of other tests is left")
    inside._operations.clear()
    monkeypatch.setattr(inside, "_MOST_OF_ONE", 1)
    made = server.instance("theirs", as_namespace="rival").body
    server.wait_for(f"/instances/{made['uuid']}", "created")
    asked = [execute(server)]
    assert execute(server).status == 406
    path, line = "/instances/theirs/agent/execute", {"command_line": "true"}
    asked.append(server.call("POST", path, line, namespace="rival"))
    for one, namespace in zip(asked, ("system", "rival"), strict=True):
        path = f"/agentoperations/{one.body['uuid']}"
        assert server.call("DELETE", path, namespace=namespace).status == 200


def test_without_an_agent_nothing_is_begun_and_side_channels_say_so(server: Running) -> None:
    bodies = {"none": {"side_channels": []}, "both": {"side_channels": ["sf-agent", "sf-agent2"]}}
    for name, more in bodies.items():
        made = server.instance(name, **more).body
        server.wait_for(f"/instances/{made['uuid']}", "created")
    assert server.get("/instances/none")["side_channels"] == []
    assert "sf-agent2" in server.get("/instances/both")["side_channels"]
    assert "sf-agent2" in server.get("/instances/web")["side_channels"]
    server.agent.agent_state = ""
    server.call("POST", "/instances/both/pause")
    server.call("POST", "/instances/both/unpause")
    within(10, lambda: server.get("/instances/both")["agent_state"] == "", "its agent is gone")
    refused = server.call("POST", "/instances/both/agent/execute", {"command_line": "true"})
    assert refused.status == 406 and "agent" in refused.body["error"]
    server.agent.agent_state = "ready"
    for wrong in ({}, {"command_line": ""}, {"command_line": "x" * 70_000}, {"command_line": "a", "x": 1}):
        assert server.call("POST", "/instances/web/agent/execute", wrong).status == 400, json.dumps(wrong)[
            :80
        ]
    assert (
        server.call(
            "POST", "/instances/system%2Fweb/agent/execute", {"command_line": "a"}, namespace="rival"
        ).status
        == 404
    )
