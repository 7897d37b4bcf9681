"""docs/howto/daily.md, typed as it stands there: by root on a server, with a web server, a bucket and a second machine.

The guest is the tiny one. What boots it again, and the second machine, are left to scripts/test --all.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills, servers
from tests.system.cluster import Cluster
from tests.system.laptop import Laptop
from tests.system.machine import ROOT, Machine, within
from tests.web import nginx

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

PAGE = (ROOT / "docs/howto/daily.md").read_text()
BUCKET = "s3://backups/home?region=eu-central-1"
# What cloud-init does to Debian, the tiny guest does by a script; its file system is in memory but for its disk's.
SCRIPT = "#!/bin/sh\nmkdir -p /srv && mount /dev/vda1 /srv\n"


def tasks() -> dict[str, list[str]]:
    """Title → the lines to be typed."""
    found = {}
    for part in PAGE.split("\n## ")[1:]:
        blocks = re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S)
        found[part.splitlines()[0]] = [line for block in blocks for line in block.splitlines()]
    return found


class Root:
    """Who types, on the server's machine."""

    def __init__(self, cluster: Cluster, home: Path, said: dict[str, str]) -> None:
        self.cluster, self.home, self._said = cluster, home, said
        self.seen: dict[str, str] = {}

    def types(self, line: str) -> str:
        meant = line
        for said, other in self._said.items():
            meant = meant.replace(said, other)
        argv = self.cluster.server.argv("bash", "-c", f"cd {self.home} && {meant}")
        began = time.monotonic()
        while True:
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=1200)
            if "no remote or namespace" not in done.stderr or time.monotonic() > began + 60:
                break  # as the page says, a server sees a new remote a little later
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
        print(f"{time.monotonic() - began:5.1f} s  {line}")
        self.seen[line] = done.stdout
        return done.stdout

    def knows(self, said: str, meant: str) -> None:
        self._said[said] = meant


@pytest.fixture
def root(tmp_path: Path, tiny_image: Path) -> Iterator[Root]:
    home = tmp_path / "root"
    (home / "site").mkdir(parents=True)
    (home / "site/index.html").write_text("it works\n")
    (home / "agent.yaml").write_text(SCRIPT)
    (tmp_path / "www").mkdir()
    shutil.copy(tiny_image, tmp_path / "www/debian.qcow2")
    with ExitStack() as stack:
        bucket: list[str] = []

        def prepare(cluster: Cluster, machine: Machine) -> None:
            """On the server's machine are the web server and the bucket, too."""
            with Laptop(machine.host, home).network():
                store = stack.enter_context(servers.seaweedfs(tmp_path / "weed"))
                bucket.extend(
                    (store.url("home"), stack.enter_context(nginx(tmp_path / "www", tmp_path / "nginx")))
                )

        keys = servers.credentials()
        cluster = Cluster(stack, tmp_path, tiny_image, ("n1",), prepare, SF_LISTEN="127.0.0.1:13000", **keys)
        cluster.server.sf("image", "tag", "tiny:1", "debian:12")
        said = {
            "https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2 --network": (
                f"{bucket[1]}/debian.qcow2 --memory 192 --network"
            ),
            "--image bucket/": "--memory 192 --image bucket/",
            "--image debian:12": "--memory 192 --image debian:12",
            "--memory 2G": "--memory 256M",
            "~/.ssh/id_ed25519.pub": f"{cluster.key}.pub",
            "sf instance ssh web": f"sf instance ssh web -i {cluster.key} hostname",
            "systemd-run python3 -m http.server 80 --directory": "httpd -p 80 -h",
            BUCKET: bucket[0],
            "/root/before.state": str(tmp_path / "before.state"),
            "cloud.lan": "10.77.0.1",
        }
        yield Root(cluster, home, said)


@contextmanager
def another_machine(root: Root, home: Path) -> Iterator[Machine]:
    """n2, with the same packages installed, on the same switch."""
    home.mkdir()
    own = {"SF_ACCEL": "tcg", "SF_NODE_NAME": "n2", "SF_MESH_ADDRESS": "10.77.0.2", "SF_UPLINK": "eth0"}
    with PrivateHost() as host:
        machine = root.cluster.nodes["n2"] = Machine(host, home, **own)
        root.cluster.plug("n2")
        try:
            yield machine
        finally:
            if machine.server is not None:
                machine.signal()


def qemus(machine: Machine) -> set[str]:
    return set(machine.host.run(["pgrep", "qemu"], check=False).stdout.split())


@pytest.mark.drill
def test_the_tasks_of_every_day_are_done_as_the_page_says(root: Root, tmp_path: Path) -> None:
    server, todo = root.cluster.server, tasks()
    assert [int(title.partition(".")[0]) for title in todo] == list(range(1, 11))

    def task(number: int) -> list[str]:
        (lines,) = [lines for title, lines in todo.items() if title.startswith(f"{number}. ")]
        return [root.types(line) for line in lines]

    assert "web" in task(1)[-1] and server.instance("web")["agent_state"] == "ready"
    logged_in, hostname, console = task(2)
    assert logged_in == hostname == "web\n" and "SF-GUEST-READY" in console
    task(3)
    assert "web" in (root.home / "hosts").read_text()
    assert task(4)[-1] == "it works\n"
    with ExitStack() as stack:
        machines = [server]
        if drills.everything():
            assert task(5)[-1] == "2\n"
            assert server.instance("web")["disks"][0]["size_bytes"] == 20 << 30
            *_, page, listed = task(6)
            assert page == "it works\n" and len(re.findall(r"my/web:\d{8}-\d{6}", listed)) == 2
            lost_and_restored(root, todo["7. Back it up to a bucket, and restore it from there"])
            machines.append(stack.enter_context(another_machine(root, tmp_path / "n2")))
            token, *rest = todo["8. Add a node"]
            root.types(token)
            join, secret = (server.listed("node", "token")[key] for key in ("url", "token"))
            (line,) = re.findall(r"^    sf (agent --join .*)", PAGE, re.M)
            said = line.replace("https://10.77.0.1:13001", join).replace("TOKEN", secret)
            machines[1].start(*said.split())
            within(60, lambda: "n2" in root.cluster.alive(), "n2 has joined")
            for line in rest:
                root.types(line)
            assert server.instance("db")["node"] == "n2"
        guests = {one["name"] for one in server.listed("instance", "ls")}
        task(9)
        within(60, lambda: guests <= set(root.types("sf top").split()), "sf top shows them all")

        before = [qemus(machine) for machine in machines]
        for line in todo["10. Upgrade"]:
            if line.startswith("apt-get"):  # tests/system/test_package.py does that
                server.signal(signal.SIGTERM)
                server.start()
            else:
                root.types(line)
        assert [qemus(machine) for machine in machines] == before and all(before)
        assert guests <= set(root.seen["sf instance ls"].split())


def lost_and_restored(root: Root, lines: list[str]) -> None:
    at = lines.index("sf instance delete web --wait")
    for line in lines[:at]:
        root.types(line)
    newest = root.cluster.server.listed("backup", "show", "web")[0]
    root.knows("web:20261224-180000", newest["name"].removeprefix("my/"))
    assert [root.types(line) for line in lines[at:]][-1] == "it works\n"
