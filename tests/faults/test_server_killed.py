"""kill -9 of the server at random moments while instances come and go: no record is lost, leaked or half-made."""

import http.client
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compute.cluster.state.sqlite import SqliteStore
from tests import drills, invariants
from tests.api_server import Running

ROOT = Path(__file__).resolve().parents[2]


def start(directory: Path) -> tuple["subprocess.Popen[str]", Running]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.api_server", directory], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout
    url, key = child.stdout.readline().split()
    return child, Running(url, key, None, None, None)  # type: ignore[arg-type]


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_the_server_is_killed_at_any_moment_of_creations_and_deletions(tmp_path: Path) -> None:
    rng = random.Random(drills.seed())
    acknowledged: dict[str, str] = {}
    pause = threading.Event()
    for number in range(drills.rounds(full=50)):
        child, server = start(tmp_path)
        killer = threading.Timer(rng.uniform(0.05, 0.8), child.kill)
        try:
            network = server.call("POST", "/networks", {"name": "lan", "netblock": "10.0.0.0/24"})
            assert network.status in (200, 409)
            for name, uuid in list(acknowledged.items()):
                assert server.get(f"/instances/{uuid}")["name"] == name, "an acknowledged record is gone"
            killer.start()
            for step in range(1000):
                name = f"vm-{number}-{step}"
                made = server.instance(name, network="lan", memory=16)
                assert made.status in (200, 507), made.body
                if made.status == 200:
                    acknowledged[name] = made.body["uuid"]
                if made.status == 507 or rng.random() < 0.7:
                    victim = rng.choice(list(acknowledged))
                    server.call("DELETE", f"/instances/{acknowledged.pop(victim)}")
        except (OSError, ValueError, http.client.HTTPException):
            pass  # it died in the middle of an answer
        finally:
            killer.cancel()
            child.kill()
            child.wait()
        store = SqliteStore(tmp_path / "sf.db")
        invariants.check(store)
        store.close()
    child, server = start(tmp_path)
    try:
        server.call("DELETE", "/instances", {"confirm": True})
        for _ in range(1000):
            if not server.get("/instances"):
                break
            pause.wait(0.02)
        assert server.call("DELETE", "/networks/lan").status == 200
    finally:
        child.kill()
        child.wait()
    store = SqliteStore(tmp_path / "sf.db")
    invariants.check(store)
    assert store.list("ipam/") == store.list("interface/") == []
    store.close()
