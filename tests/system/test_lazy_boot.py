"""Guests that run before their image has arrived, and move to it when it has; real libvirtd, qemu and image service."""

import asyncio
import contextlib
import fcntl
import filecmp
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pycdlib
import pytest

from compute.agent.agent import Agent
from compute.agent.guest.overlay import snapshots
from compute.agent.hypervisor import domain
from compute.agent.hypervisor import libvirt as libvirt_adapter
from compute.agent.image_service import Backing, ServedImages, Settings
from compute.errors import NotFound, Unavailable
from compute.wire.spec import Capture, DiskSpec, InstanceSpec, Power
from imagestore.cache.control import ControlClient
from imagestore.cache.imaged import control_socket
from imagestore.cache.images import ImageCache
from imagestore.cache.open_images import Options
from imagestore.errors import StoreError
from imagestore.formats.digest import Digest
from imagestore.push import push
from imagestore.store.open import open_store
from scripts.private_libvirtd import PrivateHost
from tests.drills import everything, rounds, seed
from tests.ending import passed
from tests.system.boot_sector import boot_sector
from tests.system.test_agent import Bench, NoNetworks, remove, says
from tests.web import nginx

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def host() -> Iterator[PrivateHost]:
    with PrivateHost() as made:
        yield made


class LazyBench(Bench):
    """A node with a store, and an image service started by its agent."""

    def __init__(self, host: PrivateHost, directory: Path) -> None:
        super().__init__(host, directory)
        self.url = (directory / "store").as_uri()
        # Boots at once and then sits there, however slow the machine is.
        disk = directory / "sector.raw"
        disk.write_bytes(boot_sector("HELLO\r\n").ljust(65536, b"\0") + random.Random(1).randbytes(12 << 20))
        self.digest = self.push(disk)
        self.client = ControlClient(control_socket(directory))
        self.options = Options()
        self.fill = "now"

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        settings = Settings(lambda: (self.url,), self.fill, 60.0, self.options)
        images = ServedImages(ImageCache(self.directory / "cache", {}), self.directory, settings)
        agent = Agent(self.desk, "here", self.directory, NoNetworks(), images, self.host.uri)
        running = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def push(self, image: Path) -> Digest:
        store = open_store(self.url, create=True)
        digest = push(store, image, image.stem).digest
        store.backend.close()
        return digest

    def push_larger(self, image: Path) -> Digest:
        """With 4 MiB that no boot reads: it stays incomplete until somebody fills it."""
        larger = self.directory / "larger.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", image, larger], check=True)
        with larger.open("ab") as file:
            file.write(random.Random(2).randbytes(4 << 20))
        return self.push(larger)

    def sector(self) -> InstanceSpec:
        return self.spec(self.digest)

    async def pid(self) -> int:
        return int((await self.client.ask("ls"))["pid"])

    async def event(self, text: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(90):
                while not any(text in event.message for event in self.desk.events):
                    await asyncio.sleep(0.05)
            return
        raise AssertionError(f"no event {text!r}: {[event.message for event in self.desk.events]}")

    def live_disk(self, spec: InstanceSpec) -> str:
        name = domain.name(self.installation, spec.uuid)
        return domain.source_of(self.host.virsh("dumpxml", name).stdout, "vda")

    async def service_is_gone(self) -> None:
        # One that was killed leaves its socket behind, not its lock.
        async with asyncio.timeout(20):
            while control_socket(self.directory).exists() and self.service_runs():
                await asyncio.sleep(0.05)

    def service_runs(self) -> bool:
        with (self.directory / "cache" / ".service").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


@pytest.fixture
def bench(
    host: PrivateHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[LazyBench]:
    monkeypatch.setenv("SF_ACCEL", "tcg")
    bench, well = LazyBench(host, tmp_path), passed(request)
    yield bench
    bench.end(well())


def test_a_linux_guest_reads_on_while_it_is_moved_to_the_complete_file(
    bench: LazyBench, tiny_image: Path
) -> None:
    bench.options = Options(fill_bytes_s=4 << 20)

    async def story() -> None:
        spec = _with(bench.spec(bench.push(tiny_image)), memory_mib=192)
        async with bench.agent() as agent:
            await bench.becomes("on", spec)
            assert bench.live_disk(spec).endswith("/vda.qcow2")
            await bench.event("the image is complete and read directly now")
            directory = bench.directory / "instances" / spec.uuid
            assert bench.live_disk(spec) == str(directory / "vda.2.qcow2")
            assert not (directory / "vda.qcow2").exists()
            assert not list((bench.directory / "run" / "nbd").iterdir())
            os.kill(await bench.pid(), signal.SIGKILL)
            async with asyncio.timeout(240):
                while b"SF-GUEST-READY" not in await agent.operations.console(spec.uuid, -1):
                    await asyncio.sleep(0.2)
            status = await bench.desk.seen(lambda s: "image_bytes" in s.extra, spec.uuid)
            assert status.extra["image_bytes"]["vda"]["received"]["store"] > 1 << 20
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_guest_with_a_blank_disk_boots_from_a_cd_rom_that_is_still_arriving(bench: LazyBench) -> None:
    """Read only, never moved, in no snapshot; the next start reads the whole file."""
    bench.fill, iso, sector = "never", pycdlib.PyCdlib(), boot_sector("HELLO\r\n")[:2048]
    iso.new()
    iso.add_fp(io.BytesIO(sector), len(sector), "/BOOT.;1")
    iso.add_fp(io.BytesIO(random.Random(3).randbytes(8 << 20)), 8 << 20, "/MORE.;1")
    iso.add_eltorito("/BOOT.;1", boot_load_size=4)
    path = bench.directory / "install.raw"
    iso.write(str(path))

    async def story() -> None:
        blank = DiskSpec("vda", size_bytes=1 << 20)
        cdrom = DiskSpec("vdb", str(bench.push(path)), bus="sata", cdrom=True)
        spec = _with(bench.spec(), disks=(blank, cdrom))
        bench.desk.now = replace(bench.desk.now, stores={"my/system": bench.url})
        async with bench.agent() as agent:
            await bench.boot(agent, spec)
            shown = ET.fromstring(
                bench.host.virsh("dumpxml", domain.name(bench.installation, spec.uuid)).stdout
            )
            (found,) = shown.iterfind("devices/disk[@device='cdrom']")
            assert (
                found.find("readonly") is not None
                and found.find("backingStore/source").get("protocol") == "nbd"
            )
            bench.desk.want(_with(spec, snapshots=(Capture("0" * 32),)))
            ended = await bench.desk.seen(lambda s: bool(s.snapshots), spec.uuid)
            assert ended.snapshots[0].digests.keys() == {"vda"}, ended
            await bench.becomes("off", _with(spec, power=Power.OFF))
            await bench.boot(agent, spec)
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_moved_disk_stays_where_it_is_when_its_guest_starts_again(bench: LazyBench) -> None:
    bench.options = Options(fill_bytes_s=8 << 20)

    async def story() -> None:
        spec = bench.sector()
        directory = bench.directory / "instances" / spec.uuid
        async with bench.agent():
            bench.desk.want(spec)
            await bench.event("the image is complete and read directly now")
            await bench.becomes("off", _with(spec, power=Power.OFF))
            await bench.becomes("on", spec)
            assert bench.live_disk(spec) == str(directory / "vda.2.qcow2")
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def _with(spec: InstanceSpec, **changes: object) -> InstanceSpec:
    return replace(spec, **changes)  # type: ignore[arg-type]


def test_guests_agent_and_service_end_and_come_back_in_any_order(bench: LazyBench) -> None:
    bench.fill = "never"

    async def story() -> None:
        spec = bench.sector()
        async with bench.agent():
            await bench.becomes("on", spec)
            first = await bench.pid()
        assert await bench.pid() == first  # it stays for its guest
        os.kill(first, signal.SIGKILL)
        async with bench.agent() as agent:
            await says(agent, spec, b"HELLO")
            async with asyncio.timeout(60):
                while not await _answers(bench):
                    await asyncio.sleep(0.05)
            assert await bench.pid() != first
            figures = await bench.client.ask("figures", reader=f"{spec.uuid}-vda")
            assert 0 < figures["present_bytes"] < figures["data_bytes"]
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_guest_that_is_deleted_while_the_service_is_away_does_not_keep_the_next_one(
    bench: LazyBench,
) -> None:
    bench.fill = "never"

    async def story() -> None:
        spec = bench.sector()
        async with bench.agent():
            await bench.becomes("on", spec)
            os.kill(await bench.pid(), signal.SIGKILL)
            await remove(bench, spec)  # sooner than the service is started again
            async with asyncio.timeout(60):
                while not await _answers(bench) or list((bench.directory / "cache" / "readers").iterdir()):
                    await asyncio.sleep(0.1)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_service_that_is_killed_between_its_answer_and_the_guests_start_fails_no_guest(
    bench: LazyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = 0

    class Killed(ServedImages):
        async def backing(self, reader: str, digest: str) -> Backing:
            nonlocal answers
            found = await super().backing(reader, digest)
            answers += 1
            if answers == 2:  # the first one is for making the overlay
                os.kill(await bench.pid(), signal.SIGKILL)
            return found

    monkeypatch.setattr(sys.modules[__name__], "ServedImages", Killed)
    bench.fill = "never"

    async def story() -> None:
        spec = bench.sector()
        async with bench.agent() as agent:
            bench.desk.want(spec)
            await says(agent, spec, b"HELLO")
            assert answers == 3
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_store_that_is_away_while_a_guest_is_made_is_waited_for(
    bench: LazyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away for two whole attempts: an error would have been for good."""
    refused, away = 0, bench.directory / "away"
    away.touch()

    class Away(ServedImages):
        async def backing(self, reader: str, digest: str) -> Backing:
            nonlocal refused
            try:
                return await super().backing(reader, digest)
            except Unavailable:
                if (refused := refused + 1) == 2:
                    away.unlink()
                raise

    monkeypatch.setattr(sys.modules[__name__], "ServedImages", Away)

    async def story() -> None:
        spec = bench.sector()
        closed = f"if (-f {away}) {{ return 503; }}"
        with nginx(bench.directory / "store", bench.directory / "nginx", closed) as bench.url:
            async with bench.agent() as agent:
                bench.desk.want(spec)
                await says(agent, spec, b"HELLO")
                assert refused >= 2
                await remove(bench, spec)
            await bench.service_is_gone()

    asyncio.run(story())


async def _answers(bench: LazyBench) -> bool:
    with contextlib.suppress(StoreError):
        return bool(await bench.pid())
    return False


@pytest.mark.drill
def test_the_service_is_killed_all_the_time_and_a_linux_guest_comes_up_every_time(
    bench: LazyBench, tiny_image: Path
) -> None:
    async def story() -> None:
        bench.digest = bench.push(tiny_image)
        bench.fill = "never"
        source, complete = (
            bench.directory / "source.raw",
            bench.directory / "cache" / f"{bench.digest.hex()}.raw",
        )
        subprocess.run(["qemu-img", "convert", "-O", "raw", tiny_image, source], check=True)
        kills = 0
        async with bench.agent() as agent:
            while kills < rounds(full=30):
                spec = _with(bench.sector(), memory_mib=192)
                bench.desk.want(spec)
                most = kills + 10  # then it is left alone, or a slow machine would boot for ever
                async with asyncio.timeout(400):
                    while b"SF-GUEST-READY" not in await _console(agent, spec):
                        with contextlib.suppress(StoreError, ProcessLookupError):
                            if kills < most:
                                os.kill(await bench.pid(), signal.SIGKILL)
                                kills += 1
                        await asyncio.sleep(random.uniform(0.2, 1.5))
                    while not complete.exists():
                        with contextlib.suppress(StoreError):
                            await bench.client.ask("prefetch", image=str(bench.digest))
                        await asyncio.sleep(0.1)
                assert filecmp.cmp(complete, source, shallow=False)
                await remove(bench, spec)
                for path in (bench.directory / "cache").glob(f"{bench.digest.hex()}*"):
                    path.unlink()
        await bench.service_is_gone()

    asyncio.run(story())


async def _console(agent: Agent, spec: InstanceSpec) -> bytes:
    with contextlib.suppress(NotFound):
        return await agent.operations.console(spec.uuid, -1)
    return b""


def test_a_disk_with_a_snapshot_is_moved_at_the_next_start_and_keeps_it(bench: LazyBench) -> None:
    bench.fill = "never"

    async def story() -> None:
        spec = bench.sector()
        name = domain.name(bench.installation, spec.uuid)
        overlay = bench.directory / "instances" / spec.uuid / "vda.qcow2"
        async with bench.agent() as agent:
            bench.desk.want(spec)
            await says(agent, spec, b"HELLO")
            nodes = bench.host.virsh("qemu-monitor-command", name, '{"execute": "query-named-block-nodes"}')
            found = json.loads(nodes.stdout)["return"]
            file = next(n["node-name"] for n in found if n["drv"] == "file" and n["file"] == str(overlay))
            asked = {"device": file.replace("storage", "format"), "name": "before"}
            command = {"execute": "blockdev-snapshot-internal-sync", "arguments": asked}
            bench.host.virsh("qemu-monitor-command", name, json.dumps(command))
            await bench.client.ask("prefetch", image=str(bench.digest))
            await bench.event("read directly from the next start on, since the disk has snapshots")
            assert bench.live_disk(spec) == str(overlay) and list((bench.directory / "run" / "nbd").iterdir())
            await restart(bench, spec)
            assert bench.live_disk(spec) == str(overlay) and reads_the_raw_file(bench, spec)
            assert snapshots(overlay) == 1
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


async def restart(bench: LazyBench, spec: InstanceSpec) -> None:
    await bench.becomes("off", _with(spec, power=Power.OFF))
    await bench.becomes("on", spec)


def reads_the_raw_file(bench: LazyBench, spec: InstanceSpec) -> bool:
    xml = bench.host.virsh("dumpxml", domain.name(bench.installation, spec.uuid)).stdout
    nothing_served = not list((bench.directory / "run" / "nbd").iterdir())
    return f"{bench.digest.hex()}.raw" in xml and "nbd" not in xml and nothing_served


LINE = b"what the guest wrote\n"
WRITES = """#!/bin/sh
yes 'what the guest wrote' | dd of=/dev/vda bs=1M seek=64 count={mib} iflag=fullblock 2>/dev/null
sync
while :; do
    echo 3 >/proc/sys/vm/drop_caches
    echo "SUM $(dd if=/dev/vda bs=1M skip=64 count={mib} 2>/dev/null | md5sum)"
done
"""


@pytest.mark.drill
@pytest.mark.parametrize("mib", [200, 300] if everything() else [random.Random(seed()).choice([200, 300])])
def test_what_a_guest_wrote_goes_with_it_up_to_256_mib_and_keeps_it_where_it_is_beyond(
    bench: LazyBench, tiny_image: Path, mib: int
) -> None:
    bench.fill = "never"

    async def story() -> None:
        bench.digest = bench.push_larger(tiny_image)
        disk = DiskSpec("vda", str(bench.digest), size_bytes=1 << 30)
        user_data = WRITES.format(mib=mib).encode()
        spec = _with(bench.sector(), memory_mib=192, disks=(disk,), user_data=user_data)
        directory = bench.directory / "instances" / spec.uuid
        async with bench.agent() as agent:
            bench.desk.want(spec)

            async def sums(count: int) -> set[bytes]:
                async with asyncio.timeout(300):
                    while len(found := re.findall(rb"SUM (\w{32})", await _console(agent, spec))) < count:
                        await asyncio.sleep(0.2)
                return set(found)

            written = (LINE * ((mib << 20) // len(LINE) + 1))[: mib << 20]
            right = {hashlib.md5(written, usedforsecurity=False).hexdigest().encode()}
            assert await sums(1) == right
            assert (directory / "vda.qcow2").stat().st_blocks >= mib << 11
            await bench.client.ask("prefetch", image=str(bench.digest))
            if mib < 256:
                await bench.event("the image is complete and read directly now")
                assert [path.name for path in directory.glob("*.qcow2")] == ["vda.2.qcow2"]
                assert bench.live_disk(spec) == str(directory / "vda.2.qcow2")
            else:
                await bench.event(f"read directly from the next start on, since the disk holds {mib}")
                assert bench.live_disk(spec) == str(directory / "vda.qcow2")
            assert (
                await sums((await _console(agent, spec)).count(b"SUM ") + 2) == right
            )  # one more read since
            if mib >= 256:
                await restart(bench, spec)
            assert reads_the_raw_file(bench, spec)
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def test_a_boots_trace_ends_when_the_console_says_that_the_guest_is_up(
    bench: LazyBench, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fill, tell = "never", ServedImages.tell

    async def soon(self: ServedImages, op: str, **more: Any) -> Any:
        return await tell(self, op, **more, **({"settle_s": 1.0} if op == "booted" else {}))

    monkeypatch.setattr(ServedImages, "tell", soon)

    async def story() -> None:
        bench.digest = bench.push_larger(tiny_image)
        spec = _with(bench.sector(), memory_mib=192)
        async with bench.agent() as agent:
            bench.desk.want(spec)
            await says(agent, spec, b"SF-GUEST-READY")
            async with asyncio.timeout(60):
                while not (bench.directory / "cache" / "traces" / bench.digest.hex()).exists():
                    await asyncio.sleep(0.1)
            assert list((bench.directory / "run" / "nbd").iterdir())
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_agent_that_dies_around_the_move_leaves_one_overlay_the_right_one(
    bench: LazyBench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    bench.options = Options(fill_bytes_s=4 << 20)
    real = libvirt_adapter.Hypervisor.move_disk

    class Died(BaseException):
        pass

    def dying(self: object, uuid: str, disk: domain.Disk) -> None:
        if moment == "after":
            real(self, uuid, disk)  # type: ignore[arg-type]
        raise Died

    async def story() -> None:
        spec = bench.sector()
        directory = bench.directory / "instances" / spec.uuid
        with monkeypatch.context() as dies:
            dies.setattr(libvirt_adapter.Hypervisor, "move_disk", dying)
            async with bench.agent():
                bench.desk.want(spec)
                async with asyncio.timeout(60):
                    while '"moving": "vda"' not in _record(directory):
                        await asyncio.sleep(0.02)
                await asyncio.sleep(1)
        assert len(list(directory.glob("vda*.qcow2"))) == 2
        async with bench.agent() as agent:
            await bench.event(
                "the image is complete and read directly now" if moment == "before" else "started"
            )
            async with asyncio.timeout(60):
                while '"moved": ["vda"]' not in _record(directory):
                    await asyncio.sleep(0.02)
                while [path.name for path in directory.glob("vda*.qcow2")] != ["vda.2.qcow2"]:
                    await asyncio.sleep(0.02)  # the record first, then the old file
            await says(agent, spec, b"HELLO")
            assert bench.live_disk(spec) == str(directory / "vda.2.qcow2")
            await remove(bench, spec)
        await bench.service_is_gone()

    asyncio.run(story())


def _record(directory: Path) -> str:
    path = directory / "record.json"
    return path.read_text() if path.exists() else ""
