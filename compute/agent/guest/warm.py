"""Warm states: guests of an image that had just come up, kept with their memory; and guests that begin as one.

What a guest resumes as is decided once, before its disks are made. Until it has become itself (`identity`) it has no
interface and its disks hold nothing of its own, so whatever ends that, it is destroyed and begins anew.
"""

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from compute.agent import identity
from compute.agent.guest import overlay
from compute.agent.guest.disks import Disks
from compute.agent.guest.host import Host, Voice
from compute.agent.guest.taps import Networks, Taps
from compute.agent.hypervisor import domain, passing
from compute.errors import ComputeError, Conflict
from compute.wire.spec import InstanceSpec, Power
from imagestore import StoreError
from net import NetError

_RENEW_S, _FETCH_S = 60.0, 10.0
RESUMED = "it began as a warm state of its image, and is itself by now"


def fit(host: Host, spec: InstanceSpec) -> str:
    """A hash of all that a guest of this kind finds here before it has interfaces, and of who runs it."""
    disks = tuple(domain.Disk(one.device, Path("/"), bus=one.bus, cdrom=one.cdrom) for one in spec.disks)
    accel, cpu = host.verdict.accel, host.verdict.cpu
    bare = domain.Domain("", "", replace(spec, uuid=""), Path("/"), accel, cpu, disks, ())
    about = list(domain.shape(domain.domain_xml(bare)).values())
    with host.hypervisor.calling() as connection:
        about += [str(connection.getLibVersion()), str(connection.getVersion())]
    if accel == "kvm":  # the guest has the machine's own processor, as its kernel lets it be seen
        seen = Path("/proc/cpuinfo").read_text()
        about += [os.uname().release, *re.findall("^(?:model name|flags).*", seen, re.MULTILINE)]
    return hashlib.blake2b("\n".join(about).encode(), digest_size=16).hexdigest()


class Warm:
    """Works for the guest's task."""

    def __init__(self, host: Host, uuid: str, disks: Disks, voice: Voice) -> None:
        self._host, self._uuid, self._disks, self._voice = host, uuid, disks, voice

    async def choose(self, spec: InstanceSpec) -> bool:
        """Whether it resumes, decided before its first start; or say why it boots, though it was offered that."""
        why = ""
        if spec.warm is None:
            return False
        if spec.arriving or spec.power is not Power.ON:
            why = "it moves, or is not to run"
        elif await self._host.do(fit, self._host, spec) != spec.warm.fit:
            why = "that is of another machine, version, or kind of guest"
        elif not await self._fetched(spec.warm.disk, spec.warm.memory):
            why = "that is not on this node yet, and fetched now"
        await self._disks.held.save(resumes=not why)
        if why:
            self._voice.event(f"it boots, and does not begin as a warm state: {why}")
        return not why

    async def _fetched(self, *digests: str) -> bool:
        images, until = self._host.images, time.monotonic() + _FETCH_S
        for digest in (digest for digest in digests if not images.complete(digest)):
            await images.tell("prefetch", image=digest)
        while not all(map(images.complete, digests)) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return all(map(images.complete, digests))

    def _image(self, digest: str) -> Path:
        if (path := self._host.images.complete(digest)) is None:
            raise Conflict("what it resumes as is not here any more")
        return path

    async def load(self, spec: InstanceSpec) -> None:
        """The domain waits for its memory: give it that. Raises Refused, Conflict, OSError."""
        assert spec.warm
        whose, memory = (self._host.hypervisor, self._uuid), self._image(spec.warm.memory)
        async with asyncio.timeout(_RENEW_S):  # whatever holds its qemu up ends with it
            await self._host.do(passing.restore, *whose, memory)

    async def renew(self, spec: InstanceSpec, taps: Taps, networks: Networks) -> None:
        """It runs: make it itself, then let its interfaces have a link. Raises Refused, Unavailable, TimeoutError."""
        self._voice.event("it runs, as a warm state of its image")
        async with asyncio.timeout(_RENEW_S):
            while not self._voice.agent_ready:
                await asyncio.sleep(0.005)
            renewed = identity.renew(self._host.hypervisor, spec, networks)
            both = await asyncio.gather(taps.plug(spec, networks, up=False), renewed, return_exceptions=True)
            for err in filter(None, both):
                raise err
        await taps.link(spec, up=True)

    async def resume(
        self, start: Callable[..., Awaitable[None]], spec: InstanceSpec, leaving: asyncio.Event
    ) -> bool:
        """Whether it runs by now, itself, if it was to; else it is to boot, of its own image.

        Raises Unavailable while libvirt cannot say that nothing of it runs: then all of this is done once more.
        """
        disks, disk = self._disks, spec.disks[0]
        if not disks.held.now.resumes or spec.warm is None:
            return False
        try:
            await disks.forget([disk.device])
            under = self._image(spec.warm.disk)
            await self._host.do(overlay.create, disks.overlay(disk.device), disk.size_bytes, under)
            await start(resumes=True)
        except (ComputeError, StoreError, NetError, OSError) as err:
            await self.give_up(spec, leaving, f"it could not resume: {str(err) or 'it took too long'}")
            return False
        self._voice.event(RESUMED)
        await disks.held.save(resumes=False)  # before it counts as up: from here on its disk is its own
        return True

    async def give_up(self, spec: InstanceSpec, leaving: asyncio.Event, why: str) -> None:
        """One that has not become itself yet is to boot whenever it starts, of its own image. Raises Unavailable."""
        disks = self._disks
        if disks.held.now.resumes:
            # Of a domain whose qemu dies under a question to the agent, libvirt 9.0 calls that broken for good.
            await self._host.do(self._host.hypervisor.remove, self._uuid)
            await disks.forget([disk.device for disk in spec.disks])
            await disks.make(spec, await disks.images(spec, leaving))
            self._voice.event(f"it boots, since {why}")
            await disks.held.save(resumes=False)
