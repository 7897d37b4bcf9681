"""The node's agent: turns desired state into networks and guests, and says what it sees.

Networks come first, then guests, each guest owned by one task (`guest.guest`). Everything is driven by changes of
the desired state and by libvirt's events; the interval check is there for what somebody changed by hand.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from compute.agent.guest.guest import Guest
from compute.agent.guest.host import Host, Plane
from compute.agent.hypervisor import accel
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.agent.image_service import ServedImages
from compute.agent.operations import Operations
from compute.errors import ComputeError, Unavailable
from compute.wire.operations import NodeOperations
from compute.wire.spec import (
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    NodeDesired,
    NodeEvent,
    NodeFacts,
)
from imagestore import StoreError
from net import NetError, NodeNetworks

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

_WAIT_S = 20.0
_CUT_S = 1.0
_RETRY_S = 1.0
_KEPT_EVENTS = 10_000
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Controller(Protocol):
    """What an agent needs of the server, near or far. All may raise Unavailable: try again later."""

    async def register(self, node: str, facts: NodeFacts, operations: NodeOperations) -> None: ...

    async def desired(self, node: str, after_revision: int = 0, wait_s: float = 0) -> NodeDesired: ...

    async def report(
        self, node: str, statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]
    ) -> None: ...


class Agent:
    """One per node. `run` until cancelled or `stop`ped; guests run on without it."""

    def __init__(
        self,
        controller: Controller,
        node_name: str,
        state_dir: Path,
        plane: Plane,
        images: ServedImages,
        libvirt_uri: str = "qemu:///system",
        *,
        address: IPv4Address = IPv4Address("127.0.0.1"),
        mtu_bytes: int = 1450,
        release: str = "",
    ) -> None:
        self._controller, self._node, self._state_dir = controller, node_name, state_dir
        self._plane, self._libvirt_uri = plane, libvirt_uri
        self._images = images
        self._address, self._mtu_bytes, self._release = address, mtu_bytes, release
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="agent")
        self._plane_lock = asyncio.Lock()
        self._guests: dict[str, Guest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deleted: set[str] = set()
        self._registered: NodeFacts | None = None
        self._trouble = ""
        self.operations = Operations(node_name, plane, self._plane_lock, self._guests)
        self._statuses: list[InstanceStatus] = []
        self._events: deque[NodeEvent] = deque(maxlen=_KEPT_EVENTS)
        self._to_report = asyncio.Event()
        self._lost = asyncio.Event()
        self._main: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until cancelled. Waits for the server and for libvirt however long they take."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        verdict = await loop.run_in_executor(self._pool, accel.find, self._state_dir)
        await self._register(verdict)
        desired = await self._patiently(self._controller.desired, self._node, 0, 0)

        def notified(uuid: str, what: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are on our way out
                loop.call_soon_threadsafe(self._notified, uuid, what)

        hypervisor = Hypervisor(self._libvirt_uri, desired.networks.installation, notified)
        host = Host(
            node=self._node,
            installation=desired.networks.installation,
            directory=self._state_dir / "instances",
            address=self._address,
            hypervisor=hypervisor,
            plane=self._plane,
            plane_lock=self._plane_lock,
            images=self._images,
            verdict=verdict,
            pool=self._pool,
            publish=self._publish,
            note=self._note,
        )
        host.directory.mkdir(exist_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reporting())
                group.create_task(self._connecting(hypervisor))
                group.create_task(self._cutting())
                group.create_task(self._images.listen(self._heard))
                await self._follow(host, desired)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            with contextlib.suppress(ComputeError, TimeoutError):
                async with asyncio.timeout(2):
                    await self._report_once()
            await self._images.leave()
            hypervisor.close()
            self._pool.shutdown(wait=False)

    async def stop(self) -> None:
        """End `run`; guests and networks stay as they are."""
        if self._main is not None and not self._main.done():
            self._main.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({self._main})

    # Following the server

    async def _patiently(self, call: Callable[P, Awaitable[T]], *args: P.args, **named: P.kwargs) -> T:
        while True:
            try:
                return await call(*args, **named)
            except Unavailable as err:
                log.warning("the server does not answer: %s", err)
                await asyncio.sleep(_RETRY_S)

    async def _register(self, verdict: accel.Verdict) -> None:
        """Say what this machine is, if that changed: images come and go."""
        facts = await asyncio.to_thread(self._facts, verdict)
        if facts != self._registered:
            await self._patiently(self._controller.register, self._node, facts, self.operations)
            self._registered = facts

    async def _follow(self, host: Host, desired: NodeDesired) -> None:
        """Act on each desired state, and look again at intervals."""
        orphans_known, quiet = False, 0
        while True:
            # A neighbour ignores a second gratuitous ARP within a second: look again soon after a change.
            quiet = quiet + 1 if await self._apply_networks(desired.networks) else 0
            if not orphans_known:
                orphans_known = await self._adopt_orphans(host, desired)
            self._apply_instances(host, desired)
            await self._images.use(desired.stores)
            await self._images.share(desired.image_site)
            await self._register(host.verdict)
            wait_s = _WAIT_S if quiet > 1 and orphans_known else _RETRY_S
            desired = await self._patiently(self._controller.desired, self._node, desired.revision, wait_s)

    async def _apply_networks(self, networks: NodeNetworks) -> bool:
        """Bring the data plane to `networks`; True if it was so already. A failure is reported and tried again."""
        async with self._plane_lock:
            try:
                apply = self._plane.apply
                done = await asyncio.get_running_loop().run_in_executor(self._pool, apply, networks)
            except (NetError, OSError) as err:
                if str(err) != self._trouble:  # said once, tried every second
                    log.error("networks: %s", err)
                    self._note(NodeEvent("node", self._node, time.time(), "status", f"networks: {err}"))
                self._trouble = str(err)
                return False
        self.operations.networks, self._trouble = networks, ""
        return not done

    async def _adopt_orphans(self, host: Host, desired: NodeDesired) -> bool:
        """What carries our id and is no longer wanted is removed by an owner as if it were deleted now."""
        try:
            await host.do(host.hypervisor.connect)
            domains = await host.do(host.hypervisor.ours)
            self._images.admit(await host.do(host.hypervisor.qemu_group))
            disks = ((spec.uuid, disk) for spec in desired.instances for disk in spec.disks)
            await self._images.only([f"{uuid}-{disk.device}" for uuid, disk in disks if disk.image])
        except (ComputeError, StoreError, OSError) as err:
            log.warning("%s", err)
            return False
        wanted = {spec.uuid for spec in desired.instances}
        kept = {path.name for path in host.directory.iterdir() if _UUID.fullmatch(path.name)}
        for uuid in {*domains, *kept} - wanted:
            self._own(host, InstanceSpec(uuid, uuid, "", 1, 16, (), delete=True), desired)
        return True

    def _apply_instances(self, host: Host, desired: NodeDesired) -> None:
        wanted = {spec.uuid: spec for spec in desired.instances}
        self._deleted &= wanted.keys()
        for uuid, spec in wanted.items():
            if uuid in self._deleted and spec.delete:  # done; the server has not heard it yet
                self._publish(InstanceStatus(uuid, InstanceState.DELETED))
            else:
                self._own(host, spec, desired)
        for uuid, guest in self._guests.items():
            if uuid not in wanted:
                self._own(host, replace(guest.spec, delete=True), desired)

    def _own(self, host: Host, spec: InstanceSpec, desired: NodeDesired) -> None:
        networks = {network.uuid: network for network in desired.networks.networks}
        guest = self._guests.get(spec.uuid)
        if guest is None:
            guest = self._guests[spec.uuid] = Guest(host, spec)
            guest.update(spec, networks)
            self._tasks[spec.uuid] = asyncio.create_task(self._run(guest), name=f"guest {spec.uuid}")
        else:
            guest.update(spec, networks)

    async def _run(self, guest: Guest) -> None:
        uuid = guest.spec.uuid
        try:
            await guest.run()
            self._deleted.add(uuid)
        finally:
            if self._guests.get(uuid) is guest:
                del self._guests[uuid], self._tasks[uuid]

    def _heard(self, reader: str, message: str) -> None:
        """The image service speaks of the disk `<uuid>-<device>`; "" is everybody's."""
        uuid, device = reader[:36], reader[37:]
        if uuid in self._guests:
            self._guests[uuid].heard(device, message)
        elif not reader:
            self._notified("", "")

    # libvirt

    def _notified(self, uuid: str, what: str) -> None:
        if what == "disconnected":
            self._lost.set()
        for guest in [self._guests[uuid]] if uuid in self._guests else [] if uuid else self._guests.values():
            guest.wake(what)

    async def _connecting(self, hypervisor: Hypervisor) -> None:
        """Connect, and connect again whenever libvirtd went away."""
        while True:
            self._lost.clear()
            try:
                await asyncio.get_running_loop().run_in_executor(self._pool, hypervisor.connect)
            except Unavailable as err:
                log.warning("%s", err)
                await asyncio.sleep(_RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._lost.wait()

    # Reporting

    def _publish(self, status: InstanceStatus) -> None:
        """Queue a status; one that only refines the last of the same state replaces it."""
        for index in range(len(self._statuses) - 1, -1, -1):
            if self._statuses[index].uuid == status.uuid:
                if self._statuses[index].state == status.state:
                    del self._statuses[index]
                break
        self._statuses.append(status)
        self._to_report.set()

    def _note(self, event: NodeEvent) -> None:
        self._events.append(event)
        self._to_report.set()

    async def _reporting(self) -> None:
        while True:
            await self._to_report.wait()
            self._to_report.clear()
            try:
                await self._report_once()
            except Unavailable:
                await asyncio.sleep(_RETRY_S)
                self._to_report.set()

    async def _report_once(self) -> None:
        statuses, events = list(self._statuses), list(self._events)
        if not statuses and not events:
            return
        await self._controller.report(self._node, statuses, events)
        self._statuses = [status for status in self._statuses if not any(status is s for s in statuses)]
        for event in events:
            with contextlib.suppress(ValueError):
                self._events.remove(event)

    # Looking after

    async def _cutting(self) -> None:
        """Look at console logs, and keep them within their limit: with stdio_handler = "file" nobody else does."""
        while True:
            await asyncio.sleep(_CUT_S)
            guests = list(self._guests.values())
            look: partial[list[bool]] = partial(list, map(Guest.look, guests))
            looked = await asyncio.get_running_loop().run_in_executor(self._pool, look)
            for guest, up in zip(guests, looked, strict=True):
                if up:
                    guest.wake("up")

    def _facts(self, verdict: accel.Verdict) -> NodeFacts:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return NodeFacts(
            cpus=os.cpu_count() or 1,
            memory_mib=memory_bytes >> 20,
            address=str(self._address),
            architecture=os.uname().machine,
            release=self._release,
            accel=str(verdict),
            mtu_bytes=self._mtu_bytes,
            images=self._images.here(),
            peer_address=self._images.peer_address,
            stores=self._images.stores,
        )
