"""kill -9 of what takes part in a snapshot, at random moments of it: the guest runs on, thawed, and nothing is left."""

import random
import re
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from imagestore import open_store, verify_store
from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.system.cluster import Cluster
from tests.system.machine import Machine, within

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not drills.everything(), reason="two minutes, in scripts/test --all"),
]

WRITE = """#!/bin/sh
mkfs.vfat /dev/vdb >/dev/null && mkdir -p /data && mount /dev/vdb /data
i=0
while true; do
    i=$((i + 1))
    dd if=/dev/urandom of=/data/$((i % 9)) bs=64k count=4 2>/dev/null; sync
    echo "SF-COUNT $i" >/dev/ttyS0
done
"""


def count(machine: Machine) -> int:
    found = re.findall(r"SF-COUNT (\d+)", machine.sf("instance", "console", "web", check=False).stdout)
    return int(found[-1]) if found else 0


def test_a_guest_that_writes_outlives_whoever_dies_in_its_snapshot(tmp_path: Path, tiny_image: Path) -> None:
    rng = random.Random(drills.seed())
    script = tmp_path / "write.sh"
    script.write_text(WRITE)
    with PrivateHost() as host:
        machine = Machine(host, tmp_path, SF_ACCEL="tcg", SF_NODE_NAME="here")
        machine.sf("image", "push", str(tiny_image), "tiny:1")
        machine.start()
        try:
            create = ["instance", "create", "web", "--image", "tiny:1", "--memory", "192", "--disk", "1G"]
            machine.sf(*create, "--disk", "1G", "--user-data", str(script), "--wait", "boot")
            within(120, lambda: count(machine) > 3, "it writes")
            for number in range(drills.rounds(40)):
                began, what = count(machine), rng.choice(["serve", "serve", "imaged", "libvirtd"])
                taking = subprocess.Popen(
                    machine.argv("sf", "instance", "snapshot", "web"),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                time.sleep(rng.uniform(0.3, 2.0))
                if what == "serve":
                    machine.signal()
                    machine.start()
                elif what == "libvirtd":
                    host.kill_libvirtd(9)
                    host.start_libvirtd()
                else:
                    host.run(["pkill", "-9", "-f", r"imagestore\.cache\.imaged"], check=False)
                taking.communicate(timeout=120)

                def ended() -> bool:
                    states = [s["state"] for s in machine.listed("instance", "snapshots", "web")]
                    return all(state in ("created", "error") for state in states)

                within(90, ended, f"round {number}: after {what} the snapshot ends")
                within(
                    60, lambda began=began: count(machine) > began + 3, f"{number}: after {what} it writes on"
                )  # type: ignore[misc]
                assert machine.instance("web")["power_state"] == "on"
            last = machine.listed("instance", "snapshot", "web")
            assert last["state"] == "created"
            name = host.virsh("list", "--name").stdout.split()[0]
            asked = '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'
            assert '"sf-cbw' not in host.virsh("qemu-monitor-command", name, asked).stdout
            assert not list((machine.state / "run").glob("snapshot*"))
            (own,) = (machine.state / "store-namespaces").iterdir()
            store = open_store(str(own))
            assert not verify_store(store, full=True).problems
            store.backend.close()
            said = [s["state"] for s in machine.listed("instance", "snapshots", "web")]
            print(f"{len(said)} snapshots: {said.count('created')} created, {said.count('error')} failed")
            machine.sf("instance", "delete", "web", "--force", "--wait")
        finally:
            machine.signal(2)


def test_a_guest_on_a_joined_node_is_kept_over_the_nodes_own_connection_and_boots_elsewhere(
    tmp_path: Path, tiny_image: Path
) -> None:
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path, tiny_image, ("n1", "n2"), SF_UPLINK="", SF_FLOATING_POOL="")
        server = cluster.server
        create = ["instance", "create", "--image", "tiny:1", "--memory", "192", "--wait", "boot"]
        server.sf(*create, "web", "--on", "n2")
        made = server.listed("instance", "snapshot", "web")
        assert made["state"] == "created" and made["note"] == ""
        server.sf(
            "instance",
            "create",
            "--image",
            made["name"],
            "--memory",
            "192",
            "again",
            "--on",
            "n1",
            "--wait",
            "boot",
        )
        server.sf("instance", "delete", "web", "again", "--force", "--wait")
