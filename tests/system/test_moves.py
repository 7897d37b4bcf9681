"""Guests that move to another node, live and cold: two machines with real libvirtd, qemu and image services."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imagestore import open_store, verify_store
from tests import drills
from tests.system.boot_sector import boot_sector
from tests.system.cluster import Cluster
from tests.system.machine import Machine, within

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

PLACE = 44 << 20
COUNT = f"""#!/bin/sh
# Goes on with what the disk has, and says where that began.
read() {{ dd if=/dev/vda bs=512 skip={PLACE >> 9} count=1 2>/dev/null | tr -cd 0-9 | sed 's/^0*//'; }}
i=$(read); i=${{i:-0}}
echo "SF-BEGAN $i" >/dev/ttyS0
while true; do
    i=$((i + 1))
    printf '%015d\\n' $i | dd of=/dev/vda bs=512 seek={PLACE >> 9} conv=notrunc,sync,fsync 2>/dev/null
    echo "SF-COUNT $i" >/dev/ttyS0
    sleep 0.1
done
"""


def counts(server: Machine, name: str, word: str = "COUNT") -> int:
    """The newest number that a guest wrote on its console; -1 before it did."""
    said = server.sf("instance", "console", name, check=False).stdout
    return int((re.findall(rf"SF-{word} (\d+)", said) or ["-1"])[-1])


def create(cluster: Cluster, name: str, node: str, *words: str) -> None:
    script = cluster.key.with_name("count.sh")
    script.write_text(COUNT)
    told = ["--image", "tiny:1", "--memory", "128", "--disk", "1G", "--on", node, "--user-data", str(script)]
    cluster.server.sf("instance", "create", name, *told, *words)


def runs_on(cluster: Cluster, uuid: str) -> list[str]:
    """Where a guest's qemu is, by each machine's own processes."""
    found = []
    for node, machine in cluster.nodes.items():
        argvs = machine.host.run(["ps", "-wweo", "args="]).stdout.splitlines()
        found += [node for argv in argvs if "qemu-system" in argv.split(" ", 1)[0] and uuid in argv]
    return found


def nothing_left(cluster: Cluster, node: str, uuid: str) -> bool:
    machine = cluster.nodes[node]
    domains = machine.host.virsh("list", "--all", "--name").stdout
    return uuid not in domains and not (machine.state / "instances" / uuid).exists()


def events(server: Machine, name: str) -> list[str]:
    return [event["message"] for event in server.listed("instance", "events", name)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(stack, tmp_path_factory.mktemp("cluster"), tiny_image, ("n1", "n2"))
        made.server.sf("network", "create", "lan", "10.42.0.0/24")
        yield made
        (own,) = (made.server.state / "store-namespaces").iterdir()
        store = open_store(str(own))
        assert not verify_store(store, full=True).problems and not list(store.names.list())
        store.backend.close()


def test_a_guest_moves_with_its_disk_its_address_and_its_port(cluster: Cluster) -> None:
    server = cluster.server
    create(cluster, "web", "n2", "--network", "lan,address=10.42.0.5", "--ssh-key", f"{cluster.key}.pub")
    server.sf("instance", "publish", "web", "2222:22")
    within(150, lambda: counts(server, "web") > 5, "web counts")
    before = server.instance("web")

    def banner() -> str:
        words = f"exec 3<>/dev/tcp/10.77.0.{cluster.router()[1]}/2222 && head -1 <&3"
        return cluster.world.run(["timeout", "5", "bash", "-c", words], check=False).stdout

    within(60, lambda: banner().startswith("SSH-2.0"), "the world reaches its port")
    for there, *how in (("n1",), ("n2", "--cold")):
        here, counted = server.instance("web")["node"], counts(server, "web")
        moved = server.sf(
            "instance", "migrate", "web", "--on", there, *how, "--timeout", "20s", "--format", "json"
        )
        now = json.loads(moved.stdout)
        assert (now["uuid"], now["node"], now["power_state"]) == (before["uuid"], there, "on")
        within(150, lambda c=counted: counts(server, "web") > c, "web counts on")  # type: ignore[misc]
        began = counts(server, "web", "BEGAN")
        assert began >= counted if how else began == -1, "it lives on, and only what moved cold began anew"
        assert runs_on(cluster, now["uuid"]) == [there]
        within(60, lambda: server.instance("web")["left"] == [], "the other node has said that it removed it")
        assert nothing_left(cluster, here, now["uuid"])
        within(60, lambda: banner().startswith("SSH-2.0"), "the world reaches its port where it is now")
    after = server.instance("web")
    for same in ("interfaces", "name", "created", "disk_spec", "power"):
        assert after[same] == before[same], same
    assert server.listed("instance", "snapshots", "web") == []
    assert {"moved from n2 to n1: asked for, while it runs", "moved from n1 to n2: asked for"} <= {
        *events(server, "web")
    }
    assert server.sf("instance", "migrate", "web", "--on", "n2", check=False).returncode == 6, "it is there"
    server.sf("instance", "delete", "web", "--force", "--wait")


def test_a_drained_node_is_empty_and_one_that_cannot_be_is_said(cluster: Cluster, tmp_path: Path) -> None:
    """Guests that halt at once and know no power button."""
    server, disk = cluster.server, tmp_path / "disk"
    disk.write_bytes(boot_sector("SF-GUEST-READY and halts"))
    server.sf("image", "push", str(disk), "halts:1", "--input-format", "raw")
    words = ["--image", "halts:1", "--memory", "16", "--on", "n2", "--wait"]
    on = ("one", "two", "three", "four", "five")[: drills.rounds(5)]
    for name in (*on, "off"):
        server.sf("instance", "create", name, *words, "created")
    server.sf("instance", "create", "job", *words, "created", "--ephemeral")
    server.sf("instance", "stop", "off", "--force", "--wait")
    drained = ("node", "drain", "n2", "--move", "--timeout", "1s", "--format", "json")
    server.sf("node", "drain", "n1")
    kept = server.sf(*drained, check=False)
    assert kept.returncode == 6 and f"{len(on) + 2} guests are still on n2" in kept.stderr
    reasons = {row["name"]: row["error_message"] for row in json.loads(kept.stdout)}
    assert "over once it is off" in reasons.pop("job") and all(
        "n1 is drained" in why for why in reasons.values()
    )
    states = {row["name"]: (row["node"], row["power_state"]) for row in server.listed("instance", "ls")}
    assert states == {**dict.fromkeys((*on, "job"), ("n2", "on")), "off": ("n2", "off")}
    server.sf("node", "drain", "n1", "--undo")
    most = server.sf(*drained, check=False)
    assert most.returncode == 5 and "1 guests are still on n2" in most.stderr
    assert {row["name"]: row["node"] for row in json.loads(most.stdout)} == {
        **dict.fromkeys((*on, "off"), "n1"), "job": "n2",
    }  # fmt: skip
    assert server.instance("job")["power_state"] == "on"
    server.sf("instance", "delete", "job", "--force", "--wait")
    assert json.loads(server.sf(*drained).stdout) == []
    rows = {row["name"]: row for row in server.listed("instance", "ls")}
    assert {name: row["power_state"] for name, row in rows.items()} == {
        **dict.fromkeys(on, "on"),
        "off": "off",
    }
    within(60, lambda: not any(server.instance(name)["left"] for name in rows), "n2 has said so")
    assert all(nothing_left(cluster, "n2", row["uuid"]) for row in rows.values())
    assert all(runs_on(cluster, rows[name]["uuid"]) == ["n1"] for name in on)
    server.sf("node", "drain", "n2", "--undo")
    assert all(row["node"] == "n1" for row in server.listed("instance", "ls"))
    server.sf("instance", "start", "off")
    within(60, lambda: server.instance("off")["power_state"] == "on", "what was moved off starts")
    server.sf("instance", "delete", *rows, "--force", "--wait")
