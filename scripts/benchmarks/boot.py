"""Booting before the image has arrived: a boot's reads over a slow link, present reads, versions, a whole guest.

nginx serves the store behind a link of a given rate and round trip (benchmarks._link: the test machine's kernel has no
netem). The reads are those of real boots of the Debian image (variant A), noted once per image under the corpus; the
trace that is replayed comes from another boot, which went on past its prompt as long as the service's own traces do.

    SF_BENCH_BOOT="nbd replay crowd versions pivot guest"    which parts (default: all)
"""

import asyncio
import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Failed
from compute.agent.guest import overlay
from imagestore.cache.control import ControlClient
from imagestore.cache.imaged import control_socket
from imagestore.cache.nbd.server import NbdServer
from imagestore.cache.open_images import SETTLE_S
from imagestore.cache.partial import PartialImage
from imagestore.errors import StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, MANIFESTS, TRACES
from imagestore.formats.manifest import Manifest
from imagestore.formats.trace import Trace
from imagestore.push import push
from imagestore.store.open import open_store
from tests.servers import free_ports

LINKS = ((1000, 20), (100, 50))
"""Mbit/s and round trip in ms."""
BOOT_S = 1800
Read = tuple[int, int]


def run(bench: Bench) -> None:
    parts = os.environ.get("SF_BENCH_BOOT", "nbd replay crowd versions pivot guest").split()
    disks = corpus()
    bench.version("qemu", ["qemu-img", "--version"])
    bench.version("nginx", ["nginx", "-v"])
    store = bench.dir("store")
    opened = open_store(store.as_uri(), create=True)
    digest = push(opened, disks["A"], "debian", "12").digest
    if "nbd" in parts:
        _present(bench, store, digest, disks["A"])
    if "replay" in parts:
        reads, other = _reads(bench, disks["A"]), _reads(bench, disks["A"], for_trace=True)
        for rate, delay in LINKS:
            with Link(bench, store, rate, delay) as link:
                _replays(bench, link, store, digest, reads, other)
    if "crowd" in parts:
        _crowd(bench, store, digest, _reads(bench, disks["A"]), disks["A"].stat().st_size)
    if "versions" in parts:
        _versions(bench, store, digest, disks["E"], disks["B"])
    if "pivot" in parts:
        from benchmarks import _pivot

        _pivot.measure(bench)
    if "guest" in parts:
        with Link(bench, store, *LINKS[0]) as link:
            _guest(bench, link, digest, disks["A"])


# The machinery


@dataclass
class Service:
    """An image service in its own state directory."""

    state: Path
    process: "subprocess.Popen[bytes]"

    @property
    def client(self) -> ControlClient:
        return ControlClient(control_socket(self.state))

    def ask(self, op: str, **arguments: Any) -> Any:
        return asyncio.run(self.client.ask(op, **arguments))

    def row(self, digest: Digest) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.ask("ls")["images"] if row["digest"] == str(digest))
        return found

    def wait_complete(self, digest: Digest) -> dict[str, Any]:
        while not (row := self.row(digest))["complete"]:
            time.sleep(0.05)
        return row


@contextlib.contextmanager
def service(bench: Bench, state: Path, store: str) -> Iterator[Service]:
    with (bench.dir("log") / "imaged").open("ab") as log:
        argv = [sys.executable, "-c", "from cli.main import main; main()", "imaged"]
        told = os.environ | {"SF_STATE_DIR": str(state), "SF_STORE": store}
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=told)
    found = Service(state, process)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                found.ask("ls")
                break
            except StoreError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failed((bench.dir("log") / "imaged").read_text()[-2000:]) from None
                time.sleep(0.05)
        yield found
    finally:
        process.terminate()
        process.wait()


class Link:
    """nginx with the store, behind a link of some rate and round trip."""

    def __init__(self, bench: Bench, store: Path, rate_mbit: float, delay_ms: float) -> None:
        self.bench, self.store = bench, store
        self.rate_mbit, self.delay_ms = rate_mbit, delay_ms
        self.name = f"{rate_mbit:g}mbit_{delay_ms:g}ms"

    def __enter__(self) -> "Link":
        self._stack = contextlib.ExitStack()
        port = free_ports(2, first=28000)
        self.url = f"http://127.0.0.1:{port}/"
        conf = self.bench.dir("nginx") / f"{self.name}.conf"
        conf.write_text(
            f"daemon off; worker_processes 1; pid {conf}.pid; error_log {conf}.log; user root;\n"
            "events { worker_connections 256; }\n"
            f"http {{ access_log off; sendfile on; keepalive_requests 100000; "
            f"server {{ listen 127.0.0.1:{port + 1}; root {self.store}; }} }}\n"
        )
        link = [sys.executable, "-m", "benchmarks._link", port, port + 1, self.rate_mbit, self.delay_ms]
        for argv in (["nginx", "-e", f"{conf}.log", "-c", conf], link):
            process = subprocess.Popen([str(word) for word in argv])
            self._stack.callback(process.wait)
            self._stack.callback(process.terminate)
        try:
            self._wait(port)
        except Failed:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}store.json", timeout=5):
                return
            time.sleep(0.1)
        raise Failed(f"nginx does not answer on {port}")

    def bare_s(self, size_bytes: int) -> float:
        """What so many bytes need on the bare link: their time at full rate and one round trip."""
        return size_bytes * 8 / (self.rate_mbit * 1e6) + self.delay_ms / 1000


class _Noting:
    """A raw file as an NBD source that notes what is read."""

    def __init__(self, disk: Path) -> None:
        self.file = disk.open("rb", buffering=0)
        self.size_bytes = disk.stat().st_size
        self.noted: list[Read] = []

    def read_now(self, offset: int, length: int) -> bytes:
        self.noted.append((offset, length))
        return os.pread(self.file.fileno(), length, offset)

    async def read(self, offset: int, length: int) -> bytes:
        return self.read_now(offset, length)

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        return [(length, False)]

    def prefetch(self, offset: int, length: int) -> None:
        pass


def _boot(bench: Bench, overlay_path: Path, backing: str, size_bytes: int, settle_s: float = 0.0) -> float:
    """Seconds until the login prompt of a guest on a new overlay over `backing`; it goes on for `settle_s` more."""
    overlay_path.write_bytes(overlay.qcow2(size_bytes, backing))
    console = overlay_path.with_suffix(".console")
    console.unlink(missing_ok=True)
    argv = (
        "qemu-system-x86_64 -M q35 -accel tcg -cpu max -m 1024 -display none -monitor none -nic none".split()
    )
    argv += ["-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    argv += ["-drive", f"file={overlay_path},if=virtio,format=qcow2,cache=unsafe"]
    began = time.monotonic()
    with (bench.dir("log") / "qemu").open("ab") as log:
        qemu = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        while not (console.exists() and b"login:" in console.read_bytes()):
            if qemu.poll() is not None or time.monotonic() - began > BOOT_S:
                raise Failed(f"the guest did not come up: {console.read_bytes()[-500:]!r}")
            time.sleep(0.1)
        took = time.monotonic() - began
        time.sleep(settle_s)
        return took
    finally:
        qemu.kill()
        qemu.wait()


def _reads(bench: Bench, disk: Path, *, for_trace: bool = False) -> list[Read]:
    """The reads of a boot to its prompt (and as long after it as a trace goes on), in order; kept beside the image."""
    kept = disk.with_name(f"{disk.stem}.{'trace' if for_trace else 'reads'}.json")
    if not kept.exists() or kept.stat().st_mtime < disk.stat().st_mtime:
        bench.say(f"booting {disk.name} to note its reads")
        socket = bench.dir("note") / "nbd"

        async def note() -> list[Read]:
            source = _Noting(disk)
            server = NbdServer(source, socket)
            await server.start()
            nbd = f"nbd+unix:///?socket={socket}"
            path = bench.dir("note") / "disk.qcow2"
            settle_s = SETTLE_S if for_trace else 0.0
            await asyncio.to_thread(_boot, bench, path, nbd, "raw", source.size_bytes, settle_s)
            await server.close()
            return source.noted

        kept.write_text(json.dumps(asyncio.run(note())))
    return [(offset, length) for offset, length in json.loads(kept.read_text())]


async def _replay(socket: Path, reads: list[Read], depth: int) -> float:
    """Seconds for the reads through NBD, `depth` at a time, each started when an earlier one has ended."""
    reader, writer = await asyncio.open_unix_connection(str(socket), limit=1 << 26)
    await reader.readexactly(18)
    writer.write(struct.pack(">I", 3) + struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0))
    while True:
        _, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        await reader.readexactly(length)
        if kind == 1:
            break
    began = time.monotonic()
    waiting = iter(enumerate(reads))

    def ask() -> bool:
        for cookie, (offset, length) in waiting:
            writer.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, offset, length))
            return True
        return False

    asked = sum(ask() for _ in range(depth))
    while asked:
        _, error, cookie = struct.unpack(">IIQ", await reader.readexactly(16))
        if error:
            raise Failed(f"read {reads[cookie]} ended with error {error}")
        await reader.readexactly(reads[cookie][1])
        asked += ask() - 1
    took = time.monotonic() - began
    writer.close()
    return took


def _touched(manifest: Manifest, reads: list[Read]) -> list[int]:
    """The chunks that the reads touch, in the order of first touch."""
    starts = manifest.offsets
    ends = starts + manifest.lengths
    found: dict[int, None] = {}
    for offset, length in reads:
        first, last = (
            int(ends.searchsorted(offset, "right")),
            int(starts.searchsorted(offset + length, "left")),
        )
        found.update(dict.fromkeys(range(first, last)))
    return list(found)


# The parts


def _crowd(bench: Bench, store: Path, digest: Digest, reads: list[Read], size_bytes: int) -> None:
    """Ten nodes boot at once, two with a real guest, eight by its reads; what leaves the store, against one alone."""
    nodes, guests = 10, 2
    port, secret = free_ports(10, first=28000), "5e" * 32
    peers = {f"n{number}": f"127.0.0.1:{port + number}" for number in range(nodes)}
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link(bench, store, 200, 20))
        with service(bench, bench.fresh("state"), link.url) as one:
            socket = Path(one.ask("attach", image=str(digest), reader="vda", fill="never")["path"])
            asyncio.run(_replay(socket, reads, 4))
            alone = one.row(digest)["received"]["store"]
        states = [bench.fresh(f"crowd{number}") for number in range(nodes)]
        there = [stack.enter_context(service(bench, state, link.url)) for state in states]
        for (name, address), one in zip(peers.items(), there, strict=True):
            one.ask("join", me=name, listen=address, peers=peers, secret=secret)

        async def all_of_them() -> tuple[float, float]:
            asked = (one.client.ask("attach", image=str(digest), reader="vda", fill="never") for one in there)
            sockets = [Path(found["path"]) for found in await asyncio.gather(*asked)]
            booting = (
                asyncio.to_thread(
                    _boot, bench, state / "vda.qcow2", f"nbd+unix:///?socket={socket}", "raw", size_bytes
                )
                for state, socket in zip(states[:guests], sockets[:guests], strict=True)
            )
            replaying = (_replay(socket, reads, 4) for socket in sockets[guests:])
            took = await asyncio.gather(*booting, *replaying)
            return max(took[:guests]), max(took[guests:])

        booted_s, replayed_s = asyncio.run(all_of_them())
        rows = [one.row(digest)["received"] for one in there]
    left = sum(row.get("store", 0) for row in rows)
    bench.number("crowd_slowest_replay", replayed_s, "s")
    bench.number("crowd_slowest_guest", booted_s, "s to the login prompt")
    bench.number("crowd_from_store", left / 2**20, "MiB")
    bench.number("crowd_from_peers", sum(row.get("peer", 0) for row in rows) / 2**20, "MiB")
    bench.number("crowd_store_vs_one_replay", left / alone, "×")
    # The guests read other things than the replays do, so that what was wanted is what any of the ten has now.
    opened = open_store(store.as_uri())
    manifest, layout = opened.manifest(digest), opened.layout(digest)
    wanted = np.zeros(len(manifest.lengths), np.bool_)
    for state in states:
        cached = PartialImage(state / "cache" / f"{digest.hex()}.part", digest, manifest)
        wanted |= np.frombuffer(cached.present, np.bool_)
        cached.close()
    distinct = int(layout.frames["size"][np.unique(layout.chunk_frames[wanted])].sum())
    bench.number("crowd_wanted", distinct / 2**20, "MiB of frames, each once")
    bench.ratio("crowd_store_vs_each_frame_once", left, distinct, at_most=1.2)


def _replays(
    bench: Bench, link: Link, store: Path, digest: Digest, reads: list[Read], other: list[Read]
) -> None:
    opened = open_store(store.as_uri())
    manifest, layout = opened.manifest(digest), opened.layout(digest)
    frames = set(layout.chunk_frames[_touched(manifest, reads)].tolist())
    needed = sum(int(layout.frames["size"][frame]) for frame in frames)
    total = int(layout.frames["size"].sum())
    bench.number(f"{link.name}_boot_needs", needed / 2**20, "MiB")
    bench.number(f"{link.name}_boot_needs_share", needed / total)
    bench.number(f"{link.name}_bare", link.bare_s(needed), "s")
    trace = store / TRACES.key(digest)
    for traced in (True, False):
        for depth in (1, 16):
            trace.unlink(missing_ok=True)
            if traced:
                trace.parent.mkdir(parents=True, exist_ok=True)
                trace.write_bytes(Trace.of(manifest.ids, _touched(manifest, other)).encode())
            name = f"{link.name}_depth{depth}_{'trace' if traced else 'cold'}"
            samples = []
            for _ in range(3):
                state = bench.fresh("state")
                with service(bench, state, link.url) as imaged:
                    socket = Path(imaged.ask("attach", image=str(digest), reader="vda", fill="now")["path"])
                    took = asyncio.run(_replay(socket, reads, depth))
                    row = imaged.row(digest)
                samples.append((took, row["received"].get("store", 0), row["exports"]["vda"]["waited_s"]))
            took, fetched, waited = sorted(samples)[1]
            bench.number(f"{name}_s", took, "s")
            bench.number(f"{name}_fetched", fetched / 2**20, "MiB")
            bench.number(f"{name}_reads_waited", waited, "s")
            bench.ratio(f"{name}_vs_bare", took, link.bare_s(needed), at_most=1.5 if traced else 8)
    trace.unlink(missing_ok=True)


def _rate(target: str, size: int, count: int) -> float:
    """Reads a second by qemu's own benchmark, 16 at a time."""
    argv = ["qemu-img", "bench", "-f", "raw", "-d", "16", "-s", str(size), "-c", str(count), target]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return count / float(done.stdout.split("completed in ")[1].split()[0])


def _present(bench: Bench, store: Path, digest: Digest, disk: Path) -> None:
    state, other = bench.fresh("state"), bench.dir("peer") / "nbd"
    with service(bench, state, store.as_uri()) as imaged:
        socket = imaged.ask("attach", image=str(digest), reader="vda", fill="now")["path"]
        imaged.wait_complete(digest)
        peer = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-k", other, "-t", "-e", "8", disk])
        try:
            while not other.exists():
                time.sleep(0.05)
            found: dict[str, list[float]] = {}
            # The image's first 512 MiB hold most of its data; the peer's file is the disk itself.
            for _ in range(3):
                for name, target in (("nbd", socket), ("qemu_nbd", other)):
                    for size, count in ((4096, 60_000), (1 << 20, 1000)):
                        rate = _rate(f"nbd+unix:///?socket={target}", size, count)
                        found.setdefault(f"{name}_{size >> 10}k", []).append(rate)
        finally:
            peer.terminate()
            peer.wait()
    middle = {name: sorted(rates)[1] for name, rates in found.items()}
    bench.number("present_4k", middle["nbd_4k"], "reads/s", at_least=20_000)
    bench.number("qemu_nbd_4k", middle["qemu_nbd_4k"], "reads/s")
    bench.number("present_1m", middle["nbd_1024k"] / 1000 * 1.048576, "GB/s", at_least=1.5)
    bench.number("qemu_nbd_1m", middle["qemu_nbd_1024k"] / 1000 * 1.048576, "GB/s")


def _versions(bench: Bench, store: Path, first: Digest, *later: Path) -> None:
    opened = open_store(store.as_uri())
    for disk in later:
        pushed = push(opened, disk, "debian", disk.stem.lower())
        state = bench.fresh("state")
        with service(bench, state, store.as_uri()) as imaged:
            imaged.ask("prefetch", image=str(first))
            imaged.wait_complete(first)
            imaged.ask("attach", image=str(pushed.digest), reader="vda", fill="now")
            received = imaged.wait_complete(pushed.digest)["received"]
            if (state / "cache" / f"{pushed.digest.hex()}.raw").stat().st_size != disk.stat().st_size:
                raise Failed("the second version has another size")
        bench.number(f"version_{disk.stem}_added", pushed.written_bytes / 2**20, "MiB")
        bench.number(f"version_{disk.stem}_fetched", received.get("store", 0) / 2**20, "MiB")
        fetched = received.get("store", 0)
        bench.ratio(f"version_{disk.stem}_fetched_vs_added", fetched, pushed.written_bytes, at_most=1.1)


def _guest(bench: Bench, link: Link, digest: Digest, disk: Path) -> None:
    work = bench.dir("guest")
    size_bytes = disk.stat().st_size
    subprocess.run(["cat", disk], stdout=subprocess.DEVNULL, check=True)
    raw_s, lazy_s = [], []
    row: dict[str, Any] = {}
    for _ in range(3):
        raw_s.append(_boot(bench, work / "raw.qcow2", str(disk), size_bytes))
        state = bench.fresh("state")
        with service(bench, state, link.url) as imaged:
            socket = imaged.ask("attach", image=str(digest), reader="vda", fill="never")["path"]
            nbd = f"nbd+unix:///?socket={socket}"
            lazy_s.append(_boot(bench, work / "lazy.qcow2", nbd, size_bytes))
            row = imaged.row(digest)
    opened = open_store(bench.dir("store").as_uri())
    layout = opened.layout(digest)
    metadata = sum(opened.backend.stat(kind.key(digest)).size_bytes for kind in (MANIFESTS, LAYOUTS))
    fetched = row["received"].get("store", 0) + metadata
    shutil.rmtree(work)
    stored = int(layout.frames["size"].sum())
    bench.number("guest_raw", sorted(raw_s)[1], "s to the login prompt")
    bench.number("guest_lazy", sorted(lazy_s)[1], "s to the login prompt")
    bench.ratio("guest_lazy_vs_raw", sorted(lazy_s)[1], sorted(raw_s)[1], at_most=1.1)
    bench.number("guest_fetched", fetched / 2**20, "MiB with the manifest and the layout")
    bench.ratio("guest_fetched_share", fetched, stored, at_most=0.42)
    bench.number("guest_reads_waited", row["exports"]["vda"]["waited_s"], "s")
