"""Snapshots of running and stopped guests: real libvirtd, qemu and image service; the agent driven by the test."""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compute.agent.guest import capture
from compute.wire.spec import Capture, DiskSpec, InstanceSpec, Power
from imagestore import Digest, Store, open_store, pull, verify_image
from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.ending import passed
from tests.system.machine import Machine, within
from tests.system.test_agent import remove, says
from tests.system.test_lazy_boot import LazyBench

pytestmark = pytest.mark.system

COUNTER, PLACE = 16, 44 << 20
COUNT = f"""#!/bin/sh
# The same number on both disks, first on the first.
i=0
while true; do
    i=$((i + 1))
    for disk in vda vdb; do
        printf '%015d\\n' $i | dd of=/dev/$disk bs=512 seek={PLACE >> 9} conv=notrunc,sync,fsync 2>/dev/null
    done
    [ $i = 5 ] && echo SF-GUEST-COUNTS >/dev/ttyS0
done
"""


@pytest.fixture(scope="module")
def host() -> Iterator[PrivateHost]:
    with PrivateHost() as made:
        yield made


@pytest.fixture
def bench(
    host: PrivateHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[LazyBench]:
    monkeypatch.setenv("SF_ACCEL", "tcg")
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "index"))
    bench, well = LazyBench(host, tmp_path), passed(request)
    bench.desk.now = replace(bench.desk.now, stores={"my/system": bench.url})
    yield bench
    bench.end(well())


def counting(bench: LazyBench, image: Digest) -> InstanceSpec:
    disks = (DiskSpec("vda", str(image), size_bytes=64 << 20), DiskSpec("vdb", size_bytes=64 << 20))
    return bench.spec(image, disks=disks, memory_mib=192, user_data=COUNT.encode())


async def snapshot(bench: LazyBench, spec: InstanceSpec, uuid: str) -> Capture:
    """Order one, and wait for its end; afterwards it is not asked for any more."""
    bench.desk.want(replace(spec, snapshots=(Capture(uuid, {"of": spec.name}),)))
    status = await bench.desk.seen(lambda s: any(t.uuid == uuid for t in s.snapshots), spec.uuid)
    bench.desk.want(spec)
    await bench.desk.seen(lambda s: not s.snapshots, spec.uuid)
    return next(t for t in status.snapshots if t.uuid == uuid)


def numbers(store: Store, taken: Capture, directory: Path) -> list[int]:
    """What each disk counted at that moment."""
    found = []
    for device, stored in sorted(taken.digests.items()):
        digest, out = Digest.parse(stored), directory / f"{device}.out"
        assert not verify_image(store, digest).problems
        pull(store, digest, out, format_="raw")
        with out.open("rb") as file:
            found.append(int(os.pread(file.fileno(), COUNTER, PLACE) or 0))
        out.unlink()
    return found


def nodes(bench: LazyBench, spec: InstanceSpec) -> str:
    asked = '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'
    return bench.host.virsh("qemu-monitor-command", f"sf-{bench.installation}-{spec.uuid}", asked).stdout


def test_all_disks_of_a_running_guest_are_stored_as_they_were_at_one_moment(
    bench: LazyBench, tiny_image: Path
) -> None:
    async def story() -> None:
        base = bench.push(tiny_image)
        spec = counting(bench, base)
        store = open_store(bench.url)
        async with bench.agent() as agent:
            bench.desk.want(spec)
            await says(agent, spec, b"SF-GUEST-COUNTS")
            last = 0
            for number in range(4):
                taken = await snapshot(bench, spec, f"s{number}")
                assert taken.error == "" and taken.frozen
                first, second = numbers(store, taken, bench.directory)
                assert first in (second, second + 1) and first > last
                last = first
                assert store.manifest(Digest.parse(taken.digests["vda"])).parent == base
                assert (
                    taken.costs["new"] < 1 << 20 and taken.costs["read"] < 10 << 20 and not taken.note.strip()
                )
            assert "sf-" not in nodes(bench, spec).replace(f"sf-{bench.installation}", "")
            assert not list((bench.directory / "run").glob("snapshot*"))
            spec = replace(spec, power=Power.OFF)
            await bench.becomes("off", spec)
            off = await snapshot(bench, spec, "off")
            first, second = numbers(store, off, bench.directory)
            assert off.error == "" and first in (second, second + 1) and first > last
            olds = (replace(disk, image=off.digests[disk.device]) for disk in spec.disks)
            bench.desk.want(spec := replace(spec, disks=tuple(olds)))
            await bench.event("vda, vdb: restored")
            again = await snapshot(bench, spec, "restored")
            assert numbers(store, again, bench.directory) == [first, second]
            await remove(bench, spec)
        store.backend.close()
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_guest_that_is_off_is_stored_while_its_image_is_still_arriving(bench: LazyBench) -> None:
    bench.fill = "never"

    async def story() -> None:
        spec = bench.sector()
        async with bench.agent():
            await bench.becomes("on", spec)
            spec = replace(spec, power=Power.OFF)
            await bench.becomes("off", spec)
            taken = await snapshot(bench, spec, "off")
            figures = await bench.client.ask("figures", reader=f"{spec.uuid}-vda")
            assert figures["present_bytes"] < figures["data_bytes"] and taken.error == ""
            store = open_store(bench.url)
            assert store.manifest(Digest.parse(taken.digests["vda"])).parent == bench.digest
            store.backend.close()
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


@pytest.mark.drill
@pytest.mark.skipif(not drills.everything(), reason="one boot more, in scripts/test --all")
def test_a_scratch_that_is_full_ends_the_snapshot_and_not_the_guest(
    bench: LazyBench, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = capture.push_changed

    def slowly(*arguments: Any) -> Any:
        time.sleep(3)  # so long that the guest overwrites something
        return stored(*arguments)

    async def story() -> None:
        spec = counting(bench, bench.push(tiny_image))
        async with bench.agent() as agent:
            bench.desk.want(spec)
            await says(agent, spec, b"SF-GUEST-COUNTS")
            with monkeypatch.context() as patch:
                patch.setattr(capture, "push_changed", slowly)
                patch.setattr(capture, "_SCRATCH_SHARE", 1 << 60)
                full = await snapshot(bench, spec, "full")
            assert "no room" in full.error and not full.digests
            store = open_store(bench.url)
            before = numbers(store, await snapshot(bench, spec, "one"), bench.directory)
            assert before < numbers(store, await snapshot(bench, spec, "two"), bench.directory)
            store.backend.close()
            assert "sf-cbw" not in nodes(bench, spec)
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_snapshot_by_the_commands_is_an_image_that_another_guest_boots_from(
    host: PrivateHost, tmp_path: Path, tiny_image: Path
) -> None:
    machine = Machine(host, tmp_path, SF_ACCEL="tcg", SF_NODE_NAME="here")
    machine.sf("image", "push", str(tiny_image), "tiny:1")
    machine.start()
    script = tmp_path / "count.sh"
    script.write_text(COUNT)
    try:
        create = ["instance", "create", "--image", "tiny:1", "--memory", "192"]
        machine.sf(
            *create, "web", "--disk", "1G", "--disk", "1G", "--user-data", str(script), "--wait", "boot"
        )
        within(120, lambda: "SF-GUEST-COUNTS" in machine.sf("instance", "console", "web").stdout, "it counts")
        made = [machine.listed("instance", "snapshot", "web") for _ in range(2)]
        assert all(one["state"] == "created" and one["frozen"] and one["new"] < 2 << 20 for one in made)
        assert made[0]["images"].keys() == {"vda", "vdb"} and made[0]["name"].startswith("my/web:")
        assert [one["name"] for one in machine.listed("instance", "snapshots", "web")] == [
            one["name"] for one in reversed(made)
        ]
        machine.sf(
            "instance", "create", "--image", made[0]["name"], "--memory", "192", "web2", "--wait", "boot"
        )
        history = machine.sf("instance", "events", "web").stdout
        assert "snapshot is web:" in history
        machine.sf("instance", "stop", "web", "--force")
        still = machine.listed("instance", "snapshot", "web")
        assert still["state"] == "created" and still["images"].keys() == {"vda", "vdb"}
        machine.sf("instance", "start", "web")
        machine.sf("instance", "restore", "web", made[1]["name"], "--force")
        named = [one["name"] for one in machine.listed("instance", "snapshots", "web")]
        assert len(named) == 4 and named[1] == still["name"]
        within(
            120, lambda: machine.instance("web")["disks"][0]["base"] == made[1]["name"], "its disks change"
        )
        within(
            120, lambda: "restored" in machine.sf("instance", "events", "web").stdout, "they are made anew"
        )
        within(120, lambda: "SF-GUEST-COUNTS" in machine.sf("instance", "console", "web").stdout, "it counts")
        within(60, lambda: machine.instance("web")["power_state"] == "on", "it runs")
        machine.sf("backup", "set", "web", "--every", "1d", "--keep-daily", "1")
        within(60, lambda: machine.listed("backup", "ls")[0]["last_s"] > 0, "the first is due at once")
        second = machine.listed("backup", "run", "web")
        assert [one["name"] for one in machine.listed("backup", "show", "web")] == [second["name"]]
        machine.sf("backup", "delete", "web", second["name"], "--force")
        assert machine.listed("backup", "show", "web") == []
        machine.sf("instance", "delete", "web", "web2", "--force", "--wait")
    finally:
        machine.signal(2)
