"""What the server asks of this node directly, done; and the node's end of each kind of stream."""

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from compute.agent.guest.channel import Channel
from compute.agent.guest.guest import Guest
from compute.agent.guest.terminal import Terminal
from compute.agent.hypervisor import figures
from compute.agent.hypervisor.domain import screen
from compute.agent.image_service import ServedImages
from compute.errors import ComputeError, Conflict, Invalid, NotFound, Unavailable
from compute.wire.codec import from_plain
from compute.wire.operations import Figures, NodeOperations
from compute.wire.spec import CachedImage
from compute.wire.streams import PIECE_BYTES, Stream, carry_socket, failure, first
from net import NetError, Network, NodeNetworks, Plane, listening, tcp_socket, traffic

_PINGS = 8  # at once: each is a process, and tenants ask for them


class Operations(NodeOperations):
    """Answers from the agent's guests and from the data plane; `networks` is what was applied last."""

    def __init__(
        self,
        node: str,
        plane: Plane,
        plane_lock: asyncio.Lock,
        guests: Mapping[str, Guest],
        images: ServedImages,
        dial: Callable[[str, str], Awaitable[Stream]],  # brings the stream of a ticket to the server
        directory: Path,
    ) -> None:
        self._node, self._plane, self._plane_lock, self._guests = node, plane, plane_lock, guests
        self._images, self._directory = images, directory
        self.networks: NodeNetworks | None = None
        self._pings = asyncio.Semaphore(_PINGS)
        self._dial, self._open = partial(dial, node), set[asyncio.Task[None]]()
        self._channels: WeakKeyDictionary[Guest, Channel] = WeakKeyDictionary()
        self._terminals: WeakKeyDictionary[Guest, Terminal] = WeakKeyDictionary()

    def _guest(self, uuid: str) -> Guest:
        found = self._guests.get(uuid)
        if found is None:
            raise NotFound(f"no instance {uuid} on node {self._node}")
        return found

    async def console(self, instance_uuid: str, length: int) -> bytes:
        return await asyncio.to_thread(self._guest(instance_uuid).console.tail, length)

    async def clear_console(self, instance_uuid: str) -> None:
        await asyncio.to_thread(self._guest(instance_uuid).console.clear)

    async def doctor(self) -> list[tuple[str, str, str]]:
        if self.networks is None:
            return []
        async with self._plane_lock:
            found = await asyncio.to_thread(self._plane.doctor, self.networks)
        return [(one.network, one.text, one.fix) for one in found]

    async def cached(self, wanted: str) -> list[CachedImage]:
        if wanted:
            await self._images.ask("prefetch", image=wanted)
        return from_plain(list[CachedImage], (await self._images.ask("ls"))["images"])

    async def listening(self) -> list[tuple[str, int]]:
        return sorted(await asyncio.to_thread(listening))

    async def usage(self) -> dict[str, Figures]:
        return await asyncio.to_thread(self._usage, list(self._guests.values()))

    def _usage(self, guests: Sequence[Guest]) -> dict[str, Figures]:
        taps, host = dict[str, tuple[int, int]](), guests[0].host if guests else None
        found = figures.of_guests(host.hypervisor, host.installation) if host else {}
        for network in self.networks.networks if self.networks and found else ():
            with suppress(NetError, OSError):  # it goes away at this moment
                taps |= traffic(self._plane.namespace(network))
        for guest in guests:
            links = [taps.get(link.tap, (0, 0)) for link in guest.spec.interfaces]
            came, went = sum(went for _, went in links), sum(came for came, _ in links)  # seen from the guest
            found.get(guest.spec.uuid, {}).update(in_bytes=came, out_bytes=went)
        return found | {"": figures.of_node(self._directory)}

    def _network(self, uuid: str) -> Network:
        networks = self.networks.networks if self.networks else ()
        network = next((n for n in networks if n.uuid == uuid), None)
        if network is None:
            raise NotFound(f"network {uuid} is not on node {self._node}")
        return network

    async def ping(self, network_uuid: str, address: str) -> tuple[list[str], list[str]]:
        argv = ["ip", "netns", "exec", self._plane.namespace(self._network(network_uuid))]
        argv += ["ping", "-c", "3", "-i", "0.3", "-w", "5", str(ip_address(address))]
        async with self._pings:
            done = await asyncio.create_subprocess_exec(
                *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, err = await done.communicate()
        return out.decode().splitlines(), err.decode().splitlines()

    # Streams

    async def stream(self, kind: str, target: str, options: dict[str, Any], ticket: str) -> None:
        if kind == "connect":
            space, also = self._plane.namespace(self._network(target)), str(options.get("also") or "")
            to = str(options.get("address")), also, int(options["port"])
            await self._begin(ticket, partial(connect, space, *to))
            return
        async with asyncio.timeout(10):  # who moves here is asked for before this node was told of it
            while kind == "arrive" and target not in self._guests:
                await asyncio.sleep(0.05)
        guest = self._guest(target)
        known: dict[str, Any] = {"console": self._console, "exec": self._exec, "vnc": self._vnc}
        known |= {"screen": self._screen, "arrive": guest.passage.arrive, "leave": guest.passage.leave}
        if kind not in known:
            raise Invalid(f"this node's agent knows no stream {kind[:80]}")
        if kind not in ("arrive", "leave") and not guest.record.created:
            raise Conflict(f"{guest.spec.name} is not up yet", hint="try again when it is created")
        await self._begin(ticket, partial(known[kind], guest, options))

    async def _begin(self, ticket: str, serve: Callable[[Stream], Awaitable[None]]) -> None:
        stream = await self._dial(ticket)

        async def run() -> None:
            try:
                await serve(stream)
            except (ComputeError, NetError, OSError) as err:
                with suppress(ComputeError):
                    await stream.send(failure(err))
            finally:
                await stream.aclose()

        task = asyncio.create_task(run())
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    def close(self) -> None:
        """End all streams."""
        for task in self._open:
            task.cancel()

    async def _console(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        await self._terminals.setdefault(guest, Terminal()).serve(guest, stream)

    async def _vnc(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        """The bytes of RFC 6143."""
        path = screen(await guest.host.do(guest.host.hypervisor.xml, guest.spec.uuid))[1]
        if not path:
            hint = "create --vdi vnc and start it; one that runs since an older sf: sf instance reboot --hard"
            raise Conflict(f"{guest.spec.name} shows no screen now", hint=hint)
        await carry_socket(*await asyncio.open_unix_connection(path), stream)

    async def _screen(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        """A PNG, as `_exec` hands out output."""
        data = await guest.host.do(guest.host.hypervisor.screenshot, guest.spec.uuid)
        for at in range(0, len(data), PIECE_BYTES):
            await stream.send(b"\1" + data[at : at + PIECE_BYTES])
        await stream.send('{"exit": 0}')

    async def _exec(self, guest: Guest, options: dict[str, Any], stream: Stream) -> None:
        """`{"argv": [...], "input": true}`: then input up to `eof`. Output comes behind a byte, 1 or 2, then `exit`."""
        argv, fed = options.get("argv"), asyncio.Event()
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise Invalid("argv is a list of words")

        async def given() -> AsyncIterator[bytes]:
            while isinstance(piece := await stream.receive(), bytes):
                yield piece
            fed.set()

        async def out(one: bytes, other: bytes) -> None:
            for mark, data in ((b"\1", one), (b"\2", other)):
                for at in range(0, len(data), PIECE_BYTES):
                    await stream.send(mark + data[at : at + PIECE_BYTES])

        async def execute() -> None:
            channel = self._channels.setdefault(guest, Channel(guest.host.hypervisor, guest.spec.uuid))
            stdin = given() if options.get("input") is True else None
            if not stdin:
                fed.set()
            await stream.send(json.dumps({"exit": await channel.execute(argv, out, stdin)}))

        async def gone() -> None:
            await fed.wait()
            while await stream.receive() is not None:
                pass

        await first(execute(), gone())


async def connect(namespace: str, address: str, also: str, port: int, stream: Stream) -> None:
    """A TCP connection from inside a network's namespace, to a guest's address or, if it is not there, `also`."""
    socket = await asyncio.to_thread(partial(tcp_socket, namespace, six=":" in address))
    socket.setblocking(False)
    try:
        async with asyncio.timeout(10):
            await asyncio.get_running_loop().sock_connect(socket, (address, port))
    except (OSError, TimeoutError) as err:
        socket.close()
        if also not in ("", address):
            await connect(namespace, also, "", port, stream)
            return
        raise Unavailable(f"{address} port {port}: {os.strerror(err.errno or errno.ETIMEDOUT)}") from err
    await carry_socket(*await asyncio.open_connection(sock=socket), stream)
