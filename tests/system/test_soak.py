"""An hour of everything at once: strangers, floods, a disk that fills, a bucket that fails; guests count on through it.

SF_SOAK_S says for how many seconds; `scripts/test --all` means an hour, CI half a minute.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import drills, flaky
from tests.servers import Server, credentials, seaweedfs
from tests.system.boot_sector import boot_sector
from tests.system.cluster import WORLD, Cluster
from tests.system.machine import Machine, within

SOAK_S = int(os.environ.get("SF_SOAK_S") or (3600 if drills.everything() else 30))
FAULTS = 0.08
STATE_MIB = 700
COUNTER = "#!/bin/sh\ni=0\nwhile sleep 1; do i=$((i + 1)); echo COUNT $i; done\n"

pytestmark = [pytest.mark.system, pytest.mark.drill, pytest.mark.timeout(SOAK_S + 1200)]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Server]:
    with seaweedfs(tmp_path) as server:
        yield server


def small_disk(machine: Machine) -> None:
    """The state directory is a file system of its own that a file can fill."""
    machine.state.mkdir()
    machine.host.run(
        ["mount", "-t", "tmpfs", "-o", f"size={STATE_MIB}m,mode=755", "none", str(machine.state)]
    )


def counted(cluster: Cluster, name: str) -> int:
    """How far a guest has counted, by its console."""
    numbers = re.findall(r"COUNT (\d+)", cluster.server.sf("instance", "console", name, check=False).stdout)
    return int(numbers[-1]) if numbers else 0


def running(cluster: Cluster) -> dict[str, set[str]]:
    """The qemu processes of each node."""
    return {
        name: set(node.host.run(["pgrep", "qemu"], check=False).stdout.split())
        for name, node in cluster.nodes.items()
    }


def figures(cluster: Cluster) -> dict[str, float]:
    """Of the server's process: resident MiB, descriptors, threads."""
    (pid,) = cluster.server.host.run(["pgrep", "-f", r"^\S*python\S* \S*bin/sf serve"]).stdout.split()[:1]
    status = cluster.server.host.run(["cat", f"/proc/{pid}/status"]).stdout
    found = {word: float(re.findall(rf"{word}:\s+(\d+)", status)[0]) for word in ("VmRSS", "Threads")}
    descriptors = cluster.server.host.run(["ls", f"/proc/{pid}/fd"]).stdout.split()
    return {"rss_mib": found["VmRSS"] / 1024, "descriptors": len(descriptors), "threads": found["Threads"]}


def restarted(cluster: Cluster) -> float:
    """Seconds until the server answers again after it was asked to end."""
    cluster.server.signal(signal.SIGTERM)
    began = time.monotonic()
    cluster.server.start()
    return time.monotonic() - began


def test_guests_count_on_through_strangers_floods_a_full_disk_and_a_failing_bucket(
    tmp_path: Path, bucket: Server, tiny_image: Path
) -> None:
    url = f"s3://{bucket.bucket()}/?endpoint_url={quote(f'http://{WORLD}:9000', safe='')}&region=us-east-1"
    stop, log = tmp_path / "stop", tmp_path / "stranger.log"
    port = int(bucket.endpoint.rpartition(":")[2])
    with ExitStack() as stack:
        world: list[dict[str, int]] = []

        def prepare(cluster: Cluster, machine: Machine) -> None:
            if not world:  # the first machine is plugged in: the world has its address
                listener = flaky.listen(WORLD, 9000, Path(f"/proc/{cluster.world.pid}/ns/net"))
                world.append(stack.enter_context(flaky.proxy(listener, port, FAULTS, drills.seed())))
            small_disk(machine)

        cluster = Cluster(
            stack,
            tmp_path,
            tiny_image,
            ("n1", "n2"),
            prepare,
            SF_STORE=url,
            SF_UPLINK="",
            SF_FLOATING_POOL="",
            SF_DISK_RESERVE="0",  # a full disk is what is tried
            SF_DISK_RATIO="100",
            **credentials(),
        )
        server = cluster.server
        for name, repeat in (("sector", False), ("flood", True)):
            (tmp_path / f"{name}.raw").write_bytes(boot_sector("ABCDEFGH\r\n", repeat=repeat))
            server.sf("image", "push", str(tmp_path / f"{name}.raw"), f"{name}:1")
        server.sf("network", "create", "lan", "10.42.0.0/24")
        (tmp_path / "count.sh").write_text(COUNTER)
        guests = [f"count-{node}" for node in cluster.nodes]
        for name in guests:
            words = ["--image", "tiny:1", "--network", "lan", "--memory", "128", "--on", name[-2:]]
            server.sf("instance", "create", name, *words, "--user-data", str(tmp_path / "count.sh"))
        for name in guests:
            try:
                within(240, lambda n=name: counted(cluster, n) > 0, f"{name} counts")  # type: ignore[misc]
            except AssertionError:
                for words in (("show", name), ("events", name), ("console", name)):
                    print(server.sf("instance", *words, check=False).stdout[-3000:])
                raise
        qemus = running(cluster)
        first_start = restarted(cluster)
        within(60, lambda: len(cluster.alive()) == 2, "both nodes are there")
        first = figures(cluster)

        words = (str(server.state), str(log), str(stop), str(drills.seed()))
        with (tmp_path / "stranger.err").open("wb") as err:
            stranger = subprocess.Popen(
                server.module("tests.system.stranger", *words),
                stdin=subprocess.DEVNULL,
                stderr=err,
            )
        began, rounds, filler = time.monotonic(), 0, server.state / "filler"
        try:
            while time.monotonic() - began < SOAK_S:
                rounds += 1
                before = {name: counted(cluster, name) for name in guests}
                server.host.run(["sh", "-c", f"cat /dev/zero > {filler} || true"], check=False)
                time.sleep(5)
                server.sf(
                    "instance",
                    "create",
                    f"full-{rounds}",
                    "--image",
                    "sector:1",
                    "--memory",
                    "64",
                    check=False,
                )
                server.sf("instance", "delete", f"full-{rounds}", check=False)
                server.host.run(["rm", "-f", str(filler)])
                name = f"round-{rounds}"
                within(90, lambda n=name: server.sf(
                    "instance", "create", n, "--image", "sector:1", "--network", "lan", "--memory", "64", check=False
                ).returncode in (0, 5), f"{name} is taken after the disk was full")  # type: ignore[misc]  # fmt: skip
                within(
                    120, lambda n=name: server.instance(n)["state"] in ("created", "error"), f"{name} settles"
                )  # type: ignore[misc]
                server.sf("instance", "delete", name)
                for guest in guests:
                    within(60, lambda g=guest, b=before[guest]: counted(cluster, g) > b, f"{guest} counts on")  # type: ignore[misc]
        finally:
            stop.touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                stranger.wait(120)
            if stranger.poll() is None:
                stranger.kill()
                stranger.wait()
        said = [json.loads(line) for line in log.read_text().splitlines()]
        within(60, lambda: len(cluster.alive()) == 2, "both nodes are there")
        last = figures(cluster)
        last_start = restarted(cluster)
        within(60, lambda: len(cluster.alive()) == 2, "both nodes are back")
        print(f"\n{rounds} rounds in {time.monotonic() - began:.0f} s; bucket {world[0]}")
        print(f"strangers {said[-1].get('over')}")
        print(f"server before {first}, start {first_start:.2f} s; after {last}, start {last_start:.2f} s")
        assert "over" in said[-1], (tmp_path / "stranger.err").read_text()[-2000:]
        assert said[:-1] == [], "strangers met an error of ours, or were answered"
        assert last["descriptors"] <= first["descriptors"] + 64
        assert last["threads"] <= first["threads"] + 64
        assert last["rss_mib"] <= max(300, 1.5 * first["rss_mib"])
        for name in guests:
            at = counted(cluster, name)
            within(30, lambda n=name, a=at: counted(cluster, n) > a, f"{name} counts on at the end")  # type: ignore[misc]
        now = running(cluster)
        assert all(qemus[node] <= now[node] for node in qemus), "a guest was started anew"
        for one in server.listed("instance", "ls", "--all"):
            if one["state"] != "deleted":
                server.sf("instance", "delete", one["uuid"], check=False)
        within(120, lambda: not server.listed("instance", "ls"), "all guests are gone")
