"""`sf image build --agent` of a real Debian 12 without the agent: built twice, booted, given a command."""

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from imagestore.push import push
from imagestore.store.open import open_store
from tests import drills
from tests.system.cluster import WORLD, Cluster
from tests.system.machine import within

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import _OFFSET, _in_mount_namespace, corpus

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.skipif(
        not drills.everything(), reason="a quarter of an hour of emulation: scripts/test --all"
    ),
]
PORT = 8123
RECIPE = f"""#cloud-config
bootcmd:
- echo 'deb [trusted=yes] http://{WORLD}:{PORT} ./' >/etc/apt/sources.list
write_files:
- path: /etc/motd.built
  content: "by a recipe\\n"
"""


def without_agent(directory: Path) -> Path:
    """The corpus' Debian as distributions' cloud images are."""
    disk, mounted = directory / "base.raw", directory / "mounted"
    subprocess.run(["cp", "--sparse=always", corpus(variants=("A",))["A"], disk], check=True)
    mounted.mkdir()
    script = 'mount -o "loop,offset=$3" "$1" "$2"; chroot "$2" dpkg --purge qemu-guest-agent; umount "$2"'
    _in_mount_namespace(script, disk, mounted, str(_OFFSET))
    return disk


def archive(directory: Path) -> Path:
    """What a Debian mirror has of the agent, fetched by this machine's apt: the sandbox's guests reach no other."""
    directory.mkdir()
    fetch = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "qemu-guest-agent"]
    subprocess.run(fetch, cwd=directory, check=True, capture_output=True)
    (package,) = directory.glob("*.deb")
    package = package.rename(directory / "agent.deb")
    fields = subprocess.run(["dpkg-deb", "-f", package], check=True, capture_output=True, text=True).stdout
    data = package.read_bytes()
    more = f"Filename: ./agent.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    (directory / "Packages").write_text(fields + more)
    return directory


def changed_bytes(before: Path, after: Path) -> int:
    """Blocks of 4 KiB that hold something now, and another thing than before."""
    sizes = min(before.stat().st_size, after.stat().st_size)
    old, new = (np.memmap(path, np.uint8, "r", shape=(sizes >> 12, 4096)) for path in (before, after))
    step, found = 1 << 14, 0
    for at in range(0, len(new), step):
        piece = new[at : at + step]
        found += int(((piece != old[at : at + step]).any(1) & piece.any(1)).sum())
    return found << 12


@pytest.mark.timeout(3600)
def test_debian_with_the_agent_is_built_from_debian_and_runs_commands(tmp_path: Path) -> None:
    base, packages, recipe = without_agent(tmp_path), archive(tmp_path / "archive"), tmp_path / "agent.yaml"
    recipe.write_text(RECIPE)
    figures: dict[str, object] = {}
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path, base, ("n1",))
        words = ["-m", "http.server", str(PORT), "--bind", WORLD, "--directory", str(packages)]
        mirror = subprocess.Popen(
            cluster.world.inside([sys.executable, *words]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(mirror.wait)
        stack.callback(mirror.terminate)
        server = cluster.server
        server.sf("network", "create", "lan", "10.42.0.0/24")

        def timed(*words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
            began = time.monotonic()
            done = subprocess.run(server.argv("sf", *words), capture_output=True, text=True, timeout=1500)
            print(
                f"\n{' '.join(words[:3])}: {time.monotonic() - began:.0f} s\n{done.stderr[-3000:]}",
                flush=True,
            )
            assert done.returncode == 0, done.stderr
            return time.monotonic() - began, done

        for tag in ("1", "2"):
            name = f"my/debian:12-agent-{tag}"
            more = (
                "--base",
                "tiny:1",
                "--user-data",
                str(recipe),
                "--agent",
                "--network",
                "lan",
                "--format",
                "json",
            )
            took_s, done = timed("image", "build", name, *more)
            row = json.loads(done.stdout)
            figures[f"build {tag}"] = {k: row[k] for k in ("new_bytes", "known_bytes", "written_bytes")} | {
                "seconds": round(took_s), "removed": len(row["removed"])
            }  # fmt: skip
        server.sf("image", "pull", "my/debian:12-agent-1", "-o", str(tmp_path / "built.raw"))
        server.sf("image", "pull", "my/debian:12-agent-2", "-o", str(tmp_path / "again.raw"))
        store = open_store(tmp_path.joinpath("store").as_uri(), create=True)
        cost = {}
        for disk in ("base", "built", "again"):  # beside nothing that the builders left
            cost[disk] = push(store, tmp_path / f"{disk}.raw", "debian", disk)
            figures[f"{disk} adds"] = {"plain": cost[disk].new_bytes, "stored": cost[disk].written_bytes}
        changed = figures["changed"] = changed_bytes(base, tmp_path / "built.raw")
        print(json.dumps(figures, indent=1), flush=True)
        seen = "cat /etc/motd.built; hostname; stat -c %s /etc/machine-id; ls /etc/ssh | grep -c ssh_host"
        took_s, done = timed(
            "run", "--image", "my/debian:12-agent-1", "--network", "lan", "--", "sh", "-c", seen
        )
        said = done.stdout.split()
        assert said[:3] == ["by", "a", "recipe"] and said[3].startswith("run-") and int(said[5]) > 0, said
        figures["sf run"] = round(took_s)
        print(json.dumps(figures, indent=1), flush=True)
        within(90, lambda: server.listed("instance", "ls") == [], "nothing is left")
    assert cost["built"].written_bytes <= 1.3 * changed and cost["again"].written_bytes <= 2 << 20, figures
    if place := os.environ.get("SF_FIGURES"):
        Path(place).write_text(json.dumps(figures))
