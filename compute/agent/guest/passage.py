"""Live moves of a guest: here from another node, and from here to one. Its disks and memory pass while it runs.

The server carries the bytes, and its record (`Controller.pass_on`) alone says whose the guest is: until that says it
stays (`InstanceSpec.leaving` is another) or goes (it is to be deleted), a source whose memory was sent stands still.
What comes is not run while it is `coming`. Both are in the guest's record before qemu knows of them, so whoever adopts
the guest asks the same.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from compute.agent.guest import overlay
from compute.agent.guest.console import ConsoleLog
from compute.agent.guest.disks import Disks, Leaving
from compute.agent.guest.host import Host, Voice
from compute.agent.guest.record import Course, Part, Phase
from compute.agent.guest.taps import Networks, Taps
from compute.agent.hypervisor import domain, passing
from compute.agent.hypervisor.libvirt import Refused
from compute.errors import ComputeError, Conflict, NotFound, Unavailable
from compute.wire.spec import InstanceSpec, Power
from compute.wire.streams import Stream, carry_socket, failure, first
from imagestore import StoreError
from net import NetError

_TOLD_S, _ARRIVED_S, _STILL_S, _LOOK_S, _LAST_S = 10.0, 60.0, 60.0, 0.1, 0.01
_MEMORY, _ANNOUNCED = "memory", {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class Passage:
    """Works for the guest's task, which has the `turn` while it acts."""

    def __init__(
        self, host: Host, course: Part[Course], taps: Taps, disks: Disks, console: ConsoleLog, voice: Voice,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._host, self._course, self._taps, self._disks = host, course, taps, disks
        self._console, self._voice, self._wake = console, voice, wake
        self._spec, self.turn, self._sends, self._receives = course.now.spec, asyncio.Lock(), False, False
        self._here, self._sent = asyncio.Queue[str](), dict[str, Any]()  # what this side says, and the other
        self._connected = dict[str, asyncio.Queue[Any]]()  # by channel: a disk's device, or _MEMORY
        # A socket's path has at most 107 bytes.
        self._directory = host.directory.parent / "run" / f"move-{self._spec.uuid[:13]}"

    async def rules(self, spec: InstanceSpec, networks: Networks, leaving: asyncio.Event) -> bool:
        """Whether a live move leaves its owner nothing to do now."""
        self._spec, now, stays = spec, self._course.now, spec.leaving != self._course.now.leaving
        if spec.coming and not now.coming:
            await self._receive(networks, leaving)
        elif now.coming and not spec.coming:
            await self._take_over(networks)
        if now.leaving and not self._sends and (await self._do(passing.withdraw, stays) or stays):
            await self._course.save(leaving="")
        return bool(spec.coming or self._course.now.leaving)

    def clear(self) -> None:
        """Take away the sockets."""
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _do(self, call: Callable[..., Any], *more: Any, **named: Any) -> Any:
        """Raises Unavailable where qemu waits for the other node, and its guest with it."""
        doing = self._host.do(call, self._host.hypervisor, self._spec.uuid, *more, **named)
        try:
            return await asyncio.wait_for(doing, _STILL_S)
        except TimeoutError as err:
            raise Unavailable(f"qemu has not answered for {_STILL_S:.0f} s") from err

    def _files(self) -> dict[str, Path]:
        return {disk.device: self._disks.overlay(disk.device) for disk in self._spec.disks if not disk.cdrom}

    def _open(self) -> None:
        """A directory where qemu, too, may make sockets."""
        self.clear()
        self._directory.mkdir(mode=0o711, parents=True)
        owner = next(iter(self._files().values())).stat()
        os.chown(self._directory, owner.st_uid, owner.st_gid)

    def _finds(self) -> dict[str, str]:
        """What the guest finds on this node, by names for people."""
        call = partial(self._host.hypervisor.qmp, self._spec.uuid)
        drive = self._disks.overlay("").with_name("config.iso")
        disks = ((d, overlay.virtual_size(f), overlay.backing(f)) for d, f in self._files().items())
        found = {device: f"{size} on {Path(image).name}" for device, size, image in disks}
        found["config drive"] = str(drive.stat().st_size) if drive.exists() else ""
        found["qemu"] = str(call("query-version"))
        most = call("query-cpu-model-expansion", type="full", model={"name": "max"})
        return found | {"processor": str(most), **domain.shape(self._host.hypervisor.xml(self._spec.uuid))}

    async def _gone(self, stream: Stream) -> Any:
        while await stream.receive() is not None:
            pass
        raise Unavailable("the server gave the move up")

    # Here

    async def _receive(self, networks: Networks, leaving: asyncio.Event) -> None:
        """Its disks, taps and domain, for memory to come. What goes wrong the source is told; the server decides."""
        spec, host, course, self._receives = self._spec, self._host, self._course, True
        await course.save(coming=spec.coming, created=True)  # elsewhere: what fails here is tried again
        try:
            images = await self._disks.images(spec, leaving)
            while any(one.socket for one in images.values()):
                await asyncio.sleep(1)
                images = await self._disks.images(spec, leaving)
            await self._disks.make(spec, images)
            nics = [await self._taps.make(spec, interface, networks) for interface in spec.interfaces]
            disks, password = await self._disks.begin(spec, images), course.now.vdi_password
            made = spec, dict(networks), disks, tuple(nics), password
            await host.do(partial(host.define, *made, incoming=True))
            await host.do(self._console.begin)
            await host.do(host.hypervisor.start_paused, spec.uuid)
            await host.do(self._open)
            await self._do(passing.expect, self._directory / "m", self._files(), self._directory / "d")
            self._here.put_nowait(json.dumps({"like": await host.do(self._finds)}))
        except (Leaving, ComputeError, StoreError, NetError, OSError) as err:
            self._here.put_nowait(failure(err if isinstance(err, Unavailable) else Conflict(repr(err))))

    async def arrive(self, _: object, options: dict[str, Any], stream: Stream) -> None:
        """`{"channel"}`: what that brings. Else: say what it finds here and, once all was sent, that it is here."""
        if channel := options.get("channel"):
            if await stream.receive():  # the other qemu has connected
                path = self._directory / ("m" if channel == _MEMORY else "d")
                await carry_socket(*await asyncio.open_unix_connection(str(path)), stream)
            return
        if self._course.now.coming and not self._receives:
            raise Unavailable("its agent was started anew meanwhile")
        await stream.send(await first(self._here.get(), self._gone(stream)))
        if sent := await stream.receive():
            self._sent = json.loads(sent)
            async with asyncio.timeout(_ARRIVED_S):
                while not await self._do(passing.arrived):
                    await asyncio.sleep(_LAST_S)
            await stream.send("{}")
            await self._gone(stream)

    async def _take_over(self, networks: Networks) -> None:
        """It is ours, and not the other node's any more; that it has ended meanwhile is seen next."""
        self._host.check_lease(self._spec)
        with suppress(Refused, NotFound, Conflict):
            await self._host.do(self._host.hypervisor.qmp, self._spec.uuid, "query-status")
            await self._taps.adopt(networks)  # they may have gone with it
            if self._spec.power is Power.ON:
                await self._host.do(self._host.hypervisor.resume, self._spec.uuid)
            await self._host.do(self._host.hypervisor.qmp, self._spec.uuid, "announce-self", **_ANNOUNCED)
        await self._course.save(spec=self._spec, phase=Phase.UP, created=True, coming="")
        await self._host.do(self.clear)
        self._voice.event("goes on here", **self._sent)

    # From here

    async def leave(self, _: object, options: dict[str, Any], stream: Stream) -> None:
        """`{"channel"}`: that. Else `{"move", "like"}`: send it where it finds `like`; Conflict: move it cold."""
        if channel := options.get("channel"):
            reader, writer = await first(self._connected[channel].get(), self._gone(stream))
            await stream.send("{}")
            await carry_socket(reader, writer, stream)
            return
        async with asyncio.timeout(_TOLD_S):  # what is desired later, and another, says that it stays
            while self._spec.leaving != options["move"]:
                await asyncio.sleep(_LOOK_S)
        async with self.turn:
            await self._check(options["like"])
            await self._course.save(leaving=options["move"])
            self._sends = True
        try:
            with ExitStack() as stack:
                await self._host.do(self._open)
                for channel in (channels := [*self._files(), _MEMORY]):
                    stack.callback((await self._listen(channel)).close)
                await stream.send(json.dumps({"channels": channels}))
                if await stream.receive():
                    sent = await first(self._send(), self._gone(stream))
                    await stream.send(json.dumps({"memory_bytes": sent}))
                    await self._gone(stream)
        finally:
            self._sends = False
            self._wake()

    async def _check(self, like: dict[str, str]) -> None:
        spec, now, mine = self._spec, self._course.now, await self._host.do(self._finds)
        state = await self._host.do(self._host.hypervisor.state, spec.uuid)
        if now.phase is not Phase.UP or (state.power, state.reason) != (spec.power, ""):
            raise Conflict(f"it is {now.phase}, {state.power} {state.reason}")
        if unlike := [name for name in mine if like.get(name) != mine[name]]:
            raise Conflict(f"unlike on the other node: {', '.join(unlike)}")

    async def _listen(self, channel: str) -> asyncio.Server:
        path, connections = self._directory / channel, asyncio.Queue[Any]()
        self._connected[channel] = connections
        server = await asyncio.start_unix_server(lambda *one: connections.put_nowait(one), str(path))
        os.chown(path, self._directory.stat().st_uid, -1)
        return server

    async def _send(self) -> int:
        """Returns how many bytes of memory went, once all has and it stands still."""
        files, out = self._files(), self._directory.joinpath
        await self._do(passing.mirror, {device: (path, out(device)) for device, path in files.items()})
        while not await self._do(passing.settled, len(files)):
            await asyncio.sleep(_LOOK_S)
        still = self._host.verdict.accel == "tcg"  # whose dirty bits are lost now and then (kvm-unit-tests)
        try:
            async with asyncio.timeout(_STILL_S if still else None) as limit:
                await self._do(passing.send, f"unix:{out(_MEMORY)}", still=still)
                while (await self._do(passing.sending))[0] != "pre-switchover":
                    await asyncio.sleep(_LAST_S)
                limit.reschedule(asyncio.get_running_loop().time() + _STILL_S)
                await self._do(passing.go_on, len(files))
                while (said := await self._do(passing.sending))[0] != "completed":
                    await asyncio.sleep(_LAST_S)
        except TimeoutError as err:
            raise Unavailable(f"it stood still for {_STILL_S:.0f} s already", hint="--cold") from err
        return int(said[1])
