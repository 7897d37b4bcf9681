"""What a guest notices of the move from the image service to its plain raw file, and how it reads afterwards."""

import asyncio
import random
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks._harness import Bench, Failed
from compute.agent.agent import Agent
from compute.errors import NotFound
from compute.wire.spec import DiskSpec, InstanceSpec, NodeEvent, Power
from scripts.private_libvirtd import PrivateHost
from tests.system.test_agent import remove
from tests.system.test_lazy_boot import LazyBench

_HERE = Path(__file__).parent
_RUN = """#!/bin/sh
dd if=/dev/vda bs=1M skip=40 count=1 of=/tmp/probe 2>/dev/null
chmod 700 /tmp/probe
/tmp/probe {}
"""
_MOVED, _DEFERRED = "read directly now", "read directly from the next start on"
_WINDOW_S = 5.0


def measure(bench: Bench) -> None:
    """The longest gaps in a guest's 10-ms ticks, and reads beside guests that never knew an image service."""
    with PrivateHost() as host:
        node = LazyBench(host, bench.dir("pivot"))
        node.fill = "never"
        node.digest = node.push(_disk(bench))
        asyncio.run(_measure(bench, node))


async def _measure(bench: Bench, node: LazyBench) -> None:
    for mib, runs in ((2, 5), (200, 5), (1024, 1)):
        await _gaps(bench, node, mib, runs)
    await _reads(bench, node)


def _disk(bench: Bench) -> Path:
    """The tiny guest, then (at 40 MiB) the probe, then data that does not compress."""
    built = subprocess.run([_HERE.parent / "build-image", "tiny", "--cached"], capture_output=True, text=True)
    disk, probe = bench.dir("disk") / "probed.raw", bench.dir("disk") / "probe"
    subprocess.run(["qemu-img", "convert", "-O", "raw", built.stdout.strip(), disk], check=True)
    subprocess.run(["gcc", "-static", "-O1", "-s", "-o", probe, _HERE / "_pivot.c"], check=True)
    program = probe.read_bytes()
    if disk.stat().st_size != 40 << 20 or len(program) > 1 << 20:
        raise Failed("the tiny image or the probe is larger than expected")
    with disk.open("ab") as file:
        file.write(program.ljust(1 << 20, b"\0") + random.Random(5).randbytes(128 << 20))
    return disk


class _Console:
    """A guest's console, its lines with the time when they came."""

    def __init__(self, agent: Agent, spec: InstanceSpec) -> None:
        self.agent, self.spec = agent, spec
        self.lines: list[tuple[float, list[str]]] = []
        self._bytes = 0

    async def read(self) -> None:
        with suppress(NotFound):
            new = (await self.agent.operations.console(self.spec.uuid, -1))[self._bytes :]
            whole = new[: new.rfind(b"\n") + 1]
            self._bytes += len(whole)
            now = time.time()
            self.lines += [(now, line.split()) for line in whole.decode(errors="replace").splitlines()]

    def count(self, word: str) -> int:
        return sum(word in " ".join(words) for _, words in self.lines)

    async def until(self, count: int, word: str) -> None:
        """Until so many lines have had `word`."""
        deadline = time.monotonic() + 300
        while self.count(word) < count:
            if time.monotonic() > deadline:
                raise Failed(f"the guest does not say {word}: {[words for _, words in self.lines[-5:]]}")
            await asyncio.sleep(0.05)
            await self.read()

    def longest_ms(self, word: str, start_s: float, end_s: float) -> float:
        """The longest gap said from `start_s` until a little after `end_s`."""
        said = [int(w[1]) for at, w in self.lines if w[:1] == [word] and start_s <= at <= end_s + 0.6]
        return max(said) / 1000


def _spec(node: LazyBench, command: str) -> InstanceSpec:
    disk = DiskSpec("vda", str(node.digest), size_bytes=2 << 30)
    return replace(node.spec(), memory_mib=192, disks=(disk,), user_data=_RUN.format(command).encode())


async def _event(node: LazyBench, spec: InstanceSpec) -> NodeEvent:
    """What became of the move."""
    async with asyncio.timeout(120):
        while True:
            for event in node.desk.events:
                if event.object_uuid == spec.uuid and (_MOVED in event.message or _DEFERRED in event.message):
                    return event
            await asyncio.sleep(0.02)


async def _gaps(bench: Bench, node: LazyBench, mib: int, runs: int) -> None:
    found: dict[str, list[float]] = {}
    took: list[float] = []
    for number in range(runs):
        bench.say(f"a move with {mib} MiB written ({number + 1}/{runs})")
        spec = _spec(node, f"ticks /dev/vda {mib}")
        async with node.agent() as agent:
            node.desk.want(spec)
            console = _Console(agent, spec)
            await console.until(1, "WROTE")
            await console.until(4 * int(_WINDOW_S) + 8, "DISK")
            quiet_s = time.time()
            await node.client.ask("prefetch", image=str(node.digest))
            event = await _event(node, spec)
            await console.until(console.count("DISK") + 6, "DISK")
            if (_DEFERRED in event.message) != (mib >= 256):
                raise Failed(f"{mib} MiB written: {event.message}")
            if event.duration_s is not None:
                took.append(event.duration_s)
                began_s = event.timestamp_s - event.duration_s
                for kind in ("TIMER", "DISK"):
                    moved = console.longest_ms(kind, began_s, event.timestamp_s)
                    found.setdefault(kind.lower(), []).append(moved)
                    quiet = console.longest_ms(kind, quiet_s - _WINDOW_S, quiet_s - 0.6)
                    found.setdefault(f"{kind.lower()}_before", []).append(quiet)
            await remove(node, spec)
            await node.client.ask("prune", limit_bytes=0)
        await node.service_is_gone()
    for name, gaps in sorted(found.items()):
        limit = None if name.endswith("before") else 200.0
        bench.number(f"pivot_{mib}m_gap_{name}", statistics.median(gaps), "ms", at_most=limit)
        bench.number(f"pivot_{mib}m_gap_{name}_worst", max(gaps), "ms")
    if took:
        bench.number(f"pivot_{mib}m_takes", statistics.median(took), "s")
    else:
        bench.number(f"pivot_{mib}m_deferred", runs, at_least=runs)


async def _reads(bench: Bench, node: LazyBench, rounds: int = 7) -> None:
    """Three guests in turn, the others stopped: one moved, two that were started on the complete file."""
    bench.say("reads of a moved disk beside plain ones")
    moved, plain, again = (_spec(node, "reads /dev/vda") for _ in range(3))
    async with node.agent() as agent:
        consoles = {spec.uuid: _Console(agent, spec) for spec in (moved, plain, again)}
        node.desk.want(moved)
        await consoles[moved.uuid].until(1, "READS")
        await node.client.ask("prefetch", image=str(node.digest))
        if _MOVED not in (await _event(node, moved)).message:
            raise Failed("the disk was not moved")
        found: dict[str, list[list[int]]] = {uuid: [] for uuid in consoles}
        for _ in range(rounds):
            for running in (moved, plain, again):
                guests = [replace(s, power=Power.PAUSED) for s in (moved, plain, again) if s is not running]
                node.desk.want(running, *(s for s in guests if consoles[s.uuid].lines))
                console = consoles[running.uuid]
                await console.read()
                # The first one may have been under way when the guest was stopped.
                await console.until(console.count("READS") + 2, "READS")
                found[running.uuid].append([int(word) for word in console.lines[-1][1][1:]])
        await remove(node, moved, plain, again)
    await node.service_is_gone()
    for column, name in enumerate(("sequential", "random")):
        middle = [statistics.median(run[column] / 1e6 for run in runs) for runs in found.values()]
        noise = max(middle[1:]) / min(middle[1:])
        bench.number(f"pivot_{name}_plain", min(middle[1:]), "s")
        bench.number(f"pivot_{name}_plain_vs_plain", noise, "×")
        bench.ratio(f"pivot_{name}_vs_plain", middle[0], max(middle[1:]), at_most=1.05 * noise)
