"""Writers, a collector and a server that dies, on a real S3 server."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagestore.errors import Conflict, Unavailable
from imagestore.gc import collect
from imagestore.pull import pull
from imagestore.store.names import Names
from imagestore.store.open import open_store
from imagestore.verify import verify_store
from tests import drills, servers
from tests.ending import killed
from tests.servers import Server
from tests.world import disk

pytestmark = pytest.mark.timeout(900)


def pusher(url: str, cache: Path, disks: dict[str, Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.pusher", url, str(cache)]
    command += [f"{name}={path}" for name, path in disks.items()]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | servers.credentials(),
    )


def make_disks(directory: Path, names: list[str], blocks: int) -> dict[str, Path]:
    """Neighbours share half of their data."""
    disks = {}
    for number, name in enumerate(names):
        disks[name] = directory / f"{name}.raw"
        disks[name].write_bytes(disk(number // 2, 100 + number // 3, blocks=blocks))
    return disks


@pytest.mark.drill
def test_two_machines_push_at_once_while_a_collector_runs_all_the_time(
    seaweedfs: Server, tmp_path: Path
) -> None:
    url = seaweedfs.url("shared")
    store = open_store(url, create=True)
    each = drills.rounds(full=20)
    disks = make_disks(tmp_path, [f"image{number}" for number in range(2 * each)], blocks=8)
    names = list(disks)
    processes = [
        pusher(url, tmp_path / f"cache{at}", {name: disks[name] for name in names[at::2]}) for at in range(2)
    ]
    over = threading.Event()

    def collect_all_the_time() -> int:
        own, runs = open_store(url), 0
        while not (over.is_set() and runs):
            with contextlib.suppress(Conflict):
                collect(own, grace_s=2, repack_threshold=0)
            runs += 1
        return runs

    with ThreadPoolExecutor(1) as pool:
        collector = pool.submit(collect_all_the_time)
        try:
            for process in processes:
                _, errors = process.communicate(timeout=280)
                assert process.returncode == 0, errors
        finally:
            over.set()
            for process in processes:
                process.kill()
        assert collector.result() > 0
    assert verify_store(store, full=True).problems == []
    assert len(list(store.names.list())) == len(disks)
    for name, path in disks.items():
        pull(store, store.names.get(name).digest("x86_64"), tmp_path / "out", format_="raw", durable=False)
        assert (tmp_path / "out").read_bytes() == path.read_bytes()
    store.backend.close()


@pytest.mark.drill
def test_a_push_survives_the_death_of_its_server_or_resumes(tmp_path: Path) -> None:
    rng = random.Random(drills.seed())
    os.environ |= servers.credentials()
    with servers.seaweedfs(tmp_path) as server, contextlib.ExitStack() as stack:
        url = server.url("store")
        store = open_store(url, create=True)
        before = tmp_path / "before.raw"
        before.write_bytes(disk(1, blocks=8))
        assert pusher(url, tmp_path / "cache", {"before": before}).wait(60) == 0
        codes = []
        for number in range(drills.rounds(full=10)):
            path = tmp_path / "disk.raw"
            # Random bytes: packs fill and are sent while the rest is still read.
            path.write_bytes(random.Random(number).randbytes(96 << 20))
            process = stack.enter_context(killed(pusher(url, tmp_path / "cache", {f"image{number}": path})))
            time.sleep(rng.uniform(0.5, 2.5))
            server.kill()
            # Longer than all retries, every other time.
            time.sleep(1.0 if number % 2 else 0.2)
            server.start()
            _, errors = process.communicate(timeout=200)
            codes.append(process.returncode)
            assert process.returncode in (0, 8), errors
            if process.returncode:
                again = stack.enter_context(killed(pusher(url, tmp_path / "cache", {f"image{number}": path})))
                _, errors = again.communicate(timeout=200)
                assert again.returncode == 0, errors
            digest = Names(store.backend).get(f"image{number}").digest("x86_64")
            pull(store, digest, tmp_path / "out", format_="raw", durable=False)
            assert (tmp_path / "out").read_bytes() == path.read_bytes()
        report = verify_store(store, full=True)
        assert report.problems == []
        store.names.get("before")
        store.backend.close()


def test_a_dead_server_is_unavailable(tmp_path: Path) -> None:
    port = servers.free_ports()
    os.environ |= servers.credentials()
    with pytest.raises(Unavailable):
        from imagestore.backends.s3 import S3

        S3("bucket", endpoint_url=f"http://127.0.0.1:{port}").stat("x")
