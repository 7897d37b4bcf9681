"""Push, push again and pull beside cp and qemu-img; create-to-vCPU-running beside a bare qemu; the API under load.

The disk is a full Debian 12 (variant A of scripts/build-image), the guest that is started the tiny one. Creating goes
through the real server: POST /instances until the API says that the guest's processors run, with the image in the
node's cache. The bare qemu gets the same disk as an overlay, memory and machine, and its time ends when QMP says
"running"; it makes no network, no config drive and keeps no record.
"""

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import click
from guest_images.debian_image import corpus
from private_libvirtd import PrivateHost

from benchmarks._harness import ROOT, Bench, Contestant, Failed
from cli.cloud.api import Api
from cli.errors import Problem
from cli.main import sf as command
from tests.servers import free_ports

MEMORY_MIB = 192


def run(bench: Bench) -> None:
    disk = corpus()["A"]
    bench.version("qemu-img", ["qemu-img", "--version"])
    bench.version("sf", [bench.sf, "--version"])
    bench.version("libvirt", ["libvirtd", "--version"])
    _help(bench)
    _images(bench, disk)
    with PrivateHost() as host:
        _server(bench, host, disk)


def _help(bench: Bench) -> None:
    found = bench.measure("help", [bench.sf, "--help"], rounds=9)
    bench.number("help_cpu", found.cpu_s, "s", at_most=0.2)


def _images(bench: Bench, disk: Path) -> None:
    fresh, full = bench.dir("fresh"), bench.dir("full")
    out = bench.dir("out")
    env = {"SF_CACHE_DIR": str(bench.dir("hints")), "SF_CONFIG": "/dev/null"}
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]

    def push(store: Path) -> list[str | Path]:
        return [bench.sf, "image", "push", disk, "debian:12", "-q", "--store", store]

    bench.run(push(full), env=env)
    bench.run([*convert, disk, bench.dir("peer") / "disk.qcow2"])
    pull = [bench.sf, "image", "pull", "debian:12", "-q", "--store", full, "-o"]
    subprocess.run(["cat", disk], stdout=subprocess.DEVNULL, check=True)

    def clean() -> None:
        bench.fresh("out")
        bench.fresh("fresh")

    found = bench.contest(
        [
            Contestant("push", push(fresh), clean, env=env),
            Contestant("push_again", push(full), clean, env=env),
            Contestant("pull_raw", [*pull, out / "a.raw"], clean, env=env),
            Contestant("pull_qcow2", [*pull, out / "a.qcow2"], clean, env=env),
            Contestant("cp", ["cp", "--sparse=always", disk, out / "cp.raw"], clean),
            Contestant("qemu_to_zstd", [*convert, disk, out / "q.qcow2"], clean),
            Contestant(
                "qemu_to_raw",
                ["qemu-img", "convert", "-O", "raw", bench.dir("peer") / "disk.qcow2", out / "q.raw"],
                clean,
            ),
        ]
    )
    by = {m.name: m for m in found}
    bench.ratio("push_vs_qemu", by["push"], by["qemu_to_zstd"])
    bench.ratio("push_vs_cp", by["push"], by["cp"])
    bench.ratio("push_again_vs_push", by["push_again"], by["push"])
    bench.ratio("pull_vs_qemu", by["pull_raw"], by["qemu_to_raw"])
    bench.ratio("pull_vs_cp", by["pull_raw"], by["cp"])
    bench.number("push_peak", by["push"].rss_mib, "MiB", at_most=400)


def _server(bench: Bench, host: PrivateHost, disk: Path) -> None:
    state, port = bench.dir("state"), free_ports(1, first=27000)
    tiny = Path(bench.run([ROOT / "scripts/build-image", "tiny", "--cached"]).strip())
    env = {"SF_STATE_DIR": str(state), "SF_LISTEN": f"127.0.0.1:{port}", "SF_CONFIG": "/dev/null"}
    env["SF_CACHE_DIR"] = str(bench.dir("hints"))
    bench.run([bench.sf, "image", "push", tiny, "tiny", "-q"], env=env)
    with (bench.dir("log") / "serve").open("wb") as log:
        serve = host.popen([bench.sf, "serve"], env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        api = _Guests(bench, host, env)
        network = api.ask("POST", "networks", name="bench", netblock="10.99.0.0/24")["uuid"]
        api.create(network)  # brings the image into the cache, and warms qemu's binary
        api.delete()
        found = bench.contest(
            [
                Contestant("create_to_running", lambda: api.create(network), after=api.delete),
                Contestant("qemu_to_running", lambda: _bare(bench, tiny), after=lambda: _end(bench)),
            ],
            rounds=5,
        )
        create, bare = (statistics.median(s.result for s in m.samples) for m in found)
        bench.number("create_to_vcpu", create, "s")
        bench.number("bare_qemu_to_vcpu", bare, "s")
        bench.ratio("create_vs_qemu", create, bare)
        api.create(network)
        _under_load(bench, api, disk, env)
        api.delete()
        api.ask("DELETE", "networks", network)
        time.sleep(1)
    finally:
        for child in _below(serve.pid):
            subprocess.run(["kill", "-INT", str(child)], check=False)
        serve.wait(30)


def _below(pid: int) -> list[int]:
    """nsenter's child: the server."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class _Guests:
    """Requests from inside the private machine, whose loopback the server listens on, timed where they are made."""

    def __init__(self, bench: Bench, host: PrivateHost, env: dict[str, str]) -> None:
        self._bench, self._host, self._env = bench, host, env
        self._uuid = ""
        os.environ.update(env)
        namespace = os.open(f"/proc/{host.pid}/ns/net", os.O_RDONLY)
        _setns(namespace)
        os.close(namespace)
        self._context = click.Context(command, obj={"api_url": f"http://{env['SF_LISTEN']}"})
        deadline = time.monotonic() + 60
        while True:
            try:
                self._api = self._new()
                self.ask("GET", "instances")
                return
            except Problem as error:
                if time.monotonic() > deadline:
                    log = (bench.dir("log") / "serve").read_text()[-2000:]
                    raise Failed(f"sf serve does not answer: {error}\n{log}") from error
                time.sleep(0.1)

    def _new(self) -> Api:
        with self._context:
            return Api()

    def ask(self, method: str, *path: str, **body: object) -> dict:
        return self._api(method, *path, **body)

    def create(self, network: str) -> float:
        """Seconds from the request until the guest's processors run."""
        self._api = self._new()  # a forked child must not share its parent's connection
        self.ask("GET", "instances")
        name = f"g{secrets.token_hex(4)}"
        started = time.perf_counter()
        body = {"name": name, "cpus": 1, "memory": MEMORY_MIB, "disk": [{"base": "tiny"}]}
        made = self.ask("POST", "instances", **body, network=[{"network_uuid": network}])
        while True:
            found = self.ask("GET", "instances", made["uuid"])
            if found["state"] == "created" and found["power_state"] == "on":
                return time.perf_counter() - started
            if found["state"].endswith("error"):
                raise Failed(f"the guest: {found['error_message']}")
            time.sleep(0.005)

    def delete(self) -> None:
        """Everything there is, until it is gone."""
        for found in self.ask("GET", "instances"):
            self.ask("DELETE", "instances", found["uuid"])
        while self.ask("GET", "instances"):
            time.sleep(0.05)


def _setns(descriptor: int) -> None:
    """os.setns is Python 3.12's."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "setns")


def _bare(bench: Bench, image: Path) -> float:
    """Seconds from nothing to a running qemu of the same guest."""
    where = bench.fresh("bare")
    started = time.perf_counter()
    overlay = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(image),
        "-F",
        "qcow2",
        str(where / "o.qcow2"),
    ]
    subprocess.run(overlay, check=True)
    argv = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", str(MEMORY_MIB), "-nodefaults"]
    argv += [
        "-display",
        "none",
        "-serial",
        f"file:{where}/console",
        "-pidfile",
        str(where / "pid"),
        "-daemonize",
    ]
    argv += ["-drive", f"file={where}/o.qcow2,if=virtio", "-qmp", f"unix:{where}/qmp,server=on,wait=off"]
    subprocess.run(argv, check=True)
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(str(where / "qmp"))
        lines = qmp.makefile("rw")
        lines.readline()
        while True:
            for word in ("qmp_capabilities", "query-status"):
                lines.write(json.dumps({"execute": word}) + "\n")
                lines.flush()
                answer = json.loads(lines.readline())
            if answer.get("return", {}).get("running"):
                return time.perf_counter() - started


def _end(bench: Bench) -> None:
    pid = bench.dir("bare") / "pid"
    if pid.exists():
        os.kill(int(pid.read_text()), 9)
        pid.unlink()


def _under_load(bench: Bench, api: _Guests, disk: Path, env: dict[str, str]) -> None:
    """GET /instances ten times a second: idle, then while pushes of the disk run on the same machine."""

    def sample(enough: Callable[[int], bool]) -> list[float]:
        taken: list[float] = []
        while not enough(len(taken)):
            started = time.perf_counter()
            api.ask("GET", "instances")
            taken.append(time.perf_counter() - started)
            time.sleep(max(0.0, 0.1 - taken[-1]))
        return taken

    idle = sample(lambda count: count >= 30)
    busy: list[float] = []
    while len(busy) < 40:  # one push may be over before there are enough
        store = bench.fresh("load")
        argv = [bench.sf, "image", "push", str(disk), "load", "-q", "--store", str(store)]
        with subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.DEVNULL) as push:
            busy += sample(lambda _, push=push: push.poll() is not None)
        if push.returncode:
            raise Failed(f"the push ended with {push.returncode}")
        shutil.rmtree(store)
    bench.number("api_idle_median", statistics.median(idle) * 1000, "ms")
    bench.number("api_during_push_median", statistics.median(busy) * 1000, "ms", at_most=50)
    bench.number("api_during_push_p95", statistics.quantiles(busy, n=20)[-1] * 1000, "ms")
    bench.number("api_during_push_samples", len(busy))
