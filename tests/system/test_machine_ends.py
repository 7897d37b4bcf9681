"""A machine that goes down and comes back: its guests end in order before it does, and start in order after it."""

import base64
import gzip
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.system.boot_sector import boot_sector
from tests.system.machine import ROOT, Machine, within

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with PrivateHost() as host:
        made = Machine(host, tmp_path, SF_ACCEL="tcg", SF_STOP_LIMIT="2s")
        made.start()
        yield made
        made.signal(signal.SIGINT)


def goes_down(machine: Machine) -> list[str]:
    """As systemd does it: the server, then sf-guests.service, then the rest at once. What was said of the guests."""
    machine.signal(signal.SIGINT)
    ended = subprocess.run(
        machine.argv(sys.executable, str(ROOT / "debian/sf-guests")), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    machine.host.stop()
    return ended.stdout.splitlines()


def comes_back(machine: Machine) -> None:
    machine.host.start()
    machine.start()


def power(machine: Machine) -> dict[str, str]:
    return {one["name"]: one["power_state"] for one in machine.listed("instance", "ls")}


def started(machine: Machine, name: str) -> float:
    """When it was started last."""
    events = machine.listed("instance", "events", name)
    return max(float(e["timestamp"]) for e in events if e["message"] == "started")


def test_guests_end_and_start_in_their_order_and_autostart_decides_which(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "sector.raw").write_bytes(boot_sector("HELLO\r\n"))
    machine.sf("image", "push", str(tmp_path / "sector.raw"), "sector:1")
    for name in ("web", "db", "never", "always", "off"):
        machine.sf("instance", "create", name, "--image", "sector:1", "--memory", "32", "--wait", "created")
    machine.sf("instance", "stop", "always", "off", "--force")
    machine.sf("instance", "set", "db", "--order", "1", "--delay", "2s")
    machine.sf("instance", "set", "web", "--order", "2")
    machine.sf("instance", "set", "never", "--autostart", "no")
    machine.sf("instance", "set", "always", "--autostart", "yes", "--order", "3")
    assert machine.sf("instance", "set", "web", "--order", "10", check=False).returncode == 2
    assert machine.instance("db")["delay_s"] == 2
    within(30, lambda: power(machine)["always"] == "off", "it is off")

    said = goes_down(machine)  # a boot sector does not hear the power button
    cut = [line for line in said if line.endswith("was cut off")]
    assert cut == ["system/web was cut off", "system/db was cut off", "system/never was cut off"]
    assert {*said} - {*cut} == {"system/always is off", "system/off is off"}

    comes_back(machine)
    wanted = {"web": "on", "db": "on", "never": "off", "always": "on", "off": "off"}
    within(120, lambda: power(machine) == wanted, f"{wanted}")
    assert started(machine, "db") + 2 <= started(machine, "web") <= started(machine, "always")

    machine.signal(signal.SIGINT)  # the machine stays up this time
    machine.start()
    assert power(machine) == wanted
    assert "ended" not in machine.sf("instance", "events", "web").stdout


WRITER = """#!/bin/sh
echo {fat} | base64 -d | gunzip >/dev/vdb && mount -t vfat /dev/vdb /mnt || exit 1
for n in $(seq 40); do
    head -c 1048576 /dev/urandom >/mnt/$n && sync
    (cd /mnt && sha1sum $n) >>/run/sums
    echo "SF-WROTE $n"
done
umount /mnt && mount -t vfat /dev/vdb /mnt
cd /mnt && sha1sum -c /run/sums >/run/checked && echo "SF-CHECKED $(grep -c OK /run/checked)"
cd / && umount /mnt && poweroff
"""


def empty_fat(path: Path) -> str:
    """The beginning of a FAT file system of 200 MiB, beyond which it is zeros; the tiny guest cannot make one."""
    subprocess.run(["mkfs.vfat", "-F", "16", "-C", path, str(200 << 10)], check=True, capture_output=True)
    return base64.b64encode(gzip.compress(path.read_bytes()[: 1 << 20])).decode()


def test_a_guest_whose_disk_cannot_grow_is_paused_says_so_and_goes_on_unharmed(
    tmp_path: Path, tiny_image: Path
) -> None:
    """Disks on another directory, a small file system of its own."""
    disks, image = tmp_path / "disks", tmp_path / "disks.ext4"
    disks.mkdir()
    (tmp_path / "writer").write_text(WRITER.replace("{fat}", empty_fat(tmp_path / "fat")))
    with PrivateHost() as host:
        host.run(
            [
                "sh",
                "-c",
                f"truncate -s 128M {image} && mkfs.ext4 -q -m 0 {image} && mount -o loop {image} {disks}",
            ]
        )
        small = {"SF_INSTANCE_DIR": str(disks), "SF_DISK_RATIO": "100", "SF_DISK_RESERVE": "0"}
        machine = Machine(host, tmp_path, SF_ACCEL="tcg", **small)
        machine.start()
        machine.sf("image", "push", str(tiny_image), "tiny:1")
        room = 24 << 20  # for the guest's start, and a part of what it will write
        ballast = f"fallocate -l $(($(stat -f -c '%a * %S' {disks}) - {room})) {disks}/ballast"
        words = ("--image", "tiny:1", "--memory", "192", "--disk", "1G", "--disk", "1G")
        host.run(["sh", "-c", ballast])
        machine.sf(
            "instance", "create", "w", *words, "--user-data", str(tmp_path / "writer"), "--wait", "created"
        )
        within(240, lambda: machine.instance("w")["power_state"] == "paused", "the disk is full")
        found = machine.instance("w")
        assert "is full" in found["error_message"]
        assert "is full" in machine.sf("instance", "events", "w").stdout
        doctor = machine.sf("doctor", check=False).stdout
        assert re.search(r"warning.*guest system/w", doctor) and str(disks) in doctor
        time.sleep(12)  # another look at it changes nothing
        assert machine.instance("w")["power_state"] == "paused"
        assert "SF-CHECKED" not in machine.sf("instance", "console", "w").stdout

        host.run(["rm", f"{disks}/ballast"])
        within(
            240,
            lambda: "SF-CHECKED 40" in machine.sf("instance", "console", "w").stdout,
            "it has checked all",
        )
        within(120, lambda: machine.instance("w")["power_state"] == "off", "it has powered itself off")
        assert "it goes on" in machine.sf("instance", "events", "w").stdout
        overlay = f"{disks}/{found['uuid']}/vdb.qcow2"
        raw = shlex.quote(str(tmp_path / "vdb.raw"))
        host.run(["sh", "-c", f"qemu-img check {overlay} && qemu-img convert -O raw {overlay} {raw}"])
        checked = host.run(["fsck.fat", "-n", str(tmp_path / "vdb.raw")], check=False)
        assert checked.returncode == 0, checked.stdout
        machine.sf("instance", "delete", "w", "--wait")
        assert host.run(["ls", str(disks)]).stdout.split() == ["lost+found"]
        machine.signal(signal.SIGINT)
        host.run(["umount", str(disks)])
