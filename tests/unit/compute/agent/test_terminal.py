"""A console for several: the pseudo-terminal is real, qemu's side of it is played."""

import asyncio
import json
import os
import pty
import tty
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from compute.agent.guest.console import ConsoleLog
from compute.agent.guest.guest import Guest
from compute.agent.guest.terminal import Terminal
from compute.errors import ComputeError, Conflict, Unavailable
from compute.wire.streams import Stream, failure, pair


def _guest(tmp_path: Path, name: str) -> Guest:
    async def do(call: Any, *arguments: Any) -> Any:
        return call(*arguments)

    xml = f"<domain><devices><serial type='pty'><source path='{name}'/></serial></devices></domain>"
    host = SimpleNamespace(do=do, hypervisor=SimpleNamespace(xml=lambda uuid: xml))
    log = tmp_path / "console.log"
    log.write_bytes(b"login: ")
    guest = SimpleNamespace(host=host, spec=SimpleNamespace(uuid="u"), console=ConsoleLog(log))
    return cast(Guest, guest)


async def _sees(stream: Stream, what: bytes) -> None:
    seen = b""
    async with asyncio.timeout(20):
        while what not in seen:
            message = await stream.receive()
            assert isinstance(message, bytes), message
            seen += message


async def _serve(terminal: Terminal, guest: Guest, far: Stream) -> None:
    """As `agent.operations` does."""
    try:
        await terminal.serve(guest, far)
    except ComputeError as err:
        await far.send(failure(err))
    finally:
        await far.aclose()


@pytest.fixture
def master_and_name() -> Any:
    master, slave = pty.openpty()
    tty.setraw(slave)
    name = os.ttyname(slave)
    os.close(slave)
    yield master, name
    os.close(master)


def test_all_who_watch_see_what_comes_and_what_any_types_arrives(
    tmp_path: Path, master_and_name: Any
) -> None:
    master, name = master_and_name

    async def drill() -> None:
        terminal, guest = Terminal(), _guest(tmp_path, name)
        ends = [pair() for _ in range(2)]
        tasks = [asyncio.create_task(_serve(terminal, guest, far)) for _, far in ends]
        (one, _), (other, _) = ends
        for near in (one, other):
            await _sees(near, b"login: ")
        await asyncio.sleep(0.1)
        os.write(master, b"hello\x1b[1m")
        for near in (one, other):
            await _sees(near, b"hello\x1b[1m")
        await one.send(b"root\r")
        assert await asyncio.to_thread(os.read, master, 100) == b"root\r"
        await one.aclose()
        await tasks[0]
        await other.send(b"pw\r")
        assert await asyncio.to_thread(os.read, master, 100) == b"pw\r"
        await other.aclose()
        await tasks[1]
        assert terminal._file < 0 and not terminal._watchers

    asyncio.run(drill())


def test_who_takes_nothing_is_let_go_and_holds_up_nobody(tmp_path: Path, master_and_name: Any) -> None:
    master, name = master_and_name

    async def drill() -> None:
        terminal, guest = Terminal(), _guest(tmp_path, name)
        slow, far = pair()
        quick, other = pair()
        tasks = [asyncio.create_task(_serve(terminal, guest, end)) for end in (far, other)]
        await _sees(quick, b"login: ")
        for number in range(600):
            await asyncio.to_thread(os.write, master, b"flood %d\n" % number)
            await _sees(quick, b"flood %d\n" % number)
        said = b""
        while isinstance(message := await slow.receive(), bytes):
            said += message
        assert json.loads(str(message))["kind"] == Unavailable.__name__
        await quick.aclose()
        await asyncio.gather(*tasks)

    asyncio.run(drill())


def test_a_guest_that_is_switched_off_ends_its_console_and_one_that_is_off_has_none(tmp_path: Path) -> None:
    async def drill() -> None:
        master, slave = pty.openpty()
        terminal, guest = Terminal(), _guest(tmp_path, os.ttyname(slave))
        os.close(slave)
        near, far = pair()
        task = asyncio.create_task(_serve(terminal, guest, far))
        await _sees(near, b"login: ")
        await asyncio.sleep(0.1)
        os.close(master)
        assert json.loads(str(await near.receive()))["kind"] == Conflict.__name__
        await task
        for nothing in ("", "/etc/passwd", "/dev/pts/../../etc/passwd"):
            with pytest.raises(Conflict):
                await Terminal().serve(_guest(tmp_path, nothing), pair()[1])

    asyncio.run(drill())
