"""What an update costs who holds the former version: bytes, making, using; beside frames, casync, zstd and xdelta3.

Pairs of the corpus (scripts/guest_images/debian_image.py): from A to A2, E and B, and from A to B on btrfs and on xfs,
whose trees are those of the ext4 disks; and from each of six builds of a small Debian 13 to the next. The method was
made with the first four pairs alone. Bytes of ours are all that a pull with the former version as its seed is sent:
list, head, frames, manifest, and the layout where one is read; at 50 Mbit/s in all, since on a fast line files
that gzip compressed come in frames of packs. Frames: the same without the update. casync: the growth of its store and
the index. Times stand beside each other, as medians: the wall clock, and the CPU's, which other users of the machine
hardly change. SF_BENCH_PAIRS names pairs ("A-B"), SF_BENCH_PEERS="" leaves the others out. In a few minutes:

    SF_BENCH_PAIRS="A-A2 A-E A-B" SF_BENCH_PEERS= scripts/bench updates
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Contestant, Measurement
from imagestore import keep_buffers
from imagestore.backends.directory import Directory
from imagestore.backends.wrappers import Wrapper
from imagestore.formats.digest import Digest
from imagestore.pull import Seed, pull
from imagestore.push import push
from imagestore.store.open import open_store
from imagestore.store.store import Store
from imagestore.updates.making import make_update
from tests.servers import free_ports
from tests.web import nginx

MIB = 1 << 20
PAIRS = {  # at most so many MiB, and of frames and casync's bytes
    "A-A2": (5.0, 1.0, 1.0), "A-E": (1.6, None, None), "A-B": (None, 0.7, 0.6), "FA-FB": (None, 1.0, 1.0),
    "XA-XB": (None, 1.0, 1.0), "T1-T2": (None, 1.0, 1.0), "T2-T3": (None, 1.0, 1.0), "T3-T4": (None, 1.0, 1.0),
    "T4-T5": (None, 1.0, 1.0), "T5-T6": (None, 1.0, 1.0),
}  # fmt: skip


class Counted(Wrapper):
    """How many bytes came, by kind, over one line of so many bytes a second."""

    def __init__(self, inner: Any, bytes_s: float) -> None:
        super().__init__(inner)
        self.got, self.bytes_s, self._line = Counter[str](), bytes_s, threading.Lock()

    def _do(self, verb: str, key: str, action: Any) -> Any:
        found = action()
        size = len(found.data) if verb == "get" else 0
        self.got[key.partition("/")[0]] += size
        with self._line:
            time.sleep(size / self.bytes_s)
        return found


def _other(disk: Path, out: Path, kind: str) -> Path:
    """The tree of a disk's ext4 in a btrfs or an xfs of the same size."""
    if not out.exists():
        with out.with_suffix(".new").open("wb") as file:
            file.truncate(disk.stat().st_size)
        place = out.parent / f"{out.stem}.mnt"
        (place / "old").mkdir(parents=True, exist_ok=True)
        (place / "new").mkdir(exist_ok=True)
        script = (
            'mount -o ro,loop,offset=1048576 "$1" "$3/old"; '
            + {
                "btrfs": 'mkfs.btrfs -q --rootdir "$3/old" "$2"',
                "xfs": 'mkfs.xfs -q "$2"; mount -o loop "$2" "$3/new"; cp -a "$3/old/." "$3/new"; umount "$3/new"',
            }[kind]
        )
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            script + '; umount "$3/old"',
        ]
        subprocess.run([*command, "sh", disk, out.with_suffix(".new"), place], check=True)
        shutil.rmtree(place)
        out.with_suffix(".new").rename(out)
    return out


def run(bench: Bench) -> None:
    keep_buffers()  # as the commands do
    pairs = [pair for pair in PAIRS if pair in os.environ.get("SF_BENCH_PAIRS", " ".join(PAIRS)).split()]
    names = {name for pair in pairs for name in pair.split("-")}
    disks = corpus(variants=sorted({name.lstrip("FX") for name in names}))
    for first, kind in (("F", "btrfs"), ("X", "xfs")):
        disks |= {
            name: _other(disks[name[1:]], disks[name[1:]].with_name(f"{name}.raw"), kind)
            for name in names
            if name[0] == first
        }
    for pair in pairs:
        base, to = pair.split("-")
        _pair(bench, pair, disks[base], disks[to])


def _pair(bench: Bench, pair: str, base: Path, to: Path) -> None:
    name, (most_mib, of_frames, of_casync) = pair.lower().replace("-", "_"), PAIRS[pair]
    bench.say(pair)
    place, fresh = bench.fresh("store"), bench.fresh("hints")

    def pushed(disk: Path, directory: Path = place) -> Digest:
        return push(Store.open(Directory(directory)), disk, "it", format_="raw", cache=fresh).digest

    Store.init(Directory(place))
    former = pushed(base)
    before = bench.dir("before")

    def keep() -> None:
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(place, before, copy_function=os.link)

    keep()
    digest = pushed(to)
    store = Store.open(Directory(place))

    def forget() -> None:
        for tree in ("updates", "deltas"):
            shutil.rmtree(place / tree, ignore_errors=True)

    again = bench.dir("again")

    def rewind() -> None:
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(before, again, copy_function=os.link)

    pushing, making = bench.contest(
        [
            Contestant(f"{name}_push", lambda: pushed(to, again), before=rewind),
            Contestant(f"{name}_make", lambda: make_update(store, former, digest), before=forget),
        ]
    )
    _compare(bench, f"{name}_make_vs_push", making, pushing, 1.0)
    seed, out = Seed(store.manifest(former), base), bench.dir("out") / "out.raw"

    def bytes_of(update: bool) -> float:
        aside = place / "aside"
        if not update:
            (place / "updates").rename(aside)
        counted = Counted(Directory(place), 50e6 / 8 if update else float("inf"))
        try:
            pull(Store.open(counted), digest, out, format_="raw", seeds=[seed], durable=False)
        finally:
            if not update:
                aside.rename(place / "updates")
        bench.note(f"{pair} {'update' if update else 'frames'}: {dict(counted.got)}")
        return sum(counted.got.values()) / MIB

    (place / "updates").mkdir(exist_ok=True)
    ours = bench.number(f"{name}_update_mib", bytes_of(True), "MiB", at_most=most_mib)
    frames = bench.number(f"{name}_frames_mib", bytes_of(False), "MiB")
    bench.ratio(f"{name}_update_vs_frames", ours, frames, at_most=of_frames)
    if os.environ.get("SF_BENCH_PEERS", "all"):
        _peers(bench, name, base, to, ours, of_casync)
    if pair in ("A-A2", "A-B"):
        _use(bench, name, place, digest, seed, out)


def _compare(bench: Bench, name: str, ours: Measurement, theirs: Measurement, at_most: float) -> None:
    """Medians; a machine that others use is in the wall clock, hardly in the CPU's."""
    bench.ratio(name, ours, theirs, at_most=at_most)
    bench.ratio(f"{name}_cpu", ours.cpu_s, theirs.cpu_s)


def _peers(bench: Bench, name: str, base: Path, to: Path, ours: float, of_casync: float | None) -> None:
    chunks, patch = bench.fresh("casync"), bench.dir("patches")
    casync = ["casync", f"--store={chunks}/c", "--chunk-size=16384", "make"]
    bench.run([*casync, f"{chunks}/base.caibx", base])
    small = sum(p.stat().st_size for p in chunks.rglob("*") if p.is_file())
    bench.run([*casync, f"{chunks}/to.caibx", to])
    grown = (sum(p.stat().st_size for p in chunks.rglob("*") if p.is_file()) - small) / MIB
    bench.number(f"{name}_casync16_mib", grown, "MiB")
    bench.ratio(f"{name}_update_vs_casync16", ours, grown, at_most=of_casync)
    for peer, command in (
        ("zstd_patch", ["zstd", "-q", "-f", "-3", "-T2", "--long=31", f"--patch-from={base}", to, "-o"]),
        ("xdelta3", ["xdelta3", "-e", "-f", "-3", "-B", str(base.stat().st_size), "-s", base, to]),
    ):
        began = time.monotonic()
        bench.run([*command, patch / peer])
        bench.number(f"{name}_{peer}_s", time.monotonic() - began, "s")
        bench.number(f"{name}_{peer}_mib", (patch / peer).stat().st_size / MIB, "MiB")


def _use(bench: Bench, name: str, place: Path, digest: Digest, seed: Seed, out: Path) -> None:
    """A pull with the former version as its seed, by the update and by frames: over loopback, and over 200 Mbit/s."""
    with nginx(place, bench.dir("nginx")) as url, _link(url) as slow:
        for where, target in (("loopback", url), ("200mbit", slow)):

            def pulling(update: bool, target: str = target) -> None:
                store = open_store(target)
                if not update:
                    store = Store(Without(store.backend), store.info)
                pull(store, digest, out, format_="raw", seeds=[seed], durable=False)

            by_update, by_frames = bench.contest(
                [
                    Contestant(f"{name}_{where}_update", lambda: pulling(True)),
                    Contestant(f"{name}_{where}_frames", lambda: pulling(False)),
                ]
            )
            most = 1.2 if where == "loopback" else 1.0
            _compare(bench, f"{name}_{where}_update_vs_frames", by_update, by_frames, most)


class Without(Wrapper):
    """A store without updates."""

    def _do(self, verb: str, key: str, action: Any) -> Any:
        return self.inner.get("updates/none") if key.startswith("updates/") else action()


@contextmanager
def _link(url: str) -> Iterator[str]:
    port, target = free_ports(1, 25000), int(url.rstrip("/").rpartition(":")[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._link", str(port), str(target), "200", "20"], env=os.environ
    )
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)
