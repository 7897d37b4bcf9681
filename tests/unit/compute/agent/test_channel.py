"""What a hostile guest's agent may answer, and what becomes of it."""

import asyncio
import base64
import json
import os
import select
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from compute.agent.guest.channel import _READ, Channel
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.errors import Unavailable

Answers = Callable[[str, dict[str, Any]], Any]


class Guest:
    """Stands where libvirt stands: its agent says whatever `answers` makes of a command."""

    def __init__(self, answers: Answers) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers = answers

    def agent(self, uuid: str, command: str, arguments: dict[str, Any], timeout_s: int) -> bytes:
        self.asked.append((command, arguments))
        found = self._answers(command, arguments)
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, bytes) else json.dumps({"return": found}).encode()


def _channel(answers: Answers) -> tuple[Guest, Channel]:
    guest = Guest(answers)
    return guest, Channel(cast(Hypervisor, guest), "uuid")


async def _drop(one: bytes, other: bytes) -> None: ...


NONSENSE = [
    b"", b"\xff\xfe", b"[]", b"7", b"null", b'{"return": NaN}', b'{"ret": 1}', b"[" * 100_000, b'"x"',
    b'{"return": {"pid": "1"}}', b'{"return": {"pid": -1}}', b'{"return": {"pid": 1e400}}',
    b'{"return": {"pid": 99999999999999999999999}}', b'{"return": []}', b'{"return": "\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("answer", NONSENSE)
def test_nonsense_is_said_to_be_nonsense(answer: bytes) -> None:
    _, channel = _channel(lambda command, arguments: answer)
    with pytest.raises(Unavailable, match="nonsense"):
        asyncio.run(channel.execute(["true"], _drop))


@pytest.mark.parametrize(
    "status",
    [
        {}, [], None, "x", {"exited": True, "exitcode": "0"}, {"exited": True, "exitcode": 2**70},
        {"exited": True, "exitcode": 0, "out-data": "no base64!"}, {"exited": True, "signal": 10**9},
        {"exited": True, "exitcode": 0, "out-data": {"a": 1}}, {"exited": True, "exitcode": 0, "err-data": 7},
    ],
)  # fmt: skip
def test_a_status_that_is_none_ends_the_command_with_an_error(status: Any) -> None:
    _, channel = _channel(lambda command, arguments: {"pid": 1} if command == "guest-exec" else status)
    with pytest.raises(Unavailable, match="nonsense"):
        asyncio.run(channel.execute(["true"], _drop))


def test_a_command_that_never_ends_is_asked_to_when_nobody_waits() -> None:
    guest, channel = _channel(
        lambda command, arguments: {"pid": 1} if command == "guest-exec" else {"exited": False}
    )

    async def wait_a_little() -> None:
        task = asyncio.create_task(channel.execute(["sleep", "inf"], _drop))
        while len(guest.asked) < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(wait_a_little())
    command, arguments = guest.asked[-1]
    assert command == "guest-exec" and "kill" in arguments["arg"][1]


def test_an_endless_output_is_handed_on_piece_by_piece_and_waits_for_who_takes_it() -> None:
    """A guest whose file never ends: memory holds a piece, and the reader decides when it is enough."""
    piece = base64.b64encode(bytes(1 << 20)).decode()
    pids = iter(range(1, 10_000))

    def answers(command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-exec":
            return {"pid": next(pids)}
        if arguments["pid"] == 1:
            return {"exited": False}
        return {"exited": True, "exitcode": 0, "out-data": piece}

    taken = 0

    async def take(one: bytes, other: bytes) -> None:
        nonlocal taken
        taken += len(one)
        if taken > 20 << 20:
            raise Unavailable("enough")

    _, channel = _channel(answers)
    with pytest.raises(Unavailable, match="enough"):
        asyncio.run(channel.execute(["yes"], take))


def test_more_than_was_asked_for_and_words_of_any_length_are_bounded() -> None:
    huge = b'{"return": "' + b"x" * (17 << 20) + b'"}'
    _, channel = _channel(lambda command, arguments: huge)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(channel.execute(["true"], _drop))
    assert len(str(caught.value)) < 200


def test_a_command_that_ends_at_once_costs_two_questions() -> None:
    done = {"exited": True, "exitcode": 0, "out-data": base64.b64encode(b"x3 hello").decode()}
    guest, channel = _channel(lambda command, _: {"pid": 1} if command == "guest-exec" else done)
    said = []

    async def keep(one: bytes, other: bytes) -> None:
        said.append((one, other))

    assert asyncio.run(channel.execute(["true"], keep)) == 3
    assert said == [(b"hello", b"")] and len(guest.asked) == 2


class Shell:
    """Does what qemu-guest-agent does, with this machine's /bin/sh: the scripts are tried as they are."""

    def __init__(self) -> None:
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def __call__(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-file-open":
            return os.open(arguments["path"], os.O_WRONLY | os.O_CREAT)
        if command == "guest-file-write":
            return {"count": os.write(arguments["handle"], base64.b64decode(arguments["buf-b64"]))}
        if command == "guest-file-close":
            return os.close(arguments["handle"]) or {}
        if command == "guest-exec":
            argv = [arguments["path"], *arguments["arg"]]
            pipe = subprocess.PIPE
            started = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
            self.running[started.pid] = started
            return {"pid": started.pid}
        process = self.running[arguments["pid"]]
        if process.poll() is None and not _piped(process):
            return {"exited": False}
        out, errors = process.communicate()
        said = {"exited": True, "exitcode": process.returncode}
        return said | {
            "out-data": base64.b64encode(out).decode(),
            "err-data": base64.b64encode(errors).decode(),
        }


def _piped(process: "subprocess.Popen[bytes]") -> bool:
    """It writes more than a pipe holds, so that it ends only when somebody reads."""
    ready, _, _ = select.select([process.stdout], [], [], 0)
    return bool(ready)


def _said(*argv: str, stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
    seen = [b"", b""]

    async def given() -> AsyncIterator[bytes]:
        for at in range(0, len(stdin or b""), 1 << 16):
            yield (stdin or b"")[at : at + (1 << 16)]

    async def keep(one: bytes, other: bytes) -> None:
        seen[:] = seen[0] + one, seen[1] + other

    _, channel = _channel(Shell())
    code = asyncio.run(channel.execute(argv, keep, None if stdin is None else given()))
    return code, seen[0], seen[1]


def test_a_commands_output_errors_input_and_code_are_its_own() -> None:
    assert _said("sh", "-c", "echo a; echo b >&2; exit 7") == (7, b"a\n", b"b\n")
    assert _said("cat", stdin=b"\0input\xff") == (0, b"\0input\xff", b"")
    assert _said("wc", "-c", stdin=bytes(3_000_000)) == (0, b"3000000\n", b"")
    assert _said("cat", stdin=b"") == _said("cat") == (0, b"", b"")
    assert _said("true") == (0, b"", b"") and _said("sh", "-c", "kill -9 $$")[0] == 137
    assert _said("no-such-command")[0] == 127


def test_what_a_command_says_while_it_runs_and_more_than_an_answer_holds_arrives_whole() -> None:
    script = "for i in 1 2 3; do echo $i; sleep 0.3; done; head -c 3000000 /dev/zero; echo end >&2; exit 3"
    assert _said("sh", "-c", script) == (3, b"1\n2\n3\n" + bytes(3_000_000), b"end\n")
    assert _said("head", "-c", "5000000", "/dev/zero") == (0, bytes(5_000_000), b"")
    assert not list(Path("/tmp").glob(".sf-*"))


def test_a_guest_that_takes_less_than_it_is_given_runs_nothing_and_keeps_nothing() -> None:
    shell = Shell()

    def answers(command: str, arguments: dict[str, Any]) -> Any:
        return {"count": 1} if command == "guest-file-write" else shell(command, arguments)

    async def given() -> AsyncIterator[bytes]:
        yield b"four"

    async def drill() -> None:
        guest, channel = _channel(answers)
        with pytest.raises(Unavailable, match="does not take"):
            await channel.execute(["touch", "/tmp/.sf-ran"], _drop, given())
        assert not any("touch" in arguments.get("arg", ()) for _, arguments in guest.asked)

    asyncio.run(drill())
    for process in shell.running.values():
        process.wait(10)
    assert not list(Path("/tmp").glob(".sf-*"))


def test_output_that_is_not_there_yet_is_nothing_and_no_error_of_ours(tmp_path: Path) -> None:
    """A slow guest has not begun to write: this was an endless loop."""
    argv = ["/bin/sh", "-c", _READ, "sh", str(tmp_path / "x"), "1", "1", "1"]
    done = subprocess.run(argv, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (3, b"", b"", [])
    (tmp_path / "x.o").touch(), (tmp_path / "x.e").touch()
    done = subprocess.run(argv, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"") and (tmp_path / "x.l").exists()
    assert subprocess.run(argv, capture_output=True).returncode == 3, "the output is somebody else's"


@pytest.mark.parametrize("end", [b"x ", b"x1e9 y", b"x-1 ", b"hello", b"x" + b"9" * 100 + b" "])
def test_an_end_that_says_no_code_is_nonsense(end: bytes) -> None:
    done = {"exited": True, "exitcode": 0, "out-data": base64.b64encode(end).decode()}
    _, channel = _channel(lambda command, _: {"pid": 1} if command == "guest-exec" else done)
    with pytest.raises(Unavailable, match="nonsense"):
        asyncio.run(channel.execute(["true"], _drop))
