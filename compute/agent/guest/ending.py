"""How a guest comes to be off: asked to and in time, by its power being taken, or by itself."""

import asyncio
import time
from collections.abc import Callable

from compute.agent.guest import channel
from compute.agent.guest.host import Host, Voice
from compute.agent.guest.record import Course, Part, Phase
from compute.agent.guest.taps import Taps
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import DomainState
from compute.agent.memory import now_s
from compute.wire.spec import InstanceSpec, Power

_AGAIN_S, _HEEDED_S = 10.0, 600.0  # one that ends so long after it was asked to, ends because it was asked


class Ending:
    """Works for the guest's task, on whose course it writes what came of it."""

    def __init__(
        self, host: Host, uuid: str, course: Part[Course], taps: Taps, voice: Voice, wake: Callable[[], None]
    ) -> None:
        self._host, self._uuid, self._course = host, uuid, course
        self._taps, self._voice, self._wake = taps, voice, wake
        self._pressed_s, self.seen_s = 0.0, 0.0
        self.quiet_s = 0.0  # when it was seen to be as it is wanted; 0: something is left to do

    async def observe(self, spec: InstanceSpec) -> DomainState:
        """What libvirt says; a guest that was up and is off by itself is noted as ended, unless it had no lease."""
        looked_s = now_s()
        state = await self._host.do(self._host.hypervisor.state, self._uuid)
        if state.power == "off" and self._course.now.phase is Phase.UP:
            why = domain.why_ended(state.ended, self._host.installation, self._uuid)
            heeded = spec.power is Power.ON and time.time() < self._course.now.asked_s + _HEEDED_S
            if state.ended == "unknown":  # libvirtd knows nothing of its end: the machine was rebooted
                await self._course.save(phase=Phase.STARTING)
            elif spec.leased_s and state.ended != "halted" and self._host.leased_s() > self.seen_s:
                await self._course.save(phase=Phase.STARTING)
                self._voice.event("its power was taken: without the server another node may have it")
            elif state.ended == "halted" and heeded:
                await self._course.save(phase=Phase.STARTING, asked_s=0)
                self._voice.event("the guest ended as it was asked to, and is wanted on by now")
            else:
                await self._course.save(phase=Phase.ENDED, message=why, crashed=why.startswith("qemu"))
                await self._taps.remove()
                self._voice.event(why)
        elif state.power != "off":
            self.seen_s = looked_s
        self.quiet_s = looked_s if state == DomainState(spec.power) and self._taps.plugged(spec) else 0.0
        return state

    async def come(self, spec: InstanceSpec, state: DomainState) -> bool:
        """Whether one that is to be off is, or its power may be taken; else it was asked, and is asked again later."""
        if state.power == "off" or not spec.grace_s or self._course.now.phase is not Phase.UP:
            return True
        now, hypervisor = time.time(), self._host.hypervisor
        if not self._course.now.asked_s:
            await self._course.save(asked_s=now)
            self._voice.event(f"asked the guest to end; its power is taken after {spec.grace_s} s")
            self._pressed_s = 0.0
        left_s = min(spec.grace_s, self._course.now.asked_s + spec.grace_s - now)
        if left_s <= 0:
            self._voice.event(f"the guest did not end within {spec.grace_s} s")
            return True
        if time.monotonic() >= self._pressed_s + _AGAIN_S:
            self._pressed_s = time.monotonic()
            await self._host.do(hypervisor.resume, self._uuid)
            await self._host.do(hypervisor.press_power, self._uuid)
            channel.POOL.submit(hypervisor.ask_agent_to_end, self._uuid)
        asyncio.get_running_loop().call_later(min(left_s, _AGAIN_S), self._wake)
        return False

    async def take_power(self) -> None:
        """It is off, as it is to be."""
        await self._host.do(self._host.hypervisor.destroy, self._uuid)
        await self._taps.remove()
        await self._course.save(phase=Phase.OFF, created=True, message="", crashed=False)
        self._voice.event("powered off")
