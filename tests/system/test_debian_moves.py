"""A real Debian that writes a database and is pinged moves while it runs, and knows nothing of it."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import drills
from tests.system.cluster import Cluster
from tests.system.machine import within
from tests.system.test_debian_snapshot import CHECK, COUNT, DATABASE
from tests.system.test_move_kills import pinged

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import corpus

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not drills.everything(), reason="ten minutes of emulation: scripts/test --all"),
]


def test_a_debian_at_work_moves_and_its_database_counts_on(tmp_path: Path) -> None:
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path, corpus(variants=("A",))["A"])
        server = cluster.server

        def inside(*words: str) -> str:
            argv = server.argv("sf", "instance", "exec", "db", "--", *words)
            done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
            return done.stdout.strip() if done.returncode == 0 else f"!{done.stderr}"

        server.sf("network", "create", "lan", "10.42.0.0/24")
        words = ["--disk", "10G", "--memory", "512", "--network", "lan", "--on", "n2"]
        server.sf("instance", "create", "db", "--image", "tiny:1", *words)
        within(900, lambda: inside("true") == "", "it is up")
        boot = inside("cat", "/proc/sys/kernel/random/boot_id")
        assert inside("sh", "-c", f"cat >/var/tmp/w.py <<'X'\n{DATABASE}\nX\n") == ""
        assert inside("sh", "-c", "setsid python3 /var/tmp/w.py >/var/tmp/log 2>&1 &") == ""
        within(300, lambda: inside("python3", "-c", COUNT).isdigit(), "it counts")
        before = int(inside("python3", "-c", COUNT))
        pinged(cluster, "db", drills.rounds(10, "SF_MOVES"))
        assert inside("cat", "/proc/sys/kernel/random/boot_id") == boot
        within(300, lambda: int(inside("python3", "-c", COUNT)) > before, "it counts on")
        assert inside("sh", "-c", "pkill -f [w].py; cat /var/tmp/log") == ""
        assert inside("python3", "-c", CHECK) == "ok"
        print("it counted from", before, "to", inside("python3", "-c", COUNT))
        server.sf("instance", "delete", "db", "--force", "--wait")
