"""A snapshot meets what else happens to its disks: a store that goes away, the move to the complete file, growth."""

import asyncio
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from compute.agent.agent import Agent
from compute.wire.spec import Capture, DiskSpec, InstanceSpec
from imagestore import Digest, open_store, verify_image, verify_store
from tests import drills
from tests.system.test_agent import remove, says
from tests.system.test_lazy_boot import LazyBench
from tests.system.test_snapshots import bench as bench
from tests.system.test_snapshots import host as host
from tests.web import nginx

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not drills.everything(), reason="minutes, in scripts/test --all"),
]

PLACE = 42 << 20
"""In the middle of what `push_larger` adds, which no boot reads."""
COUNT = f"""#!/bin/sh
i=0
while true; do
    i=$((i + 1))
    printf '%015d\\n' $i | dd of=/dev/vda bs=512 seek={PLACE >> 9} conv=notrunc,sync,fsync 2>/dev/null
    echo "SF-COUNT $i" >/dev/ttyS0
done
"""


async def count(agent: Agent, spec: InstanceSpec) -> int:
    found = re.findall(rb"SF-COUNT (\d+)", await agent.operations.console(spec.uuid, -1))
    return int(found[-1]) if found else 0


async def counts_on(agent: Agent, spec: InstanceSpec, what: str) -> None:
    began, deadline = await count(agent, spec), asyncio.get_running_loop().time() + 60
    while await count(agent, spec) < began + 5:
        assert asyncio.get_running_loop().time() < deadline, f"the guest does not write on: {what}"
        await asyncio.sleep(0.2)


async def ended(bench: LazyBench, spec: InstanceSpec, uuid: str) -> Capture:
    """What became of a snapshot that was ordered; it is not asked for any more."""
    async with asyncio.timeout(300):
        while True:
            taken = [one for s in bench.desk.statuses if s.uuid == spec.uuid for one in s.snapshots]
            if found := [one for one in taken if one.uuid == uuid]:
                bench.desk.want(spec)
                return found[-1]
            await asyncio.sleep(0.05)


def test_a_store_cut_off_in_a_snapshot_of_a_guest_whose_image_is_arriving_ends_it_and_not_the_guest(
    bench: LazyBench, tiny_image: Path
) -> None:
    bench.fill, away = "never", bench.directory / "away"

    async def story() -> None:
        base = bench.push_larger(tiny_image)
        disk = DiskSpec("vda", str(base), size_bytes=64 << 20)
        spec = bench.spec(base, disks=(disk,), memory_mib=192, user_data=COUNT.encode())
        store = open_store(bench.url)
        closed = f"if (-f {away}) {{ return 503; }}"
        with nginx(bench.directory / "store", bench.directory / "nginx", closed) as bench.url:
            async with bench.agent() as agent:
                bench.desk.want(spec)
                await says(agent, spec, b"SF-GUEST-READY")
                await counts_on(agent, spec, "before")
                away.touch()  # for the image service; and, for who reads or writes the namespace's own store:
                (bench.directory / "store").rename(bench.directory / "elsewhere")
                bench.desk.want(replace(spec, snapshots=(Capture("cut", {"of": "web"}),)))
                for _ in range(4):
                    await counts_on(agent, spec, "while the store is away")
                cut = await ended(bench, spec, "cut")
                assert cut.error and not cut.digests
                await counts_on(agent, spec, "after it")
                assert "sf-cbw" not in nodes(bench, spec)
                (bench.directory / "elsewhere").rename(bench.directory / "store")
                away.unlink()
                bench.desk.want(replace(spec, snapshots=(Capture("again", {"of": "web"}),)))
                again = await ended(bench, spec, "again")
                assert (
                    again.error == "" and not verify_image(store, Digest.parse(again.digests["vda"])).problems
                )
                await counts_on(agent, spec, "in the end")
                await remove(bench, spec)
            await bench.service_is_gone()
        assert not list((bench.directory / "run").glob("snapshot*"))
        store.backend.close()

    asyncio.run(story())


def nodes(bench: LazyBench, spec: InstanceSpec) -> str:
    asked = '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'
    return bench.host.virsh("qemu-monitor-command", f"sf-{bench.installation}-{spec.uuid}", asked).stdout


def test_snapshot_move_and_growth_of_one_disk_at_any_moment_all_happen(bench: LazyBench) -> None:
    """Each pair of the three, the image's end at a random moment of the snapshot."""
    rng = random.Random(drills.seed())

    async def story() -> None:
        bench.arguments = ("--fill-rate", "6M")
        store = open_store(bench.url)
        async with bench.agent() as agent:
            for number in range(drills.rounds(20)):
                bench.desk.events.clear()
                spec = bench.sector()
                spec = replace(spec, disks=(replace(spec.disks[0], size_bytes=64 << 20),))
                bench.desk.want(spec)
                await says(agent, spec, b"HELLO")
                orders = ["snapshot", "growth", "snapshot"]
                rng.shuffle(orders)
                wanted, uuids = spec, list[str]()
                for order in orders:
                    await asyncio.sleep(rng.uniform(0, 1.0))
                    if order == "growth":
                        wanted = replace(wanted, disks=(replace(wanted.disks[0], size_bytes=128 << 20),))
                    else:
                        uuids.append(f"{number}-{len(uuids)}")
                        taken = (*wanted.snapshots, Capture(uuids[-1], {"of": "web"}))
                        wanted = replace(wanted, snapshots=taken)
                    bench.desk.want(wanted)
                for uuid in uuids:
                    async with asyncio.timeout(120):
                        while not (found := taken_of(bench, spec, uuid)):
                            await asyncio.sleep(0.05)
                    assert found[-1].error == "", f"round {number}, {orders}: {found[-1].error}"
                    assert not verify_image(store, Digest.parse(found[-1].digests["vda"])).problems
                await bench.event("the image is complete and read directly now")
                name = f"sf-{bench.installation}-{spec.uuid}"
                async with asyncio.timeout(60):
                    while f"{128 << 20}" not in bench.host.virsh("domblkinfo", name, "vda").stdout:
                        await asyncio.sleep(0.2)
                assert "sf-cbw" not in nodes(bench, spec)
                bench.desk.want(replace(wanted, snapshots=()))
                await remove(bench, spec)
                await bench.client.ask("prune", limit_bytes=0)
        await bench.service_is_gone()
        assert not verify_store(store, full=True).problems
        store.backend.close()

    asyncio.run(story())


def taken_of(bench: LazyBench, spec: InstanceSpec, uuid: str) -> list[Capture]:
    told = (one for status in bench.desk.statuses if status.uuid == spec.uuid for one in status.snapshots)
    return [one for one in told if one.uuid == uuid]
