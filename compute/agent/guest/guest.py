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

from compute.agent.guest import config_drive
from compute.agent.guest.console import ConsoleLog
from compute.agent.guest.disks import Disks
from compute.agent.guest.host import Backing, Host
from compute.agent.guest.record import Course, DisksHeld, Journal, Phase, TapsHeld
from compute.agent.guest.taps import Taps
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import DomainState, Refused
from compute.errors import ComputeError, Unavailable
from compute.wire.spec import InstanceSpec, InstanceState, InstanceStatus, NodeEvent, Power
from imagestore import StoreError
from net import NetError, Network

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_ENDED = {"halted": "the guest powered itself off", "destroyed": "somebody stopped the guest"}


class _Leaving(Exception):
    """It is to be deleted: nothing more is waited for."""


class Guest:
    """The owner of one instance. `update` and `wake` may be called at any time, `run` is its task."""

    def __init__(self, host: Host, spec: InstanceSpec) -> None:
        self.host, self.spec = host, spec
        self.networks: Mapping[str, Network] = {}
        self.directory = host.directory / spec.uuid
        self._journal = Journal(self.directory, host.do)
        course = Course(spec, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)
        self._course = self._journal.part(course)
        self._taps = Taps(host, self._journal.part(TapsHeld()))
        self._disks = Disks(host, spec.uuid, self._journal.part(DisksHeld()), self.event)
        self.console = ConsoleLog(self.directory / "console.log")
        self.gone = False
        """Nothing of it is left."""
        self._leaving, self._wake = asyncio.Event(), asyncio.Event()
        self._agent_ready: bool | None = None
        self._up = False
        """Its console said so."""
        self._stage = InstanceState.PREFLIGHT

    @property
    def record(self) -> Course:
        """How far it got."""
        return self._course.now

    def update(self, spec: InstanceSpec, networks: Mapping[str, Network]) -> None:
        """New desired state."""
        changed = spec != self.spec
        self.spec, self.networks = spec, networks
        if spec.delete:
            self._leaving.set()
        if changed:
            self._wake.set()

    def wake(self, what: str = "") -> None:
        """Something happened: look again. `what` as libvirt_adapter notifies it."""
        if what.startswith("agent "):
            self._agent_ready = what == "agent ready"
        self._up = self._up or what == "up"
        self._wake.set()

    def look(self) -> bool:
        """Keep the console's log within its limit; True if it shows that the guest has come up. From any thread."""
        self.console.cut()
        return not self._up and bool(self._disks.held.served) and self.console.up()

    async def run(self) -> None:
        """Until nothing of it is left, or until cancelled: then the guest runs on."""
        await self.host.do(self._journal.load)
        self._wake.set()
        while not self.gone:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._attempt()
            except (Unavailable, OSError) as err:
                # libvirtd is away (the guest lives on), or the record cannot be written: nothing is lost by waiting.
                log.warning("instance %s: %s", self.spec.uuid, err)
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _attempt(self) -> None:
        try:
            await self._settle()
        except _Leaving:
            self._wake.set()
        except Unavailable:
            raise
        except (ComputeError, StoreError, NetError, OSError) as err:
            await self._failed(err)

    # Deciding

    async def _settle(self) -> None:
        spec = self.spec
        if spec.delete:
            await self._delete()
            return
        if self.record.phase is Phase.FAILED or spec.failed:
            self._publish(self._stage_error(), message=self.record.message)
            return
        if self.record.phase is Phase.NEW:
            await self._prepare()
        unpaused = self.record.spec.power is Power.PAUSED and spec.power is Power.ON
        if spec != self.record.spec:
            await self._course.save(spec=spec)
        if spec.reboot_hard > self.record.reboot_hard:
            await self._course.save(
                phase=Phase.STARTING, reboot_hard=spec.reboot_hard, reboot_soft=spec.reboot_soft
            )
        await self._disks.end_move()
        state = await self._observe()
        if spec.power is Power.OFF:
            if state.power != "off" or self.record.phase is not Phase.OFF:
                await self._power_off()
        elif self.record.phase in (Phase.STARTING, Phase.OFF):
            await self._power_on()
        elif self.record.phase is Phase.UP:
            await self._keep(state if not unpaused else replace(state, reason=""))
        await self._report()

    async def _observe(self) -> DomainState:
        """What libvirt says; a guest that was up and is off by itself is noted as ended."""
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        if state.power == "off" and self.record.phase is Phase.UP:
            if state.ended == "unknown":  # libvirtd knows nothing of its end: the machine was rebooted
                await self._course.save(phase=Phase.STARTING)
            else:
                log_file = f"{domain.name(self.host.installation, self.spec.uuid)}.log"
                crash = f"qemu was killed or crashed; see {log_file} of libvirt"
                why = _ENDED.get(state.ended, crash)
                await self._course.save(phase=Phase.ENDED, message=why, crashed=why == crash)
                await self._taps.remove()
                self.event(why)
        return state

    async def _keep(self, state: DomainState) -> None:
        """A guest that is up: reboot, pause, resume, plug."""
        hypervisor, uuid = self.host.hypervisor, self.spec.uuid
        if self.spec.reboot_soft > self.record.reboot_soft:
            await self._course.save(reboot_soft=self.spec.reboot_soft)
            await self.host.do(hypervisor.reboot, uuid)
            self.event("asked the guest to reboot")
        await self._taps.plug(self.spec, self.networks)
        await self._disks.move(self.spec)
        if self.spec.power is Power.PAUSED and state.power == "on":
            await self.host.do(hypervisor.suspend, uuid)
        elif self.spec.power is Power.ON and state.power == "paused" and not state.reason:
            await self.host.do(hypervisor.resume, uuid)

    # Steps

    async def _prepare(self) -> None:
        """Bring the images and make the disks."""
        self._stage = InstanceState.PREFLIGHT
        self._publish(self._stage)
        await self._course.save()
        images = await self._images()
        self._stage = InstanceState.CREATING
        self._publish(self._stage)
        await self._disks.make(self.spec, images)
        await self._course.save(phase=Phase.STARTING if self.spec.power is not Power.OFF else Phase.OFF)

    async def _images(self) -> dict[str, Backing]:
        """What the disks stand on, as soon as that is there. Raises _Leaving."""
        fetch = asyncio.ensure_future(self._disks.images(self.spec))
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait({fetch, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if self._leaving.is_set():
                raise _Leaving
            return await fetch
        finally:
            fetch.cancel()
            leaving.cancel()

    async def _power_on(self) -> None:
        began = time.monotonic()
        self._publish(self._stage_now(), "transition-to-on")
        await self._course.save(phase=Phase.STARTING)
        for again in (True, True, False):
            try:
                await self._start()
                break
            except Refused as err:
                # An image service that is killed between its answer and qemu's connection is there again soon.
                if not again or not self._disks.held.served:
                    raise
                log.warning("instance %s is started once more: %s", self.spec.uuid, err)
        await self._course.save(phase=Phase.UP, created=True, message="", crashed=False)
        self.event("started", duration_s=time.monotonic() - began, accel=str(self.host.verdict))

    async def _start(self) -> None:
        """Define, start with the CPUs stopped, move the taps into their networks, let the CPUs run."""
        uuid, hypervisor, host, spec = self.spec.uuid, self.host.hypervisor, self.host, self.spec
        await host.do(hypervisor.destroy, uuid)  # of an attempt that was cut off before its CPUs ran
        await self._taps.remove()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._taps.remove)
            undo.push_async_callback(host.do, hypervisor.destroy, uuid)
            nics = [await self._taps.make(spec, interface, self.networks) for interface in spec.interfaces]
            disks = await self._disks.begin(spec, await self._images())
            await host.do(self._materialise, tuple(nics), disks)
            await host.do(hypervisor.start_paused, uuid)
            await self._disks.hold(disks)
            await self._taps.adopt(self.networks)
            if self.spec.power is Power.ON:
                await host.do(hypervisor.resume, uuid)
            undo.pop_all()

    def _materialise(self, nics: tuple[domain.Nic, ...], disks: tuple[domain.Disk, ...]) -> None:
        """Config drive and domain definition from the newest spec."""
        spec, host = self.spec, self.host
        if spec.config_drive:
            drive = self.directory / "config.iso"
            half = drive.with_suffix(".new")
            half.touch(mode=0o600)
            half.write_bytes(config_drive.iso(config_drive.files(spec, dict(self.networks))))
            half.replace(drive)
        self.console.cut()
        self.console.begin()
        self._up = False
        graphics = None
        if spec.vdi:
            graphics = domain.Graphics(spec.vdi, str(host.address), self.record.vdi_password)
        host.hypervisor.define(
            domain.domain_xml(
                domain.Domain(
                    installation=host.installation,
                    spec=spec,
                    directory=self.directory,
                    accel=host.verdict.accel,
                    cpu=host.verdict.cpu,
                    disks=disks,
                    nics=nics,
                    graphics=graphics,
                )
            )
        )

    async def _power_off(self) -> None:
        self._publish(self._stage_now(), "transition-to-off")
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self._taps.remove()
        await self._course.save(phase=Phase.OFF, created=True, message="", crashed=False)
        self.event("powered off")

    async def _delete(self) -> None:
        """Remove everything; what was begun is begun again after a crash until the directory is gone."""
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self.host.do(self.host.hypervisor.undefine, self.spec.uuid)
        await self._taps.remove()
        await self._disks.give_up(self.record.spec)
        if self.directory.exists():
            await self.host.do(shutil.rmtree, self.directory)
        self.gone = True
        self._publish(InstanceState.DELETED)

    # Saying

    def _stage_now(self) -> InstanceState:
        return InstanceState.CREATED if self.record.created else InstanceState.CREATING

    def _stage_error(self) -> InstanceState:
        return InstanceState(f"{self._stage}-error")

    async def _failed(self, err: Exception) -> None:
        """Say why. Before the first start it is an error for good; later the instance stays, with its reason."""
        hint = getattr(err, "hint", "")
        message = f"{err}{f' ({hint})' if hint else ''}"
        self.event(f"failed: {message}")
        if not self.record.created:
            await self._course.save(phase=Phase.FAILED, message=message)
            self._publish(self._stage_error(), message=message)
            return
        if self.record.phase is Phase.STARTING:
            await self._course.save(phase=Phase.ENDED, message=message, crashed=True)
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        self._publish(InstanceState.CREATED, state.power, message)

    async def _report(self) -> None:
        self._stage = InstanceState.CREATED
        uuid, hypervisor = self.spec.uuid, self.host.hypervisor
        state = await self.host.do(hypervisor.state, uuid)
        if state.power == "off" and self.record.phase is Phase.UP:
            self._wake.set()  # it ended while we were at it
            return
        port, extra = 0, dict[str, Any]()
        if state.power != "off":
            if self._agent_ready is None:
                self._agent_ready = await self.host.do(hypervisor.agent_ready, uuid)
            if self._agent_ready or self._up:
                await self._disks.booted()
            if self.spec.vdi:
                port = domain.graphics_port(await self.host.do(hypervisor.xml, uuid))
                extra["vdi_password"] = self.record.vdi_password
        else:
            self._agent_ready = None
        if self._disks.held.arrived:
            extra["image_bytes"] = self._disks.held.arrived
        power = "crashed" if self.record.crashed else state.power
        message = self.record.message or state.reason
        self._publish(InstanceState.CREATED, power, message, vdi_port=port, extra=extra)

    def _publish(self, stage: InstanceState, power: str = "off", message: str = "", **more: Any) -> None:
        more |= {"accel": str(self.host.verdict), "agent_state": "ready" if self._agent_ready else ""}
        self.host.publish(InstanceStatus(self.spec.uuid, stage, power, message, **more))

    def event(self, message: str, duration_s: float | None = None, **extra: Any) -> None:
        """A line of the instance's history."""
        self.host.note(
            NodeEvent("instance", self.spec.uuid, time.time(), "status", message, duration_s, extra)
        )

    def heard(self, device: str, message: str) -> None:
        """Something that the image service says of a disk's image."""
        self.event(f"{device}: {message}")
        self._wake.set()
