"""A real Debian is kept while it works: 200 MiB in sequence, then pages at random places of a database that counts."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import drills
from tests.system.cluster import Cluster
from tests.system.machine import within

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import _OFFSET, _in_mount_namespace, corpus

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.skipif(not drills.everything(), reason="ten minutes of emulation: scripts/test --all"),
]
PAGES, WRITES = 16384, 50_000
DATABASE = f"""
import os, random, sqlite3
db = sqlite3.connect("/var/tmp/db", isolation_level=None)
db.executescript("pragma page_size=4096; create table t (n integer primary key, b); create table c (n)")
db.execute("insert into c values (0)")
db.execute("begin")
db.executemany("insert into t values (?, ?)", ((n, os.urandom(3900)) for n in range({PAGES})))
db.execute("commit")
for n in range(1, {WRITES} + 1):
    db.execute("begin") if n % 50 == 1 else None
    db.execute("update t set b = ? where n = ?", (os.urandom(3900), random.randrange({PAGES})))
    db.execute("update c set n = ?", (n,))
    db.execute("commit") if n % 50 == 0 else None
"""
ASK = "import sqlite3; print(*sqlite3.connect('/var/tmp/db', timeout=60).execute('{}').fetchone())"
COUNT, CHECK = ASK.format("select n from c"), ASK.format("pragma integrity_check")


@pytest.mark.timeout(3600)
def test_a_debian_that_writes_a_database_is_kept_whole_and_its_copy_counts_from_that_moment(
    tmp_path: Path,
) -> None:
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path, corpus(variants=("A",))["A"], ("n1",))
        server = cluster.server
        server.sf("network", "create", "lan", "10.42.0.0/24")

        def inside(name: str, *words: str) -> str:
            argv = server.argv("sf", "instance", "exec", name, "--", *words)
            done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
            return done.stdout.strip() if done.returncode == 0 else f"!{done.stderr}"

        def guest(name: str, image: str) -> None:
            server.sf("instance", "create", name, "--image", image, "--disk", "40G", "--network", "lan")
            within(900, lambda: inside(name, "true") == "", f"{name} is up")

        def kept(what: str) -> str:
            began = time.monotonic()
            row = json.loads(server.sf("instance", "snapshot", "db", "--format", "json").stdout)
            figures[what] = row | {"seconds": round(time.monotonic() - began, 1)}
            print(json.dumps({what: figures[what]}, indent=1), flush=True)
            return str(row["name"])

        guest("db", "tiny:1")
        kept("after boot")
        assert inside("db", "sh", "-c", "dd if=/dev/urandom of=/var/tmp/big bs=1M count=200 && sync") == ""
        kept("200 MiB")
        assert inside("db", "sh", "-c", f"cat >/var/tmp/w.py <<'X'\n{DATABASE}\nX\n") == ""
        assert inside("db", "sh", "-c", "setsid python3 /var/tmp/w.py >/var/tmp/log 2>&1 &") == ""
        within(300, lambda: inside("db", "python3", "-c", COUNT).isdigit(), "it counts")
        within(
            300,
            lambda: int("0" + re.sub(r"\D.*", "", inside("db", "python3", "-c", COUNT))) > 500,
            "it counts on",
        )
        before = int(inside("db", "python3", "-c", COUNT))
        name = kept("database at work")
        after = int(inside("db", "python3", "-c", COUNT))
        within(900, lambda: inside("db", "python3", "-c", COUNT) == str(WRITES), "it has ended")
        kept("database at its end")
        guest("copy", name)
        found = int(inside("copy", "python3", "-c", COUNT))
        print(f"counter: {before} before, {found} in the copy, {after} after", flush=True)
        assert before <= found <= after
        assert inside("copy", "python3", "-c", CHECK) == "ok"
        server.sf("image", "pull", name, "-o", str(tmp_path / "kept.raw"))
        script = 'l=$(losetup --find --show -o "$2" "$1"); e2fsck -fn "$l"; c=$?; losetup -d "$l"; exit $c'
        _in_mount_namespace(script, tmp_path / "kept.raw", str(_OFFSET))
    if place := os.environ.get("SF_FIGURES"):
        Path(place).write_text(json.dumps(figures))
