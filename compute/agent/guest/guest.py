"""One instance on this node: a record on disk, and one task that owns everything of it.

The task compares what the server wants (`InstanceSpec`), what it did so far (`Record`) and what libvirt says, does the
next step and looks again. Each step may be repeated, and the record is written before a step that could not otherwise
be told from one never begun; so after kill -9 at any moment the next agent goes on or cleans up.

    new ──disks made──▶ starting ──CPUs run──▶ up ──ended by itself──▶ ended
     │                   ▲    │                 │                       │
     └─▶ failed ◀────────┼────┘ (first start)   └──power off──▶ off ◀───┘
                         └──── power on, hard reboot, the node rebooted ┘
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from compute.agent.guest.capture import Captures
from compute.agent.guest.console import ConsoleLog
from compute.agent.guest.disks import Disks, Leaving
from compute.agent.guest.ending import Ending
from compute.agent.guest.host import Host, Voice
from compute.agent.guest.passage import Passage
from compute.agent.guest.record import Course, DisksHeld, Journal, Phase, Tap, TapsHeld
from compute.agent.guest.taps import Taps
from compute.agent.guest.warm import Warm
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import DomainState, Refused
from compute.agent.memory import now_s
from compute.errors import ComputeError, Invalid, Unavailable
from compute.wire.spec import InstanceSpec, InstanceState, Orphan, Power
from imagestore import StoreError
from net import NetError, Network

log = logging.getLogger(__name__)

_RETRY_S, _SEEN_S = 1.0, 60.0  # what happens to one that is up libvirt tells; that it did not is seen so late


class Guest:
    """The owner of one instance. `update` and `wake` may be called at any time, `run` is its task."""

    def __init__(self, host: Host, spec: InstanceSpec) -> None:
        self.host, self.spec = host, spec
        self.networks: Mapping[str, Network] = {}
        self.directory = host.directory / spec.uuid
        self._journal = Journal(self.directory, host.do)
        course = Course(spec, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)
        self._course = self._journal.part(course)
        self._voice = Voice(host, spec.uuid)
        self._taps = Taps(host, self._journal.part(TapsHeld()))
        self._disks = Disks(host, spec.uuid, self._journal.part(DisksHeld()), self._voice.event)
        self._ending = Ending(host, spec.uuid, self._course, self._taps, self._voice, self.wake)
        self._captures = Captures(host, spec.uuid, self._journal.part, self._disks, self._voice, self.wake)
        self._warm = Warm(host, spec.uuid, self._disks, self._voice)
        self.console = ConsoleLog(self.directory / "console.log")
        parts = self._course, self._taps, self._disks, self.console, self._voice, self.wake
        self.passage = Passage(host, *parts)
        self._leaving, self._wake = asyncio.Event(), asyncio.Event()
        self._up, self.gone = False, False  # its console said so; nothing of it is left
        self.known, self._recorded, self._damage, self._trouble = True, False, "", ""
        self.orphan: Orphan | None = None  # how it is while it is not known

    @property
    def record(self) -> Course:
        """How far it got."""
        return self._course.now

    @property
    def recorded(self) -> bool:
        """It is known what it was made from."""
        return self.known or self._recorded

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Its taps, as its record has them."""
        return self._taps.held.now.taps

    def update(self, spec: InstanceSpec | None, networks: Mapping[str, Network]) -> None:
        """New desired state; None: nobody knows it now, so it is only watched."""
        known, spec = spec is not None, spec or self.spec
        changed = (spec, known) != (self.spec, self.known)
        self.spec, self.networks, self.known = spec, networks, known
        self._voice.leased_s, self.orphan = spec.leased_s, None if changed else self.orphan
        (self._leaving.set if spec.delete or not known else self._leaving.clear)()
        if changed:
            self._wake.set()

    def wake(self, what: str = "") -> None:
        """Something happened: look again. `what` as libvirt_adapter notifies it."""
        if what.startswith("agent "):
            self._voice.agent_ready = what == "agent ready"
        self._up = self._up or what == "up"
        if what != "figures" or self._disks.held.now.served or now_s() > self._ending.quiet_s + _SEEN_S:
            self._wake.set()

    def look(self) -> bool:
        """Keep the console's log within its limit; True if it shows that the guest has come up. From any thread."""
        self.console.cut()
        return not self._up and bool(self._disks.held.now.served) and self.console.up()

    def notice(self, trouble: str) -> None:
        """What is wrong with it, seen from elsewhere."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._wake.set()

    async def load(self) -> None:
        """Take up the record; a damaged one is rebuilt as soon as libvirt can be asked."""
        try:
            self._recorded = await self.host.do(self._journal.load)
        except (Invalid, OSError) as err:
            self._damage = str(err)

    async def run(self) -> None:
        """Until nothing of it is left, or until cancelled: then the guest runs on."""
        self._wake.set()
        while not self.gone:
            await self._wake.wait()
            self._wake.clear()
            try:
                async with self.passage.turn:
                    await self._attempt()
                self._voice.waits(None)
                self.host.turns.settled(self.spec)
            except (ComputeError, StoreError, NetError, OSError) as err:
                # libvirtd is away (the guest lives on), or the record cannot be written: nothing is lost by waiting.
                log.warning("instance %s: %s", self.spec.uuid, err)
                self._voice.waits(err)
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _attempt(self) -> None:
        try:
            await self._settle()
        except Leaving:
            self._wake.set()
        except Unavailable:
            raise
        except (ComputeError, StoreError, NetError, OSError) as err:
            await self._failed(err)

    # Deciding

    async def _settle(self) -> None:
        spec = self.spec
        if not self._recorded:
            await self._recover()
        if spec.delete and self.known:
            await self._delete()
            return
        await self._captures.adopt()
        if not self.known:
            await self._watch()
            return
        if await self.passage.rules(spec, self.networks, self._leaving):
            self._recorded = True
            return
        if self.record.phase is Phase.FAILED or spec.failed:
            self._voice.fail(self.record.message)
            return
        if self.record.phase is Phase.NEW:
            if spec.made:
                self._voice.stage = InstanceState.CREATED
                self._voice.fail("its disks are not on this node; none are made anew")
                return
            await self._prepare()
        unpaused = self.record.spec.power is Power.PAUSED and spec.power is Power.ON
        if spec != self.record.spec:
            again = spec.power is Power.OFF and self.record.spec.power is not Power.OFF
            asked_s = 0 if again else self.record.asked_s
            phase = await self._captures.restore(self.record, spec)
            await self._course.save(spec=spec, phase=phase, asked_s=asked_s)
        if spec.reboot_hard > self.record.reboot_hard:
            counted = {"reboot_hard": spec.reboot_hard, "reboot_soft": spec.reboot_soft}
            await self._course.save(phase=Phase.STARTING, **counted)
        await self._disks.end_move()
        state = await self._ending.observe(spec)
        await self._captures.look(spec, state.power)
        if spec.power is Power.OFF:
            done = state.power == "off" and self.record.phase is Phase.OFF
            if not done and await self._ending.come(spec, state):
                self._voice.publish(self._stage_now(), "transition-to-off")
                await self._warm.give_up(spec, self._leaving, "it was stopped before it was itself")
                await self._ending.take_power()
                self._wake.set()  # a snapshot may wait for that
        elif self.record.phase in (Phase.STARTING, Phase.OFF) and not self._captures.at_rest:
            self.host.check_lease(spec)
            if self.host.turns.come(spec):
                await self._power_on()
        elif self.record.phase is Phase.UP:
            await self._keep(state if not unpaused else replace(state, reason=""))
        await self._report()

    async def _recover(self) -> None:
        """Without a record: make one from what is here, if it was made."""
        spec = self.spec if self.known and not self.spec.delete else None
        if await self._journal.recover(self.host, self.spec.uuid, spec, self._damage):
            self._recorded, why = True, self._damage or "it was lost"
            self._voice.event(f"its record is rebuilt from its domain and disks: {why}")

    async def _watch(self) -> None:
        """Nobody knows it: it is left as it is, and shown."""
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        networks = {tap.network.uuid: tap.network for tap in self.taps if tap.network}
        spec, trouble = self.record.spec if self._recorded else None, self._trouble or self._damage
        seen = Orphan(self.spec.uuid, state.power, spec, tuple(networks.values()), trouble)
        if seen != self.orphan:
            self.orphan = seen
            self.host.shown()

    async def _keep(self, state: DomainState) -> None:
        """A guest that is up: reboot, pause, resume, plug."""
        self._voice.halted(state.reason)
        hypervisor, uuid = self.host.hypervisor, self.spec.uuid
        if self.spec.reboot_soft > self.record.reboot_soft:
            await self._course.save(reboot_soft=self.spec.reboot_soft)
            await self.host.do(hypervisor.reboot, uuid)
            self._voice.event("asked the guest to reboot")
        await self._taps.plug(self.spec, self.networks)
        await self._captures.move(self.spec)
        if self.spec.power is Power.PAUSED and state.power == "on":
            await self.host.do(hypervisor.suspend, uuid)
        elif state.power == "paused" and self.spec.power is Power.ON and self._disks.may_go_on(state.reason):
            await self.host.do(hypervisor.resume, uuid)

    # Steps

    async def _prepare(self) -> None:
        """Bring the images and make the disks; those of one that resumes each start makes, until it is itself."""
        self._voice.publish(InstanceState.PREFLIGHT)
        await self._course.save(created=self.spec.arriving)
        self._recorded = True
        if not await self._warm.choose(self.spec):
            images = await self._disks.images(self.spec, self._leaving)
            self._voice.publish(InstanceState.CREATING)
            await self._disks.make(self.spec, images)
        await self._course.save(phase=Phase.STARTING if self.spec.power is not Power.OFF else Phase.OFF)

    async def _power_on(self) -> None:
        began, self._voice.agent_ready = time.monotonic(), None
        self._voice.publish(self._stage_now(), "transition-to-on")
        await self._course.save(phase=Phase.STARTING)
        resumed = await self._warm.resume(self._start, self.spec, self._leaving)
        for again in () if resumed else (True, True, False):
            try:
                await self._start()
                break
            except Refused as err:
                # An image service that is killed between its answer and qemu's connection is there again soon.
                if not again or not self._disks.held.now.served:
                    raise
                log.warning("instance %s is started once more: %s", self.spec.uuid, err)
        self._ending.seen_s = now_s()
        await self._course.save(phase=Phase.UP, created=True, message="", crashed=False)
        self.host.turns.settled(self.spec, started=True)
        self._voice.event("started", duration_s=time.monotonic() - began, accel=str(self.host.verdict))

    async def _start(self, *, resumes: bool = False) -> None:
        """Define, start with the CPUs stopped, move the taps into their networks, let the CPUs run."""
        uuid, hypervisor, host, spec = self.spec.uuid, self.host.hypervisor, self.host, self.spec
        await host.do(hypervisor.destroy, uuid)  # of an attempt that was cut off before its CPUs ran
        await self._taps.remove()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._taps.remove)
            undo.push_async_callback(host.do, hypervisor.destroy, uuid)
            nics = [await self._taps.make(spec, one, self.networks) for one in spec.interfaces if not resumes]
            images = await self._disks.images(spec, self._leaving)
            disks = await self._disks.begin(spec, images)
            made = spec, dict(self.networks), disks, tuple(nics), self.record.vdi_password
            await host.do(host.define, *made, incoming=resumes)
            await host.do(self.console.begin)
            self._up = False
            await host.do(hypervisor.start_paused, uuid)
            await self._disks.hold(disks)
            await (self._warm.load(spec) if resumes else self._disks.grow(spec))
            await self._taps.adopt(self.networks)
            host.check_lease(spec, known=self.known)
            if self.spec.power is Power.ON or resumes:
                await host.do(hypervisor.resume, uuid)
            if resumes:
                await self._warm.renew(spec, self._taps, self.networks)
            undo.pop_all()

    async def _delete(self) -> None:
        """Remove everything; what was begun is begun again after a crash until the directory is gone."""
        await self.host.do(self.host.hypervisor.remove, self.spec.uuid)
        await self._captures.stop()
        await self.host.do(self.passage.clear)
        await self._taps.remove()
        await self._disks.give_up(self.record.spec)
        if self.directory.exists():
            await self.host.do(shutil.rmtree, self.directory)
        self.gone = True
        self._voice.publish(InstanceState.DELETED)

    # Saying

    def _stage_now(self) -> InstanceState:
        return InstanceState.CREATED if self.record.created else InstanceState.CREATING

    async def _failed(self, err: Exception) -> None:
        """Say why. Before the first start it is an error for good; later the instance stays, with its reason."""
        if self.record.created and self.record.phase is Phase.NEW:  # it arrives: its disks are tried again
            raise err
        message = f"{err} ({hint})" if (hint := getattr(err, "hint", "")) else str(err)
        self._voice.event(f"failed: {message}")
        if not self.record.created:
            await self._course.save(phase=Phase.FAILED, message=message)
            self._voice.fail(message)
            return
        if self.record.phase is Phase.STARTING:
            await self._course.save(phase=Phase.ENDED, message=message, crashed=True)
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        self._voice.publish(InstanceState.CREATED, state.power, message)

    async def _report(self) -> None:
        uuid, hypervisor = self.spec.uuid, self.host.hypervisor
        state = await self.host.do(hypervisor.state, uuid)
        if state.power == "off" and self.record.phase is Phase.UP:
            self._wake.set()  # it ended while we were at it
            return
        port, extra = 0, dict[str, Any]()
        if state.power != "off":
            if self._voice.agent_ready is None:
                found = await self.host.do(hypervisor.agent_ready, uuid)
                if self._voice.agent_ready is None:  # libvirt may have said so meanwhile
                    self._voice.agent_ready = found
            if self._voice.agent_ready or self._up:
                await self._disks.booted()
            if self.spec.vdi:
                port, _ = domain.screen(await self.host.do(hypervisor.xml, uuid))
                extra |= {"vdi_password": self.record.vdi_password} if port else {}
        else:
            self._voice.agent_ready = None
        extra |= {"image_bytes": arrived} if (arrived := self._disks.held.now.arrived) else {}
        power = "crashed" if self.record.crashed else state.power
        power = "transition-to-off" if state.power != "off" and self.spec.power is Power.OFF else power
        if self.spec.power is not Power.OFF and self.record.phase in (Phase.STARTING, Phase.OFF):
            power = "transition-to-on"  # it waits for its turn; what is off stays with a lost node
        message = self.record.message or state.reason
        self._voice.publish(InstanceState.CREATED, power, message, vdi_port=port, extra=extra)

    def heard(self, device: str, message: str) -> None:
        """Something that the image service says of a disk's image."""
        self._voice.event(f"{device}: {message}")
        self._wake.set()
