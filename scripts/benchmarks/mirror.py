"""`sf mirror serve` beside nginx on a thousand frames; its memory with 500 slow clients; a qcow2 beside a pull.

Both servers have one worker process for each core of the machine, share these cores with the client, and serve the
same files; they take turns. The memory of `sf mirror serve` is that of all its processes: the peak of each (VmHWM),
begun anew before the slow clients come, added up, so that what they share counts more than once. The bound is what
docs/howto/mirror.md and debian/sf-images.sf-mirror.service give it: 512 MiB for each worker.
"""

import contextlib
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from guest_images.debian_image import corpus

from benchmarks._harness import Bench, Contestant
from imagestore.backends.directory import Directory
from imagestore.formats.keys import PACKS
from imagestore.store.store import Store
from tests.servers import free_ports
from tests.web import nginx

FRAMES = 1000
SLOW_CLIENTS = 500
SECONDS = 5
WORKERS = os.cpu_count() or 1
MEMORY_MAX_MIB = 512 * WORKERS


def run(bench: Bench) -> None:
    bench.version("nginx", ["nginx", "-v"])
    bench.version("wrk", ["dpkg-query", "-W", "wrk"])
    state, out = bench.dir("state"), bench.dir("out")
    env = {"SF_STATE_DIR": str(state), "SF_CACHE_DIR": str(bench.dir("hints")), "SF_CONFIG": "/dev/null"}
    bench.run([bench.sf, "image", "push", corpus()["A"], "debian:12", "--arch", "x86_64", "-q"], env=env)
    script = bench.dir("wrk") / "frames.lua"
    mean_bytes = _frames(state / "store", script)
    bench.number("workers_of_each", WORKERS)
    with (
        _serving(bench.sf, env) as (url, pid),
        nginx(state / "store", bench.dir("nginx"), workers=WORKERS) as peer,
    ):
        bench.number("serve_memory_idle", _memory_mib(pid), "MiB")

        def load(target: str) -> float:
            text = subprocess.check_output(
                ["wrk", "-t1", "-c16", f"-d{SECONDS}s", "-s", script, target], text=True
            )
            found = re.search(r"Requests/sec:\s+([\d.]+)", text)
            if found is None or "Non-2xx" in text:
                raise RuntimeError(text)
            return float(found[1])

        contestants = [Contestant("sf_serve", lambda: load(url)), Contestant("nginx", lambda: load(peer))]
        rates = [
            sorted(float(sample.result) for sample in found.samples)[len(found.samples) // 2]
            for found in bench.contest(contestants)
        ]
        bench.number("frame_bytes", mean_bytes, "B")
        bench.number("serve_requests", rates[0], "/s")
        bench.number("nginx_requests", rates[1], "/s")
        bench.number("serve_vs_nginx", rates[0] / rates[1], "x", at_least=0.5)
        pack = max((state / "store/packs").glob("*/*"), key=lambda path: path.stat().st_size)
        disk = "images/debian/12/amd64/disk.qcow2"
        for what, path in (("pack", f"packs/{pack.parent.name}/{pack.name}"), ("disk", disk)):
            memory_mib = _slow_clients(url, path, pid)
            bench.number(
                f"serve_memory_{SLOW_CLIENTS}_slow_{what}", memory_mib, "MiB", at_most=MEMORY_MAX_MIB
            )
        stream, pull = bench.contest(
            [
                Contestant("qcow2_streamed", ["curl", "-sSf", "-o", out / "s.qcow2", url + disk]),
                Contestant(
                    "qcow2_pulled",
                    [bench.sf, "image", "pull", "debian:12", "--arch", "x86_64", "-q", "-o", out / "p.qcow2"],
                    env=env,
                ),
            ]
        )
        bench.ratio("qcow2_streamed_vs_pulled", stream, pull, at_most=1.0)
        subprocess.run(["cmp", out / "s.qcow2", out / "p.qcow2"], check=True)


def _frames(store: Path, script: Path) -> float:
    """A wrk script that asks for frames of the store in turn; their mean size."""
    opened = Store.open(Directory(store))
    record = next(iter(opened.names.list()))
    layout = opened.layout(record.images["x86_64"])
    rows = list(
        zip(
            layout.frames["pack"],
            layout.frames["offset"].tolist(),
            layout.frames["size"].tolist(),
            strict=True,
        )
    )
    rows = (rows * (FRAMES // len(rows) + 1))[:FRAMES]
    asked = ",".join(
        f'{{"/{PACKS.key(layout.packs[pack])}","bytes={offset}-{offset + size - 1}"}}'
        for pack, offset, size in rows
    )
    script.write_text(
        f"local f={{{asked}}}\nlocal i=0\n"
        'request=function() i=i%#f+1; return wrk.format("GET",f[i][1],{Range=f[i][2]}) end\n'
    )
    return sum(size for _, _, size in rows) / len(rows)


@contextlib.contextmanager
def _serving(sf: Path | str, env: dict[str, str]) -> Iterator[tuple[str, int]]:
    port = free_ports(1, 24000)
    command = [sf, "-q", "mirror", "serve", "--port", str(port), "--requests", "2000"]
    process = subprocess.Popen([*command, "--workers", str(WORKERS)], env=os.environ | env)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "livez", timeout=2):
                break
            time.sleep(0.1)
        time.sleep(1)  # the other workers
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(20)


def _processes(pid: int) -> list[int]:
    """It and all below it."""
    below = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(deeper for child in below for deeper in _processes(int(child)))]


def _memory_mib(pid: int) -> float:
    """The sum of the peaks."""
    texts = [Path(f"/proc/{process}/status").read_text() for process in _processes(pid)]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in texts) / 1024


def _slow_clients(url: str, path: str, pid: int) -> float:
    """Peak memory with clients that ask for a file, each from another place on, and read a little of it."""
    for process in _processes(pid):
        Path(f"/proc/{process}/clear_refs").write_text("5")  # proc(5): the peak is what it is now
    with urllib.request.urlopen(urllib.request.Request(url + path, method="HEAD"), timeout=60) as head:
        step = int(head.headers["content-length"]) // (2 * SLOW_CLIENTS)
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with contextlib.ExitStack() as held:
        clients = []
        for number in range(SLOW_CLIENTS):
            client = held.enter_context(socket.socket())
            client.settimeout(60)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(
                f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={number * step}-\r\n\r\n".encode()
            )
            clients.append(client)
        for _ in range(5):
            time.sleep(1)
            for client in clients:
                if not client.recv(1000):
                    raise RuntimeError("the server hung up on a slow client")
        return _memory_mib(pid)
