"""A store with 2,000 images and 5 million chunks, a client that never saw it, and twelve generations of one image.

The 2,000 images are synthetic: manifests, index parts, hooks and names of random chunks, whose packs nobody reads.
Beside them lies a real Debian 12 (corpus A) under a name of its own, not the newest; the same image alone is the small
store. Generations: 300 changes of 1 to 64 blocks at random places of A each time, twelve times.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Contestant
from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Object
from imagestore.backends.wrappers import Wrapper
from imagestore.formats import index
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest
from imagestore.formats.keys import HOOKS_KEY, INDEX, MANIFESTS
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import Footer
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.index import read_hooks
from imagestore.store.store import Store

IMAGES, CHUNKS, LENGTH = 2000, 2500, 32768
GENERATIONS, CHANGES = 12, 300


class Recorder(Wrapper):
    """Remembers what was asked for, and how many bytes came."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, str, int]] = []

    def _do(self, verb: str, key: str, action: Any) -> Any:
        found = action()
        self.seen.append((verb, key, len(found.data) if isinstance(found, Object) else 0))
        return found

    def bytes_of(self, *trees: str) -> int:
        return sum(count for _, key, count in self.seen if key.partition("/")[0] in trees)


def run(bench: Bench) -> None:
    disks = corpus()
    small, large = bench.dir("small"), bench.dir("large")
    bench.say(f"a store of {IMAGES} images with {CHUNKS} chunks each")
    bench.apart(lambda: _prepare(bench, small, large, disks["A"]))
    _open_and_push(bench, small, large, disks["A"])
    _stranger(bench, small, large, disks["B"])
    _reader(bench, large)
    _generations(bench, disks["A"])


def _prepare(bench: Bench, small: Path, large: Path, disk: Path) -> None:
    for place in (small, large):
        push(Store.init(Directory(place)), disk, "debian", "12", cache=bench.dir(f"hints-{place.name}"))
    _fill(large)


def _fill(place: Path) -> None:
    """The synthetic images, written without fsync: nothing here has to survive."""
    store = Store.open(Directory(place))
    random = np.random.default_rng(1)
    hooks, _ = read_hooks(store)
    parts, sizes = list(hooks.parts), list(hooks.sizes)
    owners, keys = [hooks.part_of_hook], [hooks.keys]

    def write(key: str, data: bytes) -> None:
        path = place / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for number in range(IMAGES):
        ids: Ids = random.integers(0, 256, (CHUNKS, 32), np.uint8)
        lengths = np.full(CHUNKS, LENGTH, np.uint32)
        frames = CHUNKS // 10
        footer = Footer(
            codecs=np.ones(frames, np.uint8),
            sizes=np.full(frames, 100_000, np.uint32),
            plain_sizes=np.full(frames, 10 * LENGTH, np.uint32),
            hashes=random.integers(0, 256, (frames, 32), np.uint8),
            counts=np.full(frames, 10, np.uint32),
            lengths=lengths,
            ids=ids,
        )
        part = index.IndexPart(((Digest.of(footer.encode()), footer),))
        data = part.encode()
        name = Digest.of(data)
        write(INDEX.key(name), data)
        owners.append(np.full(len(part.hooks), len(parts), np.uint32))
        keys.append(part.hooks)
        parts.append(name)
        sizes.append(len(data))
        manifest = Manifest(
            size_bytes=CHUNKS * LENGTH,
            architecture="x86_64",
            chunker=store.info.chunker,
            disk_id=Digest.of(ids.tobytes()),
            run_offsets=np.zeros(1, np.uint64),
            run_chunks=np.array([CHUNKS], np.uint32),
            lengths=lengths,
            ids=ids,
        )
        encoded = manifest.encode()
        write(MANIFESTS.key(Digest.of(encoded)), encoded)
        store.names.set(f"synthetic-{number % 200}", f"v{number // 200}", "x86_64", Digest.of(encoded))
    found = index.Hooks(tuple(parts), tuple(sizes), np.concatenate(owners), np.concatenate(keys))
    write(HOOKS_KEY, found.encode())


def _open_and_push(bench: Bench, small: Path, large: Path, disk: Path) -> None:
    def resolve(place: Path, name: str) -> list[str]:
        return [bench.sf, "image", "history", name, "--store", str(place), "--format", "name"]

    def pushing(place: Path) -> Contestant:
        env = {"SF_CACHE_DIR": str(bench.dir(f"hints-{place.name}")), "SF_CONFIG": "/dev/null"}
        argv = [bench.sf, "image", "push", str(disk), "debian:again", "-q", "--store", str(place)]
        return Contestant(f"push_again_{place.name}", argv, env=env)

    opened = bench.measure("open_and_resolve", resolve(large, "synthetic-7:v3"), rounds=5)
    bench.number("open_and_resolve_large", opened.wall_s, "s", at_most=0.3)
    alone, among = bench.contest([pushing(small), pushing(large)])
    bench.ratio("push_again_large_vs_small", among, alone, at_most=2.0)
    bench.number("push_again_large_peak", among.rss_mib, "MiB", at_most=400)


def _stranger(bench: Bench, small: Path, large: Path, disk: Path) -> None:
    """B pushed under a new name by a client without any hints, to copies of both stores."""

    def arrive(place: Path) -> dict[str, int]:
        recorder = Recorder(Directory(place))
        result = push(Store.open(recorder), disk, "newcomer", "1", cache=bench.fresh("hints-none"))
        return {
            "written": result.written_bytes,
            "read": sum(count for verb, _, count in recorder.seen if verb == "get"),
        }

    told = {}
    for place in (small, large):
        copy = bench.dir("copies") / place.name
        shutil.copytree(place, copy)
        told[place.name] = bench.measure(
            f"stranger_{place.name}", lambda copy=copy: arrive(copy), rounds=1
        ).result
        shutil.rmtree(copy)
    bench.number("stranger_reads", told["large"]["read"], "B", at_most=16 << 20)
    bench.ratio("stranger_adds_vs_small", told["large"]["written"], told["small"]["written"], at_most=1.05)


def _reader(bench: Bench, large: Path) -> None:
    """A pull asks for one name, one manifest, one layout and ranges of that image's packs."""
    store = Store.open(recorder := Recorder(Directory(large)))
    digest = store.names.get("debian", "12").digest("x86_64")
    own = {f"packs/{p.hex()[:2]}/{p.hex()}" for p in store.layout(digest).packs}
    pull(store, digest, bench.dir("out") / "a.raw", format_="raw", durable=False)
    packs = {key for _, key, _ in recorder.seen if key.startswith("packs/")}
    others = {key for _, key, _ in recorder.seen if key.partition("/")[0] in ("index", "hooks")} | (
        packs - own
    )
    bench.number("pull_foreign_objects", len(others), at_most=0)
    bench.number("pull_metadata", recorder.bytes_of("names", "manifests", "layouts"), "B")


def _generations(bench: Bench, disk: Path) -> None:
    """Fragmentation: the newest of twelve generations, pulled from its store and from a store of its own."""
    random = np.random.default_rng(5)
    path, out = bench.dir("generations") / "disk.raw", bench.fresh("out")
    bench.run(["cp", "--sparse=always", disk, path])
    blocks = np.memmap(path, np.uint8, "r+").reshape(-1, 4096)
    used = np.concatenate(
        [s + np.flatnonzero(blocks[s : s + 4096].any(axis=1)) for s in range(0, len(blocks), 4096)]
    )
    old, new = bench.dir("generations-old"), bench.dir("generations-new")
    store = Store.init(Directory(old))
    for number in range(GENERATIONS + 1):
        bench.say(f"generation {number}")
        if number:
            for at, run_ in zip(
                random.choice(len(used), CHANGES), random.integers(1, 64, CHANGES), strict=True
            ):
                target = used[at : at + run_]
                source = int(random.integers(0, len(used) - 64))
                blocks[target] = blocks[used[source : source + len(target)]] ^ np.uint8(number)
        digest = push(store, path, "disk", cache=bench.dir("hints-generations")).digest
    fresh = Store.init(Directory(new))
    push(fresh, path, "disk", cache=bench.dir("hints-fresh"))
    many = pull(store, digest, out / "many.raw", format_="raw", durable=False)
    one = pull(fresh, digest, out / "one.raw", format_="raw", durable=False)
    stored = int(fresh.layout(digest).frames["size"].sum())
    bench.ratio("generations_fetched_vs_stored", many.fetched_bytes, stored, at_most=1.3)
    bench.ratio("generations_requests_vs_fresh", many.requests, one.requests, at_most=2.0)
    total = sum(p.stat().st_size for p in old.rglob("*") if p.is_file())
    bench.number("generations_store", total, "B")
