"""The console's pages with 200 instances and 300 images: the server's time for each, over HTTP on loopback.

A whole server but for its node, whose agent is played (tests/api_server); the images are in a directory.
"""

import http.cookiejar
import os
import statistics
import time
import urllib.parse
import urllib.request

from benchmarks._harness import Bench
from compute.config import Config
from imagestore.push import push
from imagestore.store.open import open_store
from tests.api_server import KnownImages, running

INSTANCES, IMAGES, ROUNDS, WANTED_MS = 200, 300, 15, 100.0


def run(bench: Bench) -> None:
    place, state = bench.dir("images"), bench.dir("state")
    store = open_store(place.as_uri(), create=True)
    disk = state / "disk.raw"
    for number in range(IMAGES):
        disk.write_bytes(os.urandom(1 << 16) + bytes(15 << 16))
        push(store, disk, f"image-{number}", format_="raw")
    known = KnownImages()
    known.stores = {"local": store}
    config = Config(state_dir=state / "server", node_name="node1", cpu_ratio=1000)
    with running(state / "server", resolver=known, config=config) as server:
        for number in range(4):
            server.network(f"net{number}", f"10.{50 + number}.0.0/24")
        made = [
            server.instance(f"guest-{n:03}", network=f"net{n % 4}", memory=16).body["uuid"]
            for n in range(INSTANCES)
        ]
        server.count()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        form = urllib.parse.urlencode({"namespace": "system", "key": server.key}).encode()
        asked = urllib.request.Request(f"{server.url}/ui/login", form, {"Origin": server.url})
        opener.open(asked, timeout=60).read()
        for page in (
            "instances",
            "instances/new",
            f"instances/{made[7]}",
            "images",
            "networks",
            "nodes",
            "quotas",
        ):
            times_ms, used_s = [], time.process_time()
            for _ in range(ROUNDS):
                began = time.perf_counter()
                opener.open(f"{server.url}/ui/{page}", timeout=60).read()
                times_ms.append(1000 * (time.perf_counter() - began))
            cpu_ms = 1000 * (time.process_time() - used_s) / ROUNDS  # server, and what the client needs
            name = page.replace(made[7], "one").replace("/", "_")
            bench.number(f"{name}_ms", statistics.median(times_ms), "ms", at_most=WANTED_MS)
            bench.number(f"{name}_cpu_ms", cpu_ms, "ms", at_most=WANTED_MS)
            bench.number(f"{name}_least_ms", min(times_ms), "ms", at_most=WANTED_MS)
