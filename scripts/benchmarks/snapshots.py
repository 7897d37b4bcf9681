"""Snapshots of a really running guest: what it notices of one, and thirty a day of use apart beside restic and borg.

The guest is the tiny one, under TCG where there is no KVM: Debian would take minutes a day there. A second
partition with ext4 holds a third of the files of a Debian 12 (corpus A, without links). Then

- fifteen days upgrade: they write a fifteenth of what differs a month of updates later (corpus B);
- fifteen days write logs, 4 MiB of lines each, and 300 pages at random places of a database of 32 MiB.

After each day the disk is compared with a copy taken at that moment, byte for byte but for the superblock, which a thaw
writes; the copies go into restic and borg. SF_BENCH_SNAPSHOTS="stalls series" names the parts, SF_BENCH_DAYS how many
days there are.
"""

import asyncio
import gzip
import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Contestant, Failed
from benchmarks._pivot import _Console
from compute.agent.guest.capture import Captures
from compute.wire.spec import Capture, DiskSpec, InstanceSpec
from imagestore import Digest, collect, open_store, pull, verify_store
from scripts.private_libvirtd import PrivateHost
from tests.system.machine import Machine, within
from tests.system.test_agent import remove
from tests.system.test_lazy_boot import LazyBench

_EXT4_BYTES = 1 << 30
_SUPERBLOCK: list[int] = []
"""Where the partition begins."""
DAYS = int(os.environ.get("SF_BENCH_DAYS", "30"))
_OFFSET, _SHARE = 1 << 20, 3
"""Where the corpus' file system begins; of its files one in so many is taken."""
_UNPACK = (
    "dd if=/dev/vda bs=4k skip={block} count={blocks} 2>/dev/null | head -c {size} | gzip -dc | tar -xC /data"
)
_MOUNT = """#!/bin/sh
mkdir /data && mount -t ext4 -o noatime /dev/vda2 /data || exit 1
"""
_TICKS = """dd if=/dev/vda bs=1M skip=40 count=1 of=/tmp/probe 2>/dev/null; chmod 700 /tmp/probe
cp /data/noise /data/own; sync
/tmp/probe ticks /data/own 8 0
"""
_USE = """
cat /data/log.{day} >>/data/log; rm /data/log.{day}; RANDOM={day}; i=0
while [ $i -lt 300 ]; do i=$((i + 1))
dd if=/data/pages.{day} of=/data/db bs=4k count=1 skip=$((i % 256)) seek=$((RANDOM % 8192)) conv=notrunc 2>/dev/null
done; rm /data/pages.{day}"""


def run(bench: Bench) -> None:
    parts = os.environ.get("SF_BENCH_SNAPSHOTS", "stalls series").split()
    os.environ.setdefault("SF_ACCEL", "tcg")
    with PrivateHost() as host:
        if "stalls" in parts:
            os.environ["SF_CACHE_DIR"] = str(bench.dir("hints"))
            asyncio.run(_stalls(bench, host))
        if "series" in parts:
            _series(bench, host)


async def _stalls(bench: Bench, host: PrivateHost, rounds: int = 5) -> None:
    """The longest gaps in the 10-ms ticks of two processes: one looks at the clock, one writes to a file as well."""
    node = LazyBench(host, bench.dir("stalls"))
    files = bench.fresh("files")
    (files / "noise").write_bytes(random.Random(5).randbytes(128 << 20))
    disk, _ = _image(bench, files, [_probe(bench)])
    base = node.push(disk)
    node.desk.now = replace(node.desk.now, stores={"my/system": node.url})
    script = _MOUNT + _TICKS
    disks = (DiskSpec("vda", str(base), size_bytes=2 << 30),)
    spec = replace(node.spec(base), memory_mib=256, disks=disks, user_data=script.encode())
    found: dict[str, dict[str, list[float]]] = {}
    freeze = Captures._freeze

    async def never(_: Captures) -> bool:
        return False

    async with node.agent() as agent:
        node.desk.want(spec)
        console = _Console(agent, spec)
        await console.until(1, "WROTE")
        await console.until(20, "DISK")
        overlay = node.directory / "instances" / spec.uuid / "vda.qcow2"
        if not overlay.exists():  # it moved to the complete file
            overlay = overlay.with_name("vda.2.qcow2")
        for number in range(rounds):
            for kind in ("none", "frozen", "unfrozen", "convert"):
                Captures._freeze = never if kind == "unfrozen" else freeze  # type: ignore[method-assign]
                began_s = time.time()
                if kind == "none":
                    await asyncio.sleep(2)
                elif kind == "convert":
                    argv = [
                        "qemu-img",
                        "convert",
                        "-U",
                        "-c",
                        "-O",
                        "qcow2",
                        overlay,
                        bench.dir("out") / "whole",
                    ]
                    await asyncio.to_thread(bench.run, argv)
                else:
                    taken = await _taken(node, spec, f"{kind}-{number}")
                    if taken.error or taken.frozen != (kind == "frozen"):
                        raise Failed(f"a snapshot, {kind}: frozen {taken.frozen}, {taken.error}")
                    found.setdefault(kind, {}).setdefault("read_mib", []).append(taken.costs["read"] / 2**20)
                ended_s = time.time()
                await console.until(console.count("DISK") + 4, "DISK")
                for word in ("TIMER", "DISK"):
                    gap = console.longest_ms(word, began_s, ended_s)
                    found.setdefault(kind, {}).setdefault(word.lower(), []).append(gap)
                found[kind].setdefault("takes_s", []).append(ended_s - began_s)
        await remove(node, spec)
    await node.service_is_gone()
    Captures._freeze = freeze  # type: ignore[method-assign]
    for kind, told in found.items():
        for what, values in told.items():
            middle = sorted(values)[len(values) // 2]
            limit = 100 if what == "timer" and kind in ("frozen", "unfrozen") else None
            bench.number(f"stall_{kind}_{what}", middle, "" if "_" in what else "ms", at_most=limit)
            bench.number(f"stall_{kind}_{what}_worst", max(values), "" if "_" in what else "ms")


async def _taken(node: LazyBench, spec: InstanceSpec, uuid: str) -> Capture:
    node.desk.want(replace(spec, snapshots=(Capture(uuid, {"of": "web"}),)))
    status = await node.desk.seen(lambda s: any(t.uuid == uuid for t in s.snapshots), spec.uuid)
    node.desk.want(spec)
    await node.desk.seen(lambda s: not s.snapshots, spec.uuid)
    return next(t for t in status.snapshots if t.uuid == uuid)


def _series(bench: Bench, host: PrivateHost) -> None:
    image, days = _days(bench)
    home = bench.dir("series")
    machine = Machine(host, home, SF_NODE_NAME="here", SF_ACCEL=os.environ["SF_ACCEL"])
    machine.sf("image", "push", str(image), "days:1", "--input-format", "raw")
    machine.start()
    peers, sums, made = _Peers(bench), list[str](), list[dict[str, Any]]()
    try:
        script = home / "start.sh"
        script.write_text(_MOUNT + "echo SF-DAYS >/dev/ttyS0\n")
        create = ["instance", "create", "web", "--image", "days:1", "--memory", "256", "--disk", "3G"]
        machine.sf(*create, "--user-data", str(script), "--wait", "boot")
        within(300, lambda: "SF-DAYS" in machine.sf("instance", "console", "web").stdout, "the first day")
        place, copy = (
            machine.state / "instances" / machine.instance("web")["uuid"],
            bench.dir("copies") / "vda.raw",
        )
        for day, packed in enumerate(days):
            bench.say(f"day {day + 1} of {len(days)}")
            command = _unpack(packed) + (_USE.format(day=day) if day % 2 else "")
            machine.sf("instance", "exec", "web", "--", "sh", "-c", f"{command}\nsync; sleep 1; sync")
            made.append(machine.listed("instance", "snapshot", "web"))
            (overlay,) = place.glob("vda*.qcow2")
            bench.run(["qemu-img", "convert", "-U", "-O", "raw", overlay, copy])
            sums.append(_sum(copy))
            peers.keep(f"day{day}", copy)
        (own,) = (machine.state / "store-namespaces").iterdir()
        _judge(bench, own, made, sums, peers)
        machine.sf("instance", "delete", "web", "--force", "--wait")
    finally:
        machine.signal(2)


def _judge(bench: Bench, own: Path, made: list[dict[str, Any]], sums: list[str], peers: "_Peers") -> None:
    sizes = {name: _size(path) for name, path in {"sf": own, **peers.places}.items()}
    for name, size in sizes.items():
        bench.number(f"series_{name}_mib", size / 2**20, "MiB")
    bench.ratio("series_sf_vs_smaller", sizes["sf"], min(sizes["restic"], sizes["borg"]), at_most=0.9)
    for what, most in (("read", 2.5), ("new", None), ("written", None)):
        told = sum(one[what] for one in made)
        bench.ratio(f"series_{what}_vs_held", told, sum(one["held"] for one in made), at_most=most)
    frozen = sum(one["frozen"] for one in made)
    bench.number("series_frozen", frozen, at_least=len(made))
    store, out = open_store(str(own)), bench.fresh("copies")

    def equal(number: int) -> bool:
        digest = Digest.parse(made[number]["digests"]["vda"])
        pull(store, digest, out / "pulled.raw", format_="raw", durable=False)
        return _sum(out / "pulled.raw") == sums[number]

    bench.number("series_equal_to_copies", sum(map(equal, range(len(made)))), at_least=len(made))
    last = made[-1]["images"]["vda"].removeprefix("my/")
    env = {"SF_CONFIG": "/dev/null", "SF_CACHE_DIR": str(bench.dir("hints"))}
    argv = [bench.sf, "image", "pull", last, "-o", out / "restored.raw", "--as", "raw", "-q", "--store", own]
    found = bench.contest([Contestant("restore_sf", argv, env=env), *peers.restores(f"day{len(made) - 1}")])
    for other in found[1:]:
        bench.ratio(f"{other.name}_wall_ours_of_theirs", found[0], other)
        bench.number(f"{other.name}_cpu_ours_of_theirs", found[0].cpu_s / other.cpu_s, "×")
    # What a rule would leave: every fifth. Then the collector, without grace.
    kept = range(len(made) - 1, -1, -5)
    for number, one in enumerate(made):
        if number not in kept:
            store.names.remove(*one["images"]["vda"].removeprefix("my/").split(":"))
    for _ in range(3):
        collect(store, grace_s=0)
    bench.number("series_problems_after_gc", len(verify_store(store, full=True).problems), at_most=0)
    bench.number("series_equal_after_gc", sum(map(equal, kept)), at_least=len(kept))
    bench.number("series_sf_after_gc_mib", _size(own) / 2**20, "MiB")
    store.backend.close()


class _Peers:
    """restic and borg, with what each has kept. zstd level 3 in both (restic's default is that)."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.places = {name: bench.dir("peers") / name for name in ("restic", "borg")}
        self.env = {
            "RESTIC_PASSWORD": "x",
            "RESTIC_CACHE_DIR": str(bench.dir("restic-cache")),
            "RESTIC_REPOSITORY": str(self.places["restic"]),
            "BORG_BASE_DIR": str(bench.dir("borg-base")),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        bench.run(["restic", "init"], env=self.env)
        bench.run(["borg", "init", "-e", "none", self.places["borg"]], env=self.env)
        bench.version("restic", ["restic", "version"])
        bench.version("borg", ["borg", "--version"])

    def keep(self, name: str, disk: Path) -> None:
        self.bench.run(["restic", "backup", "--force", "--tag", name, disk], env=self.env)
        cut = ["--chunker-params=buzhash,14,18,16,4095", "-C", "zstd,3", "--files-cache=disabled"]
        self.bench.run(["borg", "create", *cut, f"{self.places['borg']}::{name}", disk], env=self.env)

    def restores(self, name: str) -> Iterator[Contestant]:
        out = self.bench.dir("restored")
        restic = ["restic", "restore", "latest", "--tag", name, "--target", out]
        yield Contestant("restore_restic", restic, env=self.env)
        borg = ["borg", "extract", "--sparse", f"{self.places['borg']}::{name}"]
        yield Contestant("restore_borg", borg, env=self.env, cwd=out)


def _image(bench: Bench, files: Path, blobs: list[bytes]) -> tuple[Path, list[tuple[int, int]]]:
    """The tiny guest, from 40 MiB on these, then a partition with an ext4 of the files; where each is, how long."""
    built = bench.run([Path(__file__).parent.parent / "build-image", "tiny", "--cached"]).strip()
    image, places = bench.fresh("image") / "days.raw", list[tuple[int, int]]()
    bench.run(["qemu-img", "convert", "-O", "raw", built, image])
    with image.open("r+b") as file:
        file.seek(40 << 20)
        for data in blobs:
            places.append((file.tell(), len(data)))
            file.write(data)
            file.seek(-(-file.tell() >> 20) << 20)
        start = file.tell()
        file.truncate(start + _EXT4_BYTES)
    bench.run(["sh", "-c", f"echo start={start >> 9},type=83 | sfdisk -q --append {image}"])
    made = ["-E", f"offset={start},lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-d", files, image]
    bench.run(["mkfs.ext4", "-q", "-F", *made, f"{_EXT4_BYTES >> 10}k"])
    _SUPERBLOCK.append(start)
    return image, places


def _probe(bench: Bench) -> bytes:
    probe = bench.dir("image") / "probe"
    bench.run(["gcc", "-static", "-O1", "-s", "-o", probe, Path(__file__).parent / "_pivot.c"])
    return probe.read_bytes()


def _unpack(place: tuple[int, int]) -> str:
    start, size = place
    return _UNPACK.format(block=start // 4096, blocks=-(-size // 4096), size=size)


def _days(bench: Bench) -> tuple[Path, list[tuple[int, int]]]:
    """The image; where in it each day is packed, and how long that is."""
    rng = random.Random(7)
    old, new = (_files(bench, name) for name in ("A", "B"))
    changed, every = sorted(name for name, data in new.items() if old.get(name) != data), list(new.values())
    words = b" ".join(every[:200]).decode("latin-1").split()
    lines = [" ".join(rng.choices(words, k=8))[:90] for _ in range(5000)]
    packed = list[bytes]()
    for day in range(DAYS):
        if day % 2:
            log = "\n".join(f"{day} {rng.random():.9f} {rng.choice(lines)}" for _ in range(60_000))
            rows = b"".join(rng.choice(every).ljust(4096, b"\0")[:4096] for _ in range(256))
            packed.append(_packed({f"log.{day}": log.encode()[: 4 << 20], f"pages.{day}": rows}))
        else:
            packed.append(_packed({name: new[name] for name in changed[day // 2 :: max(1, DAYS // 2)]}))
    files = bench.fresh("files")
    pages = b"".join(rng.choice(every).ljust(4096, b"\0")[:4096] for _ in range(8192))
    for name, data in (old | {"db": pages, "log": b""}).items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(data)
    return _image(bench, files, packed)


def _files(bench: Bench, variant: str) -> dict[str, bytes]:
    """A third of the regular files of a corpus disk, by a short name."""
    out = bench.fresh("files")
    disk = corpus(variants=[variant])[variant]
    subprocess.run(
        ["debugfs", "-R", f"rdump /usr {out}", f"{disk}?offset={_OFFSET}"], check=True, capture_output=True
    )
    found = {}
    for path in sorted(out.rglob("*")):
        name = crc32(str(path.relative_to(out)).encode())
        if path.is_file() and not path.is_symlink() and name % _SHARE == 0 and path.stat().st_size < 8 << 20:
            found[f"{name % 64:02x}/{name:08x}"] = path.read_bytes()
    shutil.rmtree(out)
    return found


def _packed(files: dict[str, bytes]) -> bytes:
    """A tar, compressed: nobody finds in it what it unpacks to."""
    target = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=target, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1_700_000_000
            tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def _sum(path: Path) -> str:
    """Of all but the block of the superblock."""
    digest, at = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):  # the partition begins at one of these
            digest.update(bytes(4096) + data[4096:] if at == _SUPERBLOCK[-1] else data)
            at += len(data)
    return digest.hexdigest()


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
