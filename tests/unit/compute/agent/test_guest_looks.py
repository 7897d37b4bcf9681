"""How often a guest is looked at of which nobody says anything."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compute.agent.guest import disks
from compute.agent.guest.guest import Guest
from compute.agent.guest.host import Host
from compute.agent.guest.record import Phase
from compute.agent.hypervisor.libvirt import FULL, DomainState
from compute.wire.spec import InstanceSpec, InterfaceSpec

SPEC = InstanceSpec("11111111-0000-4000-8000-000000000001", "web", "system", 1, 16, ())
LAN = InterfaceSpec("22222222-0000-4000-8000-000000000002", "lan", "02:00:00:00:00:02", "10.0.0.2")


class Domains:
    """A hypervisor with one guest, which is as it was set."""

    now = DomainState("on")

    def state(self, _: str) -> DomainState:
        return self.now

    def agent_ready(self, _: str) -> bool:
        return False

    def xml(self, _: str) -> str:
        return "<domain/>"


def test_one_with_something_left_to_do_is_looked_at_at_each_turn_another_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_ROOM_BYTES", 1 << 80)  # so much is never free

    async def story(pool: ThreadPoolExecutor) -> None:
        domains, lock, deaf = Domains(), asyncio.Lock(), lambda _: None
        stood_in: Any = ("0.0.0.0", domains, None, lock, None, "tcg", pool, deaf, deaf, deaf)
        guest = Guest(Host("here", "", "", tmp_path, *stood_in), SPEC)
        await guest._course.save(spec=SPEC, phase=Phase.UP, created=True)
        await guest.load()

        async def again(spec: InstanceSpec = SPEC) -> bool:
            """Whether it is looked at again at the next turn."""
            guest.spec = spec
            await guest._attempt()
            guest._wake.clear()
            guest.wake("figures")
            return guest._wake.is_set()

        assert not await again()
        domains.now = DomainState("paused", reason=FULL)
        assert await again(), "nobody says when its file system has room again"
        domains.now = DomainState("on")
        assert not await again()
        assert await again(replace(SPEC, interfaces=(LAN,))), "its network may come to this node later"
        assert not await again()

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(story(pool))
