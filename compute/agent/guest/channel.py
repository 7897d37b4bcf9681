"""The agent in a guest, qemu-guest-agent: https://www.qemu.org/docs/master/interop/qemu-ga-ref.html

Its answers are a guest's: bounded, checked, never more than words of its own; silence is a time-out. It hands out
output when a command has ended, and libvirt ends a channel at 10 MiB, so output goes into files of the guest, which are
read in pieces meanwhile. Large `input-data` makes it silent for good, so input goes into a file as well.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from typing import Any

from compute.agent.hypervisor.libvirt import Hypervisor
from compute.errors import ComputeError, Unavailable
from imagestore import decimal, read_json, whole

POOL = ThreadPoolExecutor(16, "guest-agents")
"""Apart from the agent's own threads: a silent guest holds one for _ANSWER_S."""
_ANSWER_S, _ANSWER_BYTES = 20, 16 << 20
_LIVE_S = 0.3  # a command that ends before hands out its output at once

# Whoever makes the file .l has the output: this script at its end, or a reader meanwhile. Forks are what costs.
_RUN = """d=$1; shift; (umask 77; set -C; : >"$d.o" >"$d.e") || exit 126
command -v setsid >/dev/null && set -- setsid "$@"
[ -e "$d.i" ] && exec 3<"$d.i" || exec 3</dev/null; exec 4>"$d.o" 5>"$d.e"
"$@" <&3 >&4 2>&5 3<&- 4>&- 5>&- & echo $! >"$d.p"; exec 3<&-; wait $!; r=$?; set -C
{ read x o </proc/$$/fdinfo/4 && read x e </proc/$$/fdinfo/5 && [ $((o+e)) -le 262144 ] && true >"$d.l"; } 2>&- && {
printf "x$r "; [ $o = 0 ] || cat "$d.o"; [ $e = 0 ] || cat "$d.e" >&2; exec rm -f "$d.o" "$d.e" "$d.p" "$d.i" "$d.l"; }
exit $r"""
_READ = """[ -e "$1.e" ] || exit 3; [ -z "$4" ] || (set -C; : >"$1.l") 2>&- || exit 3
tail -c +$2 "$1.o" | head -c 262144; tail -c +$3 "$1.e" | head -c 262144 >&2"""
_KILL = (
    'p=$(cat "$1.p"); kill -TERM -$p 2>&- || kill $p 2>&-; '  # with all that it began, where it leads a group
)
_END = 'rm -f "$1.o" "$1.e" "$1.p" "$1.i" "$1.l"'
Output = Callable[[bytes, bytes], Awaitable[None]]  # takes pieces of what a command wrote: output, errors
Given = AsyncIterator[bytes] | None
Ended = tuple[int, bytes, bytes]  # exit code, output, errors


class Channel:
    """One guest's agent, one question at a time."""

    def __init__(self, hypervisor: Hypervisor, uuid: str) -> None:
        self._hypervisor, self._uuid, self._turn = hypervisor, uuid, asyncio.Lock()

    async def execute(self, argv: Sequence[str], out: Output, stdin: Given = None) -> int:
        """Run a command until it ends, hand out what it writes meanwhile, return its exit code.

        Cancelled, the command is asked to end. Raises Unavailable, Conflict when the guest is off.
        """
        place, seen, live = f"/tmp/.sf-{secrets.token_hex(8)}", (1, 1), False  # noqa: S108 - the guest's; random

        async def read() -> bool:
            """Whether there was something, or this was the first look."""
            nonlocal seen
            code, one, other = await self.run(_READ, place, *map(str, seen), "" if live else "1")
            seen = seen[0] + len(one), seen[1] + len(other)
            await out(one, other) if code != 3 else None
            return code != 3 and bool(one or other or not live)

        async def look(*, ended: bool = False) -> None:
            nonlocal live
            while (ended or time.monotonic() - began > _LIVE_S) and await read():
                live = True

        try:
            if stdin is not None:
                await self.run('umask 077; : >"$1.i"', place)
                await self.write(await self.open(f"{place}.i", "w"), stdin)
            began = time.monotonic()
            code, output, errors = await self._ended(await self._start(_RUN, place, *argv), look)
            said, _, output = output.partition(b" ")
            await out(output, errors)
            if live or not said:
                await look(ended=True)
            elif (known := decimal(said[1:].decode("latin-1"))) is None:
                raise Unavailable("the agent in the guest says nonsense of how a command ended")
            else:
                code = known
        except BaseException:
            with suppress(ComputeError):
                await asyncio.shield(self._start(_KILL + _END, place))
            raise
        if live:
            await self.run(_END, place)
        return code

    async def run(self, script: str, *words: str, stdin: bytes = b"") -> Ended:
        """A short script of sh with a little to read, whose output is small. Raises Unavailable, Conflict when off."""
        return await self._ended(await self._start(script, *words, stdin=stdin))

    async def _ended(self, pid: int, meanwhile: Callable[[], Awaitable[None]] | None = None) -> Ended:
        began = time.monotonic()
        while (done := await self._status(pid)) is None:
            if meanwhile:
                await meanwhile()
            await asyncio.sleep(min(0.5, max(0.004, (time.monotonic() - began) / 5)))
        return done

    async def open(self, path: str, mode: str) -> int:
        """A file's handle."""
        return whole(await self._ask("guest-file-open", {"path": path, "mode": mode}, whole))

    async def write(self, handle: int, pieces: AsyncIterator[bytes]) -> None:
        """All of an open file; that closes it."""
        async for piece in pieces:
            given = {"handle": handle, "buf-b64": base64.b64encode(piece).decode()}
            if await self._ask("guest-file-write", given, itemgetter("count")) != len(piece):
                raise Unavailable("the guest does not take what it is given", hint="is its disk full?")
        await self._ask("guest-file-close", {"handle": handle}, bool)

    async def read(self, handle: int) -> bytes:
        """What is written to an open file, as soon as there is something."""
        file, found = {"handle": handle}, b""
        while not found:
            await asyncio.sleep(0.02)  # a look takes a guest 1 to 2 ms under emulation
            found = await self._ask("guest-file-read", file, lambda said: base64.b64decode(said["buf-b64"]))
        return found

    async def _start(self, script: str, *words: str, stdin: bytes = b"") -> int:
        given = {"path": "/bin/sh", "arg": ["-c", script, "sh", *words], "capture-output": True}
        given |= {"input-data": base64.b64encode(stdin).decode()} if stdin else {}
        pid: int = await self._ask("guest-exec", given, lambda said: whole(said["pid"]))
        return pid

    async def _status(self, pid: int) -> Ended | None:
        def read(said: Any) -> Ended | None:
            if said["exited"] is not True:
                return None
            code = whole(said.get("exitcode", 128 + whole(said.get("signal", 0), 0, 127)), 0, 2**32)
            texts = (said.get(name, "") for name in ("out-data", "err-data"))
            data, errors = (base64.b64decode(text, validate=True) for text in texts)
            return code, data, errors

        done: Ended | None = await self._ask("guest-exec-status", {"pid": pid}, read)
        return done

    async def _ask(self, command: str, arguments: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """One command's answer, as `read` makes a value of it."""
        loop, ask = asyncio.get_running_loop(), self._hypervisor.agent
        async with self._turn:
            said = await loop.run_in_executor(POOL, ask, self._uuid, command, arguments, _ANSWER_S)
        try:
            return read(read_json(said, most_bytes=_ANSWER_BYTES)["return"])
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise Unavailable(f"the agent in the guest answers {command} with nonsense") from err
