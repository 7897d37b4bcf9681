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
from compute.agent.guest.host import Host
from compute.agent.guest.owner import Owner, Phase
from compute.agent.guest.taps import Interfaces
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import DomainState, Refused
from compute.errors import ComputeError, Conflict, Unavailable
from compute.wire.spec import InstanceSpec, InstanceState, InstanceStatus, Power
from imagestore import StoreError
from net import NetError, Network

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_RECONNECT_S = 3600
"""For how long a guest waits for an image service that is away."""


class Guest(Owner):
    """The owner of one instance. `update` and `wake` may be called at any time, `run` is its task."""

    def __init__(self, host: Host, spec: InstanceSpec) -> None:
        super().__init__(host, spec)
        self.console = ConsoleLog(self.directory / "console.log")
        self.gone = False
        """Nothing of it is left."""
        self._wake = asyncio.Event()
        self._agent_ready: bool | None = None
        self._up = False
        """Its console said so."""
        self._interfaces, self._disks = Interfaces(self), Disks(self, self._say)
        self._stage = InstanceState.PREFLIGHT

    def update(self, spec: InstanceSpec, networks: Mapping[str, Network]) -> None:
        """New desired state."""
        changed = spec != self.spec
        self.spec, self.networks = spec, networks
        if spec.delete:
            self.leaving.set()
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
        return not self._up and bool(self.record.served) and self.console.up()

    async def run(self) -> None:
        """Until nothing of it is left, or until cancelled: then the guest runs on."""
        await self.host.do(self.load)
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
            self._publish(self._stage_error(), DomainState("off"), self.record.message)
            return
        if self.record.phase is Phase.NEW and not await self._prepare():
            return
        unpaused = self.record.spec.power is Power.PAUSED and spec.power is Power.ON
        if spec != self.record.spec:
            await self.save(spec=spec)
        if spec.reboot_hard > self.record.reboot_hard:
            await self.save(phase=Phase.STARTING, reboot_hard=spec.reboot_hard, reboot_soft=spec.reboot_soft)
        if self.record.moving:
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
                await self.save(phase=Phase.STARTING)
            elif state.ended in ("halted", "destroyed"):
                who = (
                    "the guest powered itself off"
                    if state.ended == "halted"
                    else "somebody stopped the guest"
                )
                await self._end(who, crashed=False)
            else:
                log_file = f"{domain.name(self.host.installation, self.spec.uuid)}.log"
                await self._end(f"qemu was killed or crashed; see {log_file} of libvirt", crashed=True)
        return state

    async def _end(self, why: str, *, crashed: bool) -> None:
        await self.save(phase=Phase.ENDED, message=why, crashed=crashed)
        await self._interfaces.remove()
        self.event(why)

    async def _keep(self, state: DomainState) -> None:
        """A guest that is up: reboot, pause, resume, plug."""
        hypervisor, uuid = self.host.hypervisor, self.spec.uuid
        if self.spec.reboot_soft > self.record.reboot_soft:
            await self.save(reboot_soft=self.spec.reboot_soft)
            await self.host.do(hypervisor.reboot, uuid)
            self.event("asked the guest to reboot")
        await self._interfaces.plug()
        for device in self.record.served:
            await self._disks.move(device)
        if self.spec.power is Power.PAUSED and state.power == "on":
            await self.host.do(hypervisor.suspend, uuid)
        elif self.spec.power is Power.ON and state.power == "paused" and not state.reason:
            await self.host.do(hypervisor.resume, uuid)

    # Steps

    async def _prepare(self) -> bool:
        """Bring the images and make the disks. False if the instance is to be deleted meanwhile."""
        self._stage = InstanceState.PREFLIGHT
        self._publish(self._stage, DomainState("off"))
        await self.save()
        images = await self._disks.images()
        if images is None:
            return False
        self._stage = InstanceState.CREATING
        self._publish(self._stage, DomainState("off"))
        await self._disks.make(images)
        await self.save(phase=Phase.STARTING if self.spec.power is not Power.OFF else Phase.OFF)
        return True

    async def _power_on(self) -> None:
        began = time.monotonic()
        self._publish(self._stage_now(), DomainState("transition-to-on"))
        await self.save(phase=Phase.STARTING)
        for again in (True, True, False):
            try:
                await self._start()
                break
            except Refused as err:
                # An image service that is killed between its answer and qemu's connection is there again soon.
                if not again or not self.record.served:
                    raise
                log.warning("instance %s is started once more: %s", self.spec.uuid, err)
        await self.save(phase=Phase.UP, created=True, message="", crashed=False)
        self.event("started", duration_s=time.monotonic() - began, accel=str(self.host.verdict))

    async def _start(self) -> None:
        """Define, start with the CPUs stopped, move the taps into their networks, let the CPUs run."""
        uuid, hypervisor, host = self.spec.uuid, self.host.hypervisor, self.host
        await host.do(hypervisor.destroy, uuid)  # of an attempt that was cut off before its CPUs ran
        await self._interfaces.remove()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._interfaces.remove)
            undo.push_async_callback(host.do, hypervisor.destroy, uuid)
            nics = [await self._interfaces.make(interface) for interface in self.spec.interfaces]
            images = await self._disks.images()
            if images is None:
                raise Conflict("the instance is to be deleted")
            disks = self._disks.devices(images)
            served = tuple(disk.device for disk in disks if disk.socket)
            await self.save(served=served, deferred=(), arrived={})
            await host.do(self._materialise, tuple(nics), disks)
            await host.do(hypervisor.start_paused, uuid)
            for disk in disks:
                if disk.socket:
                    await host.do(hypervisor.keep_reconnecting, uuid, disk, _RECONNECT_S)
            await self._interfaces.adopt()
            if self.spec.power is Power.ON:
                await host.do(hypervisor.resume, uuid)
            undo.pop_all()

    def _materialise(self, nics: tuple[domain.Nic, ...], disks: tuple[domain.Disk, ...]) -> None:
        """Config drive and domain definition from the newest spec."""
        spec, host = self.spec, self.host
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
                    uuid=spec.uuid,
                    title=f"{spec.namespace}/{spec.name}",
                    cpus=spec.cpus,
                    memory_mib=spec.memory_mib,
                    accel=host.verdict.accel,
                    cpu=host.verdict.cpu,
                    disks=disks,
                    nics=nics,
                    config_drive=drive,
                    console_log=self.console.path,
                    uefi=spec.uefi,
                    nvram=self.directory / "nvram.fd" if spec.uefi else None,
                    graphics=graphics,
                )
            )
        )

    async def _power_off(self) -> None:
        self._publish(self._stage_now(), DomainState("transition-to-off"))
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self._interfaces.remove()
        await self.save(phase=Phase.OFF, created=True, message="", crashed=False)
        self.event("powered off")

    async def _delete(self) -> None:
        """Remove everything; what was begun is begun again after a crash until the directory is gone."""
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self.host.do(self.host.hypervisor.undefine, self.spec.uuid)
        await self._interfaces.remove()
        await self._disks.give_up()
        if self.directory.exists():
            await self.host.do(shutil.rmtree, self.directory)
        self.gone = True
        self._publish(InstanceState.DELETED, DomainState("off"))

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
            await self.save(phase=Phase.FAILED, message=message)
            self._publish(self._stage_error(), DomainState("off"), message)
            return
        if self.record.phase is Phase.STARTING:
            await self.save(phase=Phase.ENDED, message=message, crashed=True)
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        self._publish(InstanceState.CREATED, state, message)

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
                for device in self.record.served:
                    await self.host.images.booted(self._disks.reader(device))
            if self.spec.vdi:
                port = domain.graphics_port(await self.host.do(hypervisor.xml, uuid))
                extra["vdi_password"] = self.record.vdi_password
        else:
            self._agent_ready = None
        if self.record.arrived:
            extra["image_bytes"] = self.record.arrived
        if self.record.crashed:
            state = DomainState("crashed")
        self._publish(
            InstanceState.CREATED, state, self.record.message or state.reason, vdi_port=port, extra=extra
        )

    def _say(self, progress: str) -> None:
        self._publish(self._stage, DomainState("off"), progress=progress)

    def _publish(self, stage: InstanceState, state: DomainState, message: str = "", **more: Any) -> None:
        ready = "ready" if self._agent_ready else ""
        accel = str(self.host.verdict)
        self.host.publish(
            InstanceStatus(
                self.spec.uuid, stage, state.power, message, accel=accel, agent_state=ready, **more
            )
        )

    def heard(self, device: str, message: str) -> None:
        """Something that the image service says of a disk's image."""
        self.event(f"{device}: {message}")
        self._wake.set()
