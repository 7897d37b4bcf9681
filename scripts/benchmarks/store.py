"""Push, extract and size of the image store beside restic, borg, casync and qemu-img; then on S3 beside aws s3 cp.

The corpus is five full Debian 12 disks (scripts/guest_images/debian_image.py), built once into /tmp/sf-corpus.
Every contestant reads the same raw file from a warm page cache and writes to the same directory. Peers run with their
defaults except where that would be unfair to them or to us: restic and borg read the file again instead of trusting
its times (`--force`, `--files-cache=disabled`), borg has 64-KiB chunks and zstd, nobody encrypts who can do without.

SF_BENCH_ONLY names parts to run, SF_BENCH_PEERS contestants beside sf. SF_BENCH_BESIDE is the path of another checkout
with its .venv: its `sf` takes part as `former`, turn by turn with this one.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Contestant, Measurement, Work
from tests import servers


@dataclass(frozen=True, slots=True)
class Peer:
    """One contestant's commands. `store` is the directory that holds all it keeps."""

    name: str
    store: Path
    init: Callable[[], object]
    push: Callable[[Path, str], list[str]]
    """(disk, name) -> the command."""
    pull: Callable[[str, Path], list[str]]
    """(name, output) -> the command."""
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    def size_bytes(self) -> int:
        """Bytes of all files below the store, without slack of the file system."""
        return sum(p.stat().st_size for p in self.store.rglob("*") if p.is_file() and "cache" not in p.parts)


def _peers(bench: Bench, names: dict[str, Path]) -> dict[str, Peer]:
    work = bench.dir("stores")
    by_path = {path: name for name, path in names.items()}

    def sf(name: str, command: str | Path) -> Peer:
        store = work / name
        env = {
            "SF_CACHE_DIR": str(store / "cache"),
            "SF_CONFIG": "/dev/null",
            "SF_STATE_DIR": str(work / f"state-{name}"),
        }
        flags = ["-q", "--store", str(store)]
        return Peer(
            name,
            store,
            lambda: bench.run([command, "store", "init", str(store)], env=env),
            lambda disk, name: [command, "image", "push", str(disk), f"debian:{name.lower()}", *flags],
            lambda name, out: [
                command, "image", "pull", f"debian:{name.lower()}", "-o", str(out), "--as", "raw", *flags
            ],
            env,
        )  # fmt: skip

    def restic() -> Peer:
        store = work / "restic"
        env = {
            "RESTIC_PASSWORD": "x",
            "RESTIC_CACHE_DIR": str(store / "cache"),
            "RESTIC_REPOSITORY": str(store),
        }
        return Peer(
            "restic",
            store,
            lambda: bench.run(["restic", "init"], env=env),
            lambda disk, name: ["restic", "backup", "--force", "--tag", name, str(disk)],
            lambda name, out: ["restic", "restore", "latest", "--tag", name, "--target", str(out.parent)],
            env,
        )

    def borg() -> Peer:
        store = work / "borg"
        env = {"BORG_BASE_DIR": str(work / "borg-cache"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
        env["BORG_RELOCATED_REPO_ACCESS_IS_OK"] = "yes"
        cut = "--chunker-params=buzhash,14,18,16,4095"
        return Peer(
            "borg",
            store,
            lambda: bench.run(["borg", "init", "-e", "none", str(store)], env=env),
            lambda disk, name: [
                "borg", "create", cut, "-C", "zstd,3", "--files-cache=disabled", f"{store}::{name}", str(disk)
            ],
            lambda name, out: ["borg", "extract", "--sparse", f"{store}::{name}"],
            env,
            bench.dir("out"),
        )  # fmt: skip

    def casync(kib: int) -> Peer:
        store = work / f"casync{kib}"
        flags = [f"--store={store}/chunks", f"--chunk-size={kib * 1024}"]
        return Peer(
            f"casync{kib}",
            store,
            lambda: store.mkdir(),
            lambda disk, name: ["casync", *flags, "make", f"{store}/{name}.caibx", str(disk)],
            lambda name, out: [
                "casync",
                *flags,
                "--punch-holes=yes",
                "extract",
                f"{store}/{name}.caibx",
                str(out),
            ],
        )

    def qemu() -> Peer:
        store = work / "qemu"
        return Peer(
            "qemu_zstd",
            store,
            lambda: store.mkdir(),
            lambda disk, name: [*_CONVERT, str(disk), f"{store}/{by_path.get(disk, name)}.qcow2"],
            lambda name, out: ["qemu-img", "convert", "-O", "raw", f"{store}/{name}.qcow2", str(out)],
        )

    every = [sf("sf", bench.sf), restic(), borg(), casync(64), casync(16), qemu()]
    wanted = os.environ.get("SF_BENCH_PEERS")
    peers = {p.name: p for p in every if wanted is None or p.name in ("sf", *wanted.split())}
    if former := os.environ.get("SF_BENCH_BESIDE"):
        peers["former"] = sf("former", Path(former) / ".venv/bin/sf")
    return peers


# The dense file's partition table speaks of blocks that were left out.
_CUT = ["--input-format", "raw"]
_CONVERT = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]


def _fresh(peer: Peer) -> None:
    """An empty store, and none of its owner's memory of the last one."""
    for path in (peer.store, peer.store.with_name(f"{peer.name}-cache")):
        shutil.rmtree(path, ignore_errors=True)
    peer.init()


def _restore(peer: Peer, kept: Path) -> None:
    """The store as it was when `kept` was copied, its owner's caches with it."""
    for path in (peer.store, peer.store.with_name(f"{peer.name}-cache")):
        shutil.rmtree(path, ignore_errors=True)
        if (kept / path.name).exists():
            shutil.copytree(kept / path.name, path, symlinks=True)


def _keep(peer: Peer, kept: Path) -> None:
    for path in (peer.store, peer.store.with_name(f"{peer.name}-cache")):
        if path.exists():
            shutil.copytree(path, kept / path.name, symlinks=True)


def _contestant(peer: Peer, name: str, work: Work, before: Callable[[], object]) -> Contestant:
    return Contestant(name, work, before=before, env=peer.env, cwd=peer.cwd)


def _dense(disk: Path, output: Path) -> None:
    """The blocks of a disk that are not zero, one after another: no holes, nothing else changed."""
    with disk.open("rb") as source, output.open("wb") as target:
        while data := source.read(
            16 << 20
        ):  # in pieces: every contestant's peak starts at this process's own
            blocks = np.frombuffer(data, np.uint8).reshape(-1, 4096)
            target.write(blocks[blocks.any(axis=1)].tobytes())


def run(bench: Bench) -> None:
    bench.say("the corpus (about 90 s a disk where it is not built yet)")
    disks = corpus()
    for name, argv in (("restic", ["restic", "version"]), ("borg", ["borg", "--version"]),
                       ("casync", ["casync", "--version"]), ("qemu-img", ["qemu-img", "--version"]),
                       ("sf", [bench.sf, "--version"])):  # fmt: skip
        bench.version(name, argv)
    data = bench.dir("data")
    zlib, dense = data / "A-zlib.qcow2", data / "dense.raw"
    bench.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", disks["A"], zlib])
    _dense(disks["A"], dense)
    bench.number("corpus_a_data", dense.stat().st_size, "B")
    for path in (*disks.values(), zlib, dense):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    peers = _peers(bench, disks)
    only = os.environ.get("SF_BENCH_ONLY", "push again b whole extract seed s3").split()
    if "push" in only:
        _push(bench, peers, disks["A"], zlib, dense)
    if "again" in only or "b" in only:
        _again_and_b(bench, peers, disks, only)
    if "whole" in only:
        _whole(bench, peers, disks)
    if "extract" in only or "seed" in only:
        _extract(bench, peers, disks)
    if "s3" in only:
        _s3(bench, peers["sf"], disks)


def _ratios(bench: Bench, name: str, found: dict[str, Measurement], **at_most: float) -> None:
    """sf beside each of the others; limits by the other's name."""
    for other, measured in found.items():
        if other != "sf":
            short = other.removesuffix("_zstd")
            bench.ratio(f"{name}_vs_{short}", found["sf"], measured, at_most=at_most.get(short))


def _push(bench: Bench, peers: dict[str, Peer], a: Path, zlib: Path, dense: Path) -> None:
    sf, restic = peers["sf"], peers.get("restic")

    def pushing(name: str, peer: Peer, disk: Path) -> Contestant:
        return _contestant(peer, name, peer.push(disk, "A"), lambda: _fresh(peer))

    found = bench.contest(
        [
            *(pushing(f"push_a_{peer.name}", peer, a) for peer in peers.values()),
            pushing("push_a_zlib_sf", sf, zlib),
            _contestant(sf, "push_dense_sf", [*sf.push(dense, "A"), *_CUT], lambda: _fresh(sf)),
            *([pushing("push_dense_restic", restic, dense)] if restic else []),
        ]
    )
    by = {m.name: m for m in found}
    ours = by["push_a_sf"]
    _ratios(bench, "push", {name: by[f"push_a_{name}"] for name in peers}, restic=0.45, qemu=0.75)
    bench.ratio("push_zlib_vs_raw", by["push_a_zlib_sf"], ours, at_most=1.35)
    if restic:
        bench.ratio("push_dense_vs_restic", by["push_dense_sf"], by["push_dense_restic"], at_most=0.6)
    bench.number("push_peak", ours.rss_mib, "MiB", at_most=400)


def _again_and_b(bench: Bench, peers: dict[str, Peer], disks: dict[str, Path], only: list[str]) -> None:
    """A once more into a store that has it, and B after A."""
    kept = bench.fresh("kept")
    deduplicating = {name: peer for name, peer in peers.items() if name != "qemu_zstd"}
    sizes = {}
    for peer in deduplicating.values():
        bench.say(f"A into {peer.name}")
        _fresh(peer)
        bench.run(peer.push(disks["A"], "A"), env=peer.env, cwd=peer.cwd)
        sizes[peer.name] = peer.size_bytes()
        _keep(peer, kept)

    def onto_a(prefix: str, disk: str, name: str) -> dict[str, Measurement]:
        found = bench.contest(
            [
                _contestant(
                    peer,
                    f"{prefix}_{peer.name}",
                    peer.push(disks[disk], name),
                    lambda p=peer: _restore(p, kept),
                )
                for peer in deduplicating.values()
            ]
        )
        return {m.name.removeprefix(f"{prefix}_"): m for m in found}

    if "again" in only:
        _ratios(bench, "again", onto_a("push_a_again", "A", "A-again"), restic=0.35)
    if "b" in only:
        _ratios(bench, "b", onto_a("push_b", "B", "B"), restic=0.35)
        added = {name: peer.size_bytes() - sizes[name] for name, peer in deduplicating.items()}
        for name, count in added.items():
            bench.number(f"b_new_bytes_{name}", count, "B")
        if "casync16" in added:
            bench.ratio("b_new_vs_casync16", added["sf"], added["casync16"], at_most=0.95)
    shutil.rmtree(kept)


def _whole(bench: Bench, peers: dict[str, Peer], disks: dict[str, Path]) -> None:
    """The size of each store with all five images; what A2 costs by the way."""
    sizes = {}
    for peer in peers.values():
        bench.say(f"all five into {peer.name}")
        _fresh(peer)
        last = 0
        for name, disk in disks.items():
            bench.run(peer.push(disk, name), env=peer.env, cwd=peer.cwd)
            size = peer.size_bytes()
            if peer.name == "sf":
                bench.number(f"sf_adds_{name.lower()}", size - last, "B")
            last = size
        sizes[peer.name] = last
        bench.number(f"whole_{peer.name}", last, "B")
    if peer_sizes := [size for name, size in sizes.items() if name not in ("sf", "former")]:
        bench.ratio("whole_vs_best_peer", sizes["sf"], min(peer_sizes), at_most=0.95)


def _extract(bench: Bench, peers: dict[str, Peer], disks: dict[str, Path]) -> None:
    """A out of each store to a raw file; then B in part from A."""
    out = bench.dir("out")
    for peer in peers.values():
        bench.say(f"A into {peer.name}")
        _fresh(peer)
        bench.run(peer.push(disks["A"], "A"), env=peer.env, cwd=peer.cwd)

    def pulling(peer: Peer) -> Contestant:
        work = peer.pull("A", out / "A.raw")
        return _contestant(peer, f"extract_a_{peer.name}", work, lambda: bench.fresh("out"))

    found = {
        m.name.removeprefix("extract_a_"): m for m in bench.contest([pulling(p) for p in peers.values()])
    }
    _ratios(bench, "extract", found, borg=0.30, qemu=1.0)
    sf = peers["sf"]
    before = sf.size_bytes()
    bench.run(sf.push(disks["B"], "B"), env=sf.env)
    added = sf.size_bytes() - before
    argv = [*sf.pull("B", out / "B.raw"), "--seed", f"debian:a={disks['A']}", "--format", "json"]

    result = json.loads(bench.run(argv, env=sf.env))
    bench.number("seeded_fetched_bytes", result["fetched_bytes"], "B")
    bench.ratio("seeded_vs_added", result["fetched_bytes"], added, at_most=1.1)
    bench.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", disks["B"], out / "B.raw"])


class _Counter(BaseHTTPRequestHandler):
    """Passes every request on, byte for byte, and counts it."""

    protocol_version = "HTTP/1.1"
    port = 0
    seen: list[str] = []  # noqa: RUF012 - set anew for each server

    def forward(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def counting(port: int) -> Iterator[tuple[int, list[str]]]:
    """A port in front of an S3 server's, and the list of requests that went through it."""
    seen: list[str] = []
    handler = type("Counter", (_Counter,), {"port": port, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        server.server_close()


def _aws(bench: Bench) -> Path:
    """awscli in an environment of its own: its pins would fight with ours."""
    home = Path.home() / ".cache/sf-build/awscli"
    if not (home / "bin/aws").exists():
        bench.run([sys.executable, "-m", "venv", home])
        bench.run([home / "bin/pip", "install", "-q", "awscli"])
    return home / "bin/aws"


def _s3(bench: Bench, sf: Peer, disks: dict[str, Path]) -> None:
    """The same image on SeaweedFS: requests, and pull beside `aws s3 cp` of a zstd qcow2 and its conversion."""
    out = bench.fresh("out")
    aws = _aws(bench)
    bench.version("aws", [str(aws), "--version"])
    with ExitStack() as stack:
        server = stack.enter_context(servers.seaweedfs(bench.dir("s3")))
        env = {**sf.env, **servers.credentials(), "AWS_DEFAULT_REGION": "us-east-1"}
        port = int(server.endpoint.rpartition(":")[2])
        bucket = server.bucket()

        def url(through: int) -> str:
            endpoint = quote(f"http://127.0.0.1:{through}", safe="")
            return f"s3://{bucket}/store?endpoint_url={endpoint}&region=us-east-1"

        def command(through: int, *words: str) -> list[str]:
            return [bench.sf, "image", *words, "-q", "--store", url(through)]

        _fresh(sf)
        with counting(port) as (counted, seen):
            bench.run([bench.sf, "store", "init", url(counted)], env=env)
            for what, limit, words in (
                ("push", 40, ("push", str(disks["A"]), "debian:a")),
                ("again", 6, ("push", str(disks["A"]), "debian:a")),
                ("pull", 80, ("pull", "debian:a", "-o", str(out / "A.raw"))),
            ):
                seen.clear()
                bench.run(command(counted, *words), env=env)
                bench.number(f"s3_requests_{what}", len(seen), "requests", at_most=limit)
                bench.say(f"{what}: {_kinds(seen)}")
        bench.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", disks["A"], out / "A.raw"])
        qcow2 = bench.dir("data") / "A-zstd.qcow2"
        bench.run([*_CONVERT, disks["A"], qcow2])
        s3 = [str(aws), "--endpoint-url", server.endpoint, "s3", "cp", "--quiet"]
        bench.run([*s3, qcow2, f"s3://{bucket}/A.qcow2"], env=env)
        fetch = f'"$@" s3://{bucket}/A.qcow2 A.qcow2 && qemu-img convert -f qcow2 -O raw A.qcow2 A.raw'
        found = bench.contest(
            [
                Contestant(
                    "s3_pull_sf",
                    command(port, "pull", "debian:a", "-o", str(out / "A.raw")),
                    lambda: bench.fresh("out"),
                    env=env,
                ),
                Contestant(
                    "s3_pull_aws",
                    ["sh", "-c", fetch, "sh", *s3],
                    lambda: bench.fresh("out"),
                    env=env,
                    cwd=out,
                ),
            ]
        )
        bench.ratio("s3_pull_vs_aws", found[0], found[1], at_most=1.0)


def _kinds(seen: list[str]) -> str:
    """Requests by verb and tree of the store."""
    kinds: dict[str, int] = {}
    for line in seen:
        verb, path = line.split(" ", 1)
        tree = path.partition("/store/")[2].partition("/")[0] or path.partition("?")[2][:20] or "bucket"
        kinds[f"{verb} {tree}"] = kinds.get(f"{verb} {tree}", 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
