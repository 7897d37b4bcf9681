"""What the server asks of this node directly, done."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from compute.agent.guest.guest import Guest
from compute.agent.hypervisor import figures
from compute.agent.image_service import ServedImages
from compute.agent.streams import Streams, connect
from compute.errors import NotFound
from compute.wire.codec import from_plain
from compute.wire.operations import Figures, NodeOperations
from compute.wire.spec import CachedImage
from compute.wire.streams import Stream
from net import NetError, Network, NodeNetworks, Plane, listening, traffic

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
        dial: Callable[[str, str], Awaitable[Stream]],
        directory: Path,
    ) -> None:
        self._node, self._plane, self._plane_lock, self._guests = node, plane, plane_lock, guests
        self._images, self._directory = images, directory
        self.networks: NodeNetworks | None = None
        self._pings = asyncio.Semaphore(_PINGS)
        self.streams = Streams(partial(dial, node))

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

    async def stream(self, kind: str, target: str, options: dict[str, Any], ticket: str) -> None:
        if kind == "connect":
            space, also = self._plane.namespace(self._network(target)), str(options.get("also") or "")
            to = str(options.get("address")), also, int(options["port"])
            await self.streams.begin(ticket, partial(connect, space, *to))
        else:
            async with asyncio.timeout(10):  # who moves here is asked for before this node was told of it
                while kind == "arrive" and target not in self._guests:
                    await asyncio.sleep(0.05)
            await self.streams.open(self._guest(target), kind, options, ticket)

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
