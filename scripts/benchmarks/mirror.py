"""`sf mirror serve` beside nginx on a thousand frames; its memory with 500 slow clients; a qcow2 beside a pull."""

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
from imagestore.directory import Directory
from imagestore.store import Store, derived_key
from tests.servers import free_ports
from tests.web import nginx

FRAMES = 1000
SLOW_CLIENTS = 500
SECONDS = 5


def run(bench: Bench) -> None:
    bench.version("nginx", ["nginx", "-v"])
    bench.version("wrk", ["dpkg-query", "-W", "wrk"])
    state, out = bench.dir("state"), bench.dir("out")
    env = {"SF_STATE_DIR": str(state), "SF_CACHE_DIR": str(bench.dir("hints")), "SF_CONFIG": "/dev/null"}
    bench.run([bench.sf, "image", "push", corpus()["A"], "debian:12", "--arch", "x86_64", "-q"], env=env)
    script = bench.dir("wrk") / "frames.lua"
    mean_bytes = _frames(state / "store", script)
    with _serving(bench.sf, env) as (url, pid), nginx(state / "store", bench.dir("nginx")) as peer:

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
        bench.number("serve_rss_idle", _rss_mib(pid), "MiB")
        bench.number("serve_rss_500_slow_clients", _slow_clients(url, state / "store", pid), "MiB")
        stream, pull = bench.contest(
            [
                Contestant(
                    "qcow2_streamed",
                    ["curl", "-sSf", "-o", out / "s.qcow2", f"{url}images/debian/12/amd64/disk.qcow2"],
                ),
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
        zip(layout.frame_packs, layout.frame_offsets.tolist(), layout.frame_sizes.tolist(), strict=True)
    )
    rows = (rows * (FRAMES // len(rows) + 1))[:FRAMES]
    asked = ",".join(
        f'{{"/{derived_key("packs", layout.packs[pack])}","bytes={offset}-{offset + size - 1}"}}'
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
    process = subprocess.Popen(command, env=os.environ | env)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "livez", timeout=2):
                break
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(20)


def _rss_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def _slow_clients(url: str, store: Path, pid: int) -> float:
    """Peak memory with clients that ask for a whole pack and read a little of it."""
    pack = max((store / "packs").glob("*/*"), key=lambda path: path.stat().st_size)
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    request = f"GET /packs/{pack.parent.name}/{pack.name} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    with contextlib.ExitStack() as held:
        clients = []
        for _ in range(SLOW_CLIENTS):
            client = held.enter_context(socket.create_connection((host, int(port)), 30))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(request)
            clients.append(client)
        for _ in range(5):
            time.sleep(1)
            for client in clients:
                client.recv(1000)
        return _rss_mib(pid)
