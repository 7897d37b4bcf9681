"""A guest's start that takes long, and what its node is told meanwhile."""

import asyncio
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from compute.agent.guest.disks import Leaving
from compute.agent.guest.guest import Guest
from compute.agent.guest.host import Host
from compute.agent.guest.record import Phase
from compute.agent.hypervisor import nodes, passing
from compute.agent.hypervisor.libvirt import DomainState, Refused
from compute.agent.image_service import Backing
from compute.errors import Unavailable
from compute.wire.spec import Capture, DiskSpec, InstanceSpec, Power, Warm

UUID = "11111111-0000-4000-8000-000000000001"
SPEC = InstanceSpec(UUID, "web", "system", 1, 16, (DiskSpec("vda", "b3:" + 64 * "1"),), leased_s=5.0)


def guest(directory: Path) -> tuple[Any, Any, asyncio.Event]:
    """On a host that does nothing; its images come with the event."""

    async def do(call: Any, *args: Any, **named: Any) -> Any:
        return call(*args, **named)

    async def backing(*_: object) -> Backing:
        await came.wait()
        return Backing(directory, 512)

    host, came = MagicMock(directory=directory, do=do, leased_s=lambda: 0.0), asyncio.Event()
    host.check_lease = partial(Host.check_lease, host)
    host.images.backing = backing
    made: Any = Guest(host, SPEC)
    whole = made._disks.images
    made._taps, made._disks, made.console = AsyncMock(), AsyncMock(images=whole), MagicMock()
    made._disks.begin.return_value = ()
    return made, host.hypervisor, came


@pytest.mark.parametrize("known", [True, False])
def test_what_others_may_have_by_now_does_not_run_however_far_its_start_was(
    tmp_path: Path, known: bool
) -> None:
    async def story() -> None:
        made, hypervisor, came = guest(tmp_path)
        came.set()
        made._disks.hold = AsyncMock(side_effect=lambda *_: made.update(SPEC if known else None, {}))
        if known:
            await made._start()
        else:
            with pytest.raises(Unavailable):
                await made._start()
        assert hypervisor.start_paused.called and hypervisor.resume.called == known
        assert hypervisor.destroy.call_count == (1 if known else 2)

    asyncio.run(story())


def test_a_start_that_waits_for_an_image_ends_once_nobody_knows_the_guest(tmp_path: Path) -> None:
    """Its node could not say what it has, and would be refused by all others, for as long as no image comes."""

    async def story() -> None:
        made, hypervisor, came = guest(tmp_path)
        starting = asyncio.create_task(made._start())
        await asyncio.sleep(0.01)
        made.update(None, {})
        with pytest.raises(Leaving):
            await asyncio.wait_for(starting, 30)
        made.update(SPEC, {})  # it is this node's after all
        came.set()
        await made._start()
        assert hypervisor.resume.call_count == 1

    asyncio.run(story())


@pytest.mark.parametrize(
    "phase, power, said",
    [
        (Phase.STARTING, Power.ON, "transition-to-on"),
        (Phase.OFF, Power.ON, "transition-to-on"),
        (Phase.OFF, Power.OFF, "off"),
        (Phase.ENDED, Power.ON, "off"),
    ],
)
def test_a_guest_that_waits_for_its_turn_is_not_off_by_itself(
    tmp_path: Path, phase: Phase, power: Power, said: str
) -> None:
    """If its node is lost once more just then, it comes back elsewhere all the same."""
    made, hypervisor, _ = guest(tmp_path)
    hypervisor.state.return_value = DomainState("off", "unknown")
    made.update(replace(SPEC, power=power), {})
    made._course.now = replace(made.record, spec=made.spec, phase=phase, created=True)
    made._disks.held.now.arrived = {}
    asyncio.run(made._report())
    assert made.host.publish.call_args.args[0].power_state == said


@pytest.mark.parametrize("ended, phase", [("crashed", Phase.STARTING), ("halted", Phase.ENDED)])
def test_a_guest_that_powered_itself_off_while_no_agent_looked_is_not_started_for_its_lease(
    tmp_path: Path, ended: str, phase: Phase
) -> None:
    """What takes the power of those without a lease kills them: they do not end in order."""
    made, hypervisor, _ = guest(tmp_path)
    made.host.leased_s = lambda: 1000.0  # gained anew, by an agent that has just started
    hypervisor.state.return_value = DomainState("off", ended)
    made._course.now = replace(made.record, phase=Phase.UP, created=True)
    made._ending._taps = made._taps
    asyncio.run(made._ending.observe(SPEC))
    assert made.record.phase is phase


def test_a_guest_that_is_stopped_before_it_is_itself_boots_when_it_is_started(tmp_path: Path) -> None:
    """It counts as made from then on, and is handed to whoever asks for its agent as soon as it runs."""
    made, hypervisor, came = guest(tmp_path)
    came.set()
    hypervisor.state.return_value = DomainState("off", "unknown")
    made._disks, made.host.images.gone = made._warm._disks, AsyncMock()
    made.update(replace(SPEC, power=Power.OFF, warm=Warm("b3:" + 64 * "2", "b3:" + 64 * "3", "")), {})
    made._course.now, made._recorded = replace(made.record, spec=made.spec, phase=Phase.STARTING), True

    async def story() -> None:
        await made._disks.held.save(resumes=True)
        await made._settle()

    asyncio.run(story())
    assert made.record.phase is Phase.OFF and made.record.created
    assert not made._disks.held.now.resumes and made._disks.overlay("vda").exists()


def test_of_memory_a_part_of_the_room_is_kept_at_most_and_nothing_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, hypervisor, _ = guest(tmp_path)
    memory = made._captures._memory
    memory.parent.mkdir()
    hypervisor.hand_over = lambda _, end: os.close(end) if os.write(end, b"x" * 5000) else None
    hypervisor.qmp.return_value = {"status": "completed"}
    passing.keep(hypervisor, UUID, memory)
    assert memory.stat().st_size == 8192
    hypervisor.destroy.reset_mock()
    monkeypatch.setattr(passing, "_SHARE", 1 << 62)
    monkeypatch.setattr(nodes, "end", lambda *_: None)
    with pytest.raises(Refused, match="0 MiB"):
        passing.keep(hypervisor, UUID, memory)
    assert not hypervisor.destroy.called

    async def story() -> None:
        await made._captures._take_away()
        assert memory.exists()  # what was cut off is begun anew
        await made._captures._take_away(Capture("c"))

    asyncio.run(story())
    assert not list(memory.parent.glob("memory*"))
