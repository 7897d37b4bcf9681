"""The node's agent: turns desired state into networks and guests, and says what it sees.

Networks come first, then guests, each guest owned by one task (`guest.guest`). Everything is driven by changes of
the desired state and by libvirt's events; the interval check is there for what somebody changed by hand.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from compute.agent import quarantine
from compute.agent.guest.guest import Guest
from compute.agent.guest.host import Host
from compute.agent.hypervisor import accel, figures
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.agent.image_service import ServedImages
from compute.agent.memory import Memory, boot
from compute.agent.operations import Operations
from compute.agent.reports import Reports
from compute.errors import ComputeError, Unavailable
from compute.wire.operations import NodeOperations
from compute.wire.spec import InstanceSpec, InstanceStatus, Inventory, NodeDesired, NodeEvent, NodeFacts
from compute.wire.streams import Stream, first
from net import NetError, NodeNetworks, Plane

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
_WAIT_S = 8.0  # what an outsider removes from a network is put back within ten seconds
_CUT_S = 1.0
_RETRY_S = 1.0


class Controller(Protocol):
    """What an agent needs of the server, near or far. All may raise Unavailable: try again later."""

    async def register(self, node: str, facts: NodeFacts, operations: NodeOperations) -> None: ...

    async def desired(self, node: str, after_revision: int = 0, wait_s: float = 0) -> NodeDesired: ...

    async def report(
        self, node: str, statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]
    ) -> None: ...

    async def inventory(self, node: str, seen: Inventory) -> None: ...

    async def dial(self, node: str, ticket: str) -> Stream: ...


class Agent:
    """One per node. `run` until cancelled; guests run on without it."""

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
        memory: Memory | None = None,
        instances: Path | None = None,
        leased_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._controller, self._node, self._state_dir = controller, node_name, state_dir
        self._plane, self._libvirt_uri, self._images = plane, libvirt_uri, images
        self._address, self._mtu_bytes, self._release, self._leased_s = address, mtu_bytes, release, leased_s
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="agent")
        self._plane_lock = asyncio.Lock()
        self._guests: dict[str, Guest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deleted: set[str] = set()
        self._registered: NodeFacts | None = None
        self._instances = instances or state_dir / "instances"
        self._instances.mkdir(parents=True, exist_ok=True)
        self._disk_bytes = int(figures.of_node(self._instances)["disk_total_bytes"])  # on ZFS it varies
        self._memory, self._trouble = memory or Memory(state_dir), ""
        self.operations = Operations(
            node_name, plane, self._plane_lock, self._guests, images, controller.dial, self._instances
        )
        self._reports = Reports(partial(controller.report, node_name))
        self._said: Inventory | None = None
        self._shown = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled. Waits for the server and for libvirt however long they take."""
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(self._pool, accel.find, self._state_dir)
        await self._register(verdict)
        desired = await self._patiently(self._controller.desired, self._node, 0, 0)

        def notified(uuid: str, what: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are on our way out
                loop.call_soon_threadsafe(self._notified, uuid, what)

        hypervisor = Hypervisor(self._libvirt_uri, desired.networks.installation, notified)
        host = Host(
            node=self._node,
            machine=self._memory.now.machine,
            installation=desired.networks.installation,
            directory=self._instances,
            address=self._address,
            hypervisor=hypervisor,
            plane=self._plane,
            plane_lock=self._plane_lock,
            images=self._images,
            verdict=verdict,
            pool=self._pool,
            publish=self._reports.publish,
            note=self._reports.note,
            shown=self._shown.set,
            leased_s=self._leased_s,
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reports.run())
                group.create_task(self._connecting(hypervisor))
                group.create_task(self._cutting())
                group.create_task(self._images.listen(self._heard))
                await self._follow(host, desired)
        finally:
            self.operations.close()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            try:
                with contextlib.suppress(ComputeError, TimeoutError):
                    await asyncio.wait_for(self._reports.flush(), 2)
                await self._images.tell("leave")  # it may end, too, if no guest needs it
            finally:
                hypervisor.close()
                self._pool.shutdown(wait=False)

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
        quiet, settled = 0, False
        while True:
            self._shown.clear()
            hold = not await host.do(self._memory.follows, desired) or desired.hold
            answered = await self._watch_unknown(host, set() if hold else {i.uuid for i in desired.instances})
            if not hold:
                unknown = [guest for guest in self._guests.values() if not guest.known]
                # A neighbour ignores a second gratuitous ARP within a second: look again soon after a change.
                applied = await self._apply_networks(quarantine.keep(desired.networks, unknown))
                quiet = quiet + 1 if applied else 0
                await self._images.use(desired.stores)  # first: a new guest's image may be in a new one
                await self._apply_instances(host, desired)
                await self._images.share(desired.image_site)
                settled = settled or (answered and await self._settle_images(host))
            await self._register(host.verdict)
            said = answered and await self._say_inventory(desired)
            done = quiet > 1 and settled and said and self._images.stores
            desired = await self._next(desired.revision, _WAIT_S if done else _RETRY_S)

    async def _next(self, revision: int, wait_s: float) -> NodeDesired:
        """Another desired state than `revision`; the same after `wait_s`, or when there is something to say."""

        async def shown() -> NodeDesired:
            await self._shown.wait()
            return await self._patiently(self._controller.desired, self._node, 0, 0)

        return await first(self._patiently(self._controller.desired, self._node, revision, wait_s), shown())

    async def _apply_networks(self, networks: NodeNetworks) -> bool:
        """Bring the data plane to `networks`; True if it was so already. A failure is reported and tried again."""
        async with self._plane_lock:
            try:
                apply = self._plane.apply
                done = await asyncio.get_running_loop().run_in_executor(self._pool, apply, networks)
            except (NetError, OSError) as err:
                if str(err) != self._trouble:  # said once, tried every second
                    log.error("networks: %s", err)
                    self._reports.say(f"networks: {err}", ("node", self._node))
                self._trouble = str(err)
                return False
        if done and networks == self.operations.networks:
            self._reports.put_right(self._node, done, [guest.spec for guest in self._guests.values()])
        self.operations.networks, self._trouble = networks, ""
        return not done

    async def _watch_unknown(self, host: Host, wanted: set[str]) -> bool:
        """What is here and not wanted is watched and left alone. False while libvirt could not be asked."""
        here, answered = await quarantine.find(host, self._memory.now.machine, set(self._guests))
        for uuid in sorted({*here, *self._guests} - wanted):
            guest = await self._guest(host, InstanceSpec(uuid, uuid, "", 1, 16, ()))
            if guest.known:
                guest.update(None, {})
                log.warning("instance %s is left as it is: the server does not know it now", uuid)
        return answered

    async def _say_inventory(self, desired: NodeDesired) -> bool:
        """Tell the server what it does not know; False while it could not be told all of it."""
        if not desired.epoch:  # it is of a version that does not ask
            return True
        seen = quarantine.inventory(self._memory.now, desired, self._guests.values())
        if seen is None:
            return False
        if self._said is None or seen != replace(self._said, reached=seen.reached):
            try:
                await self._controller.inventory(self._node, seen)
            except ComputeError as err:
                log.info("the server was not told what is here: %s", err)
                return False
            self._said = seen
        return True

    async def _settle_images(self, host: Host) -> bool:
        """The image service learns as whom guests run, and which disks there still are."""
        guests = list(self._guests.values())
        disks = ((g.spec.uuid, disk) for g in guests for disk in (*g.spec.disks, *g.record.spec.disks))
        try:
            self._images.admit(await host.do(host.hypervisor.qemu_group))
            if all(guest.recorded for guest in guests):
                readers = sorted({f"{uuid}-{d.device}" for uuid, d in disks if d.image})
                await self._images.tell("sync", readers=readers)
        except (ComputeError, OSError) as err:
            log.warning("%s", err)
            return False
        return True

    async def _apply_instances(self, host: Host, desired: NodeDesired) -> None:
        wanted = {spec.uuid: spec for spec in desired.instances}
        networks = {network.uuid: network for network in desired.networks.networks}
        self._deleted &= {spec.uuid for spec in wanted.values() if spec.delete}
        host.turns.begin(desired.instances, partial(self._notified, "", ""))
        for uuid, spec in wanted.items():
            if uuid in self._deleted and spec.delete:  # done; the server has not heard it yet
                self._reports.deleted(uuid)
            else:
                (await self._guest(host, spec)).update(spec, networks)

    async def _guest(self, host: Host, spec: InstanceSpec) -> Guest:
        guest = self._guests.get(spec.uuid)
        if guest is None:
            guest = Guest(host, spec)
            await guest.load()
            self._guests[spec.uuid] = guest
            self._tasks[spec.uuid] = asyncio.create_task(self._run(guest), name=f"guest {spec.uuid}")
        return guest

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
            self._notified("", message)

    # libvirt

    def _notified(self, uuid: str, what: str) -> None:
        if what == "disconnected":
            self._shown.set()  # the next look connects again
        for guest in [self._guests[uuid]] if uuid in self._guests else [] if uuid else self._guests.values():
            guest.wake(what)

    async def _connecting(self, hypervisor: Hypervisor) -> None:
        """Connect again once libvirtd is back, also while a look waits for the server."""
        while True:
            await asyncio.sleep(_RETRY_S)
            with contextlib.suppress(Unavailable):  # the look says so
                await asyncio.get_running_loop().run_in_executor(self._pool, hypervisor.connect)

    # Looking after

    async def _cutting(self) -> None:
        """Look at console logs, and keep them within their limit: with stdio_handler = "file" nobody else does."""
        while True:
            await asyncio.sleep(_CUT_S)
            look = partial(list[Guest], filter(Guest.look, list(self._guests.values())))
            for up in await asyncio.get_running_loop().run_in_executor(self._pool, look):
                up.wake("up")

    def _facts(self, verdict: accel.Verdict) -> NodeFacts:
        return NodeFacts(
            cpus=os.cpu_count() or 1,
            memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
            address=str(self._address),
            architecture=os.uname().machine,
            release=self._release,
            accel=str(verdict),
            mtu_bytes=self._mtu_bytes,
            images=self._images.here(),
            peer_address=self._images.peer_address,
            stores=self._images.stores,
            boot=boot(),
            disk_bytes=self._disk_bytes,
            live=True,
        )
