"""kill -9 of what takes part in a snapshot, at random moments of it: the guest runs on, thawed, and nothing is left."""

import filecmp
import random
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from imagestore import collect, open_store, verify_store
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
mkdir -p /data && mount -t ext4 /dev/vda2 /data || exit 1
i=0
while true; do
    i=$((i + 1))
    dd if=/dev/urandom of=/data/$((i % 9)) bs=64k count=4 2>/dev/null; sync
    echo "SF-COUNT $i" >/dev/ttyS0
done
"""


def with_ext4(tiny_image: Path, target: Path) -> Path:
    """The tiny image and, on a second partition, a file system that a snapshot really freezes."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", tiny_image, target], check=True)
    start = target.stat().st_size
    with target.open("ab") as file:
        file.truncate(start + (64 << 20))
    subprocess.run(
        ["sfdisk", "-q", "--append", target], input=f"start={start >> 9},type=83".encode(), check=True
    )
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", f"offset={start}", target, "64M"], check=True)
    return target


def count(machine: Machine) -> int:
    found = re.findall(r"SF-COUNT (\d+)", machine.sf("instance", "console", "web", check=False).stdout)
    return int(found[-1]) if found else 0


@contextmanager
def writing(directory: Path, tiny_image: Path) -> Iterator[tuple[PrivateHost, Machine]]:
    """A machine with the guest `web`, which writes, until the block ends; then nothing of it is left."""
    script = directory / "write.sh"
    script.write_text(WRITE)
    with PrivateHost() as host:
        machine = Machine(host, directory, SF_ACCEL="tcg", SF_NODE_NAME="here")
        machine.sf("image", "push", str(with_ext4(tiny_image, directory / "ext4.raw")), "tiny:1")
        machine.start()
        try:
            create = ["instance", "create", "web", "--image", "tiny:1", "--memory", "192", "--disk", "1G"]
            machine.sf(*create, "--disk", "1G", "--user-data", str(script), "--wait", "boot")
            within(120, lambda: count(machine) > 3, "it writes")
            yield host, machine
            assert not list((machine.state / "run").glob("snapshot*"))
            (own,) = (machine.state / "store-namespaces").iterdir()
            store = open_store(str(own))
            assert not verify_store(store, full=True).problems
            store.backend.close()
            machine.sf("instance", "delete", "web", "--force", "--wait")
        finally:
            machine.signal(2)


def test_a_guest_that_writes_outlives_whoever_dies_in_its_snapshot(tmp_path: Path, tiny_image: Path) -> None:
    rng = random.Random(drills.seed())
    with writing(tmp_path, tiny_image) as (host, machine):
        for number in range(drills.rounds(40)):
            began, what = count(machine), rng.choice(["serve", "serve", "imaged", "libvirtd"])
            taking = subprocess.Popen(
                machine.argv("sf", "instance", "snapshot", "web"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            time.sleep(rng.uniform(0.3, 2.0))
            kill(host, machine, what)
            taking.communicate(timeout=120)

            def ended() -> bool:
                states = [s["state"] for s in machine.listed("instance", "snapshots", "web")]
                return all(state in ("created", "error") for state in states)

            within(90, ended, f"round {number}: after {what} the snapshot ends")
            within(60, lambda began=began: count(machine) > began + 3, f"{number}: after {what} it writes on")  # type: ignore[misc]
            assert machine.instance("web")["power_state"] == "on"
        last = machine.listed("instance", "snapshot", "web")
        assert last["state"] == "created" and last["frozen"]
        machine.sf("image", "pull", last["images"]["vda"], "-o", str(tmp_path / "last.raw"), "--as", "raw")
        fsck = ["e2fsck", "-fn", f"{tmp_path / 'last.raw'}?offset={40 << 20}"]
        assert subprocess.run(fsck, capture_output=True, check=False).returncode == 0
        name = host.virsh("list", "--name").stdout.split()[0]
        asked = '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'
        assert '"sf-cbw' not in host.virsh("qemu-monitor-command", name, asked).stdout
        said = [s["state"] for s in machine.listed("instance", "snapshots", "web")]
        print(f"{len(said)} snapshots: {said.count('created')} created, {said.count('error')} failed")


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
        again = ["instance", "create", "again", "--image", made["name"], "--memory", "192", "--on", "n1"]
        server.sf(*again, "--wait", "boot")
        server.sf("instance", "delete", "web", "again", "--force", "--wait")


def test_a_restore_that_is_killed_ends_in_a_guest_of_the_old_disks_or_the_new(
    tmp_path: Path, tiny_image: Path
) -> None:
    rng = random.Random(drills.seed())
    with writing(tmp_path, tiny_image) as (host, machine):
        names = [machine.listed("instance", "snapshot", "web")["name"] for _ in range(2)]
        became = ["tiny:1"]
        for number in range(drills.rounds(12)):
            target, what = names[number % 2], rng.choice(["serve", "serve", "imaged", "libvirtd"])
            restoring = subprocess.Popen(
                machine.argv("sf", "instance", "restore", "web", target, "--force"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            time.sleep(rng.uniform(0.2, 4.0))
            kill(host, machine, what)
            restoring.communicate(timeout=120)

            def settled() -> bool:
                states = [s["state"] for s in machine.listed("instance", "snapshots", "web")]
                known = machine.instance("web")
                return (known["state"], known["power_state"]) == ("created", "on") and all(
                    state in ("created", "error") for state in states
                )

            within(120, settled, f"round {number}: after {what} it has ended")
            # The console may be the former one's still.
            began = count(machine)
            within(150, lambda began=began: count(machine) not in range(began + 3), f"{number}: it writes on")  # type: ignore[misc]
            assert machine.instance("web")["disks"][0]["base"] in (became[-1], target)
            became.append(machine.instance("web")["disks"][0]["base"])
        moved = sum(before != after for before, after in pairwise(became))
        print(f"{moved} of {len(became) - 1} restores happened all the same")
        target = next(name for name in names if name != became[-1])
        machine.sf("instance", "restore", "web", target, "--force")
        within(120, lambda: machine.instance("web")["disks"][0]["base"] == target, "restored")


def kill(host: PrivateHost, machine: Machine, what: str) -> None:
    """kill -9, and what a supervisor would start again."""
    if what == "serve":
        machine.signal()
        machine.start()
    elif what == "libvirtd":
        host.kill_libvirtd(9)
        host.start_libvirtd()
    else:
        host.run(["pkill", "-9", "-f", r"imagestore\.cache\.imaged"], check=False)


def test_a_push_over_the_wire_that_is_killed_or_whose_server_is_leaves_nothing_but_what_the_rerun_uses(
    tmp_path: Path,
) -> None:
    rng, disk = random.Random(drills.seed()), tmp_path / "disk.raw"
    with PrivateHost(libvirtd=False) as host:
        machine = Machine(host, tmp_path, SF_ACCEL="tcg", SF_NODE_NAME="here")
        machine.start()
        try:
            push = ["image", "push", str(disk), "my/big:1", "--input-format", "raw", "-q"]
            disk.write_bytes(rng.randbytes(4 << 20))
            machine.sf(*push)
            (own,) = (machine.state / "store-namespaces").iterdir()
            store, killed = open_store(str(own)), 0
            for number in range(drills.rounds(40)):
                disk.write_bytes(rng.randbytes(96 << 20))
                began = subprocess.Popen(
                    machine.argv("sf", *push), stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                time.sleep(rng.uniform(0.2, 1.2))
                if rng.random() < 0.5:
                    host.run(["pkill", "-9", "-f", "image push"], check=False)
                else:
                    machine.signal()
                    machine.start()
                began.communicate(timeout=120)
                killed += began.returncode != 0
                assert not verify_store(store, full=True).problems, f"round {number}"
                machine.sf(*push)
                assert not verify_store(store, full=True).problems, f"round {number}, after the rerun"
                shown = machine.listed("image", "show", "my/big:1")
                assert shown["size_bytes"] == 96 << 20
                if number % 5 == 4:
                    collect(store, grace_s=0)
            print(f"{killed} of {drills.rounds(40)} pushes were cut off")
            machine.sf("image", "pull", "my/big:1", "-o", str(tmp_path / "out.raw"), "--as", "raw", "-q")
            assert filecmp.cmp(disk, tmp_path / "out.raw", shallow=False)
            store.backend.close()
        finally:
            machine.signal(2)
