"""A guest that needs a lease, with a real libvirtd and qemu: its power is taken by who keeps the lease."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute.agent.memory import cut, now_s
from scripts.private_libvirtd import PrivateHost
from tests.ending import passed
from tests.system.test_agent import Bench, remove

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Bench]:
    monkeypatch.setenv("SF_ACCEL", "tcg")
    well = passed(request)
    with PrivateHost() as host:
        bench = Bench(host, tmp_path)
        yield bench
        bench.end(well())


def test_a_guest_whose_lease_ended_starts_under_the_next_one_and_not_before(bench: Bench) -> None:
    """Its power is taken by who keeps the lease, and its owner is told nothing; a crash under a lease is a crash."""

    async def story() -> None:
        spec = bench.spec(leased_s=5.0)
        async with bench.agent() as agent:
            await bench.boot(agent, spec)
            assert (await bench.desk.seen(lambda s: s.leased_s == 5.0, spec.uuid)).power_state == "on"
            first, bench.leased_s = bench.qemu(spec), math.inf
            assert cut({spec.uuid}) == {spec.uuid}
            async with asyncio.timeout(60):
                while not any("its power was taken" in event.message for event in bench.desk.events):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(3)  # it is tried again each second
            assert "shut off" in bench.host.virsh("domstate", spec.uuid).stdout
            assert {s.power_state for s in bench.desk.statuses} <= {"on", "off", "transition-to-on"}
            bench.desk.statuses.clear()
            bench.leased_s = now_s()
            await bench.desk.seen(lambda s: s.power_state == "on", spec.uuid)
            assert bench.qemu(spec) != first
        bench.leased_s = math.inf
        cut({spec.uuid})
        async with asyncio.timeout(60):  # a lease comes back seconds later: by then libvirt has seen its end
            while "shut off" not in bench.host.virsh("domstate", spec.uuid).stdout:
                await asyncio.sleep(0.05)
        async with bench.agent() as agent:  # of a node that has been away, and had its lease back at once
            bench.leased_s = now_s()
            async with asyncio.timeout(60):
                while [event.message for event in bench.desk.events].count("started") < 3:
                    await asyncio.sleep(0.05)
            assert cut({spec.uuid}) == {spec.uuid}
            await bench.desk.seen(lambda s: s.power_state == "crashed", spec.uuid)
            bench.desk.want()
            await bench.desk.orphans((spec.uuid, "off"))
            await remove(bench, spec)

    asyncio.run(story())
