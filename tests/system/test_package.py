"""The packages, as somebody meets them who has never seen sf: installed, used, upgraded, switched off and on, removed.

Whole under scripts/test --all. SF_TEST_SUITE=trixie is another system than Debian 12, SF_TEST_PACKAGES a directory of
packages that are built already. Prints how long each part took.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts import fresh_root
from tests import drills
from tests.system.installed import Installed, in_root
from tests.system.machine import ROOT, within

SUITE = os.environ.get("SF_TEST_SUITE", "bookworm")
pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not drills.everything(), reason="builds packages and a system: scripts/test --all"),
]

DB = """#!/bin/sh
while sleep 1; do echo "SF-UP $(cut -d ' ' -f 1 /proc/uptime)"; done
"""
WEB = """#!/bin/sh
while sleep 0.5; do ping -c 1 -W 3 10.42.0.9 >/dev/null && echo "SF-POLL ok" || echo "SF-POLL failed"; done
"""


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{SUITE}: {what}: {time.monotonic() - began:.1f} s")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of now, and in before/ the same under an older version."""
    built = os.environ.get("SF_TEST_PACKAGES")
    directory = tmp_path_factory.mktemp("packages")
    if built:
        for path in Path(built).glob("sf-*.deb"):
            shutil.copy(path, directory)
    else:
        with timed("scripts/package, in a new root"):
            subprocess.run([ROOT / "scripts/package", "--suite", SUITE, "--to", directory], check=True)
    (directory / "before").mkdir()
    for path in directory.glob("*.deb"):
        tree = directory / "tree"
        subprocess.run(["dpkg-deb", "-R", path, tree], check=True)
        control = tree / "DEBIAN/control"
        version = re.search(r"^Version: (.*)", control.read_text(), re.M)
        assert version is not None
        control.write_text(control.read_text().replace(version[1], f"0.0.9~{version[1]}"))
        subprocess.run(
            ["dpkg-deb", "-Znone", "-b", tree, directory / "before"], check=True, stdout=subprocess.DEVNULL
        )
        shutil.rmtree(tree)
    return directory


@pytest.fixture
def machine(packages: Path, tiny_image: Path) -> Iterator[Installed]:
    with fresh_root.new_root(SUITE) as root:
        shutil.rmtree(root / "root/sf")
        shutil.copytree(packages, root / "root/debs")
        shutil.copy(tiny_image, root / "srv/tiny.qcow2")
        (root / "root/db").write_text(DB)
        (root / "root/web").write_text(WEB)
        in_root(
            root,
            "apt-get -qq update; apt-get -qq -y install --no-install-recommends systemd-sysv dbus iproute2 procps",
        )
        with timed("download of what the packages depend on"):
            in_root(root, "apt-get -qq -y -d install --no-install-recommends /root/debs/*.deb")
        (root / "var/log/journal").mkdir(exist_ok=True)
        made = Installed(root)
        try:
            made.boot()
            yield made
        finally:
            made.close()


def traces(machine: Installed) -> set[str]:
    """What a package or sf may leave: files, users, namespaces, links, tables, domains, processes."""
    ignored = r"^/(proc|sys|dev|run|tmp|root|etc/(ld.so.cache|ssl/certs|.*-$)|var/(log|cache|lib/(apt|dpkg|systemd)))"
    found = machine.run(
        "find / -xdev -printf '%p\\n'; getent passwd | sed s/^/user:/; ip netns; ip -o link"
    ).stdout
    found += machine.run(
        "nft list tables; virsh -q list --all --name; ps -eo args= | grep -E '^[^ ]*(dnsmasq|qemu|sf).*[/=]sf[-/]'",
        check=False,
    ).stdout
    return {line for line in found.splitlines() if not re.match(ignored, line)}


def both_run(machine: Installed) -> bool:
    return machine.run("sf instance ls", check=False).stdout.split().count("on") == 2


def polls(machine: Installed) -> list[str]:
    return re.findall(r"SF-POLL (.*)", machine.run("sf instance console web").stdout.replace("\r", ""))


def ups(machine: Installed) -> list[float]:
    """db's uptimes, as it says them."""
    return [float(up) for up in re.findall(r"SF-UP ([0-9.]+)", machine.run("sf instance console db").stdout)]


def end(machine: Installed) -> str:
    """What was said when the host went down last. In namespaces all boots are one to the journal."""
    said = machine.run("journalctl -o short-monotonic --no-pager").stdout
    return said[said.rindex("Stopping sf-serve") :]


def test_installed_used_upgraded_switched_off_and_on_removed_and_purged(machine: Installed) -> None:
    apt = "apt-get -qq -y -o Dpkg::Use-Pty=0"
    before = traces(machine)
    with timed("apt install"):
        machine.run(f"{apt} install --no-install-recommends /root/debs/before/*.deb")
    within(30, lambda: machine.run("sf network ls", check=False).returncode == 0, "sf serve answers")
    green = (
        "sf doctor && ! sf doctor | grep -E '^(wrong|warning)'"  # once the agent has said what the machine is
    )
    within(60, lambda: machine.run(green, check=False).returncode == 0, "sf doctor has nothing to say")
    with timed("the demo's guest, with its network and image"):
        machine.run("sf image push /srv/tiny.qcow2 tiny:1 && sf network create lan 10.42.0.0/24")
        create = "sf instance create {0} --image tiny:1 --network lan --memory 192 --user-data /root/{0} --wait boot"
        machine.run(create.format("db").replace("lan", "lan,address=10.42.0.9"))
    machine.run(create.format("web"))
    machine.run("sf instance set db --order 1 --delay 2s && sf instance set web --order 2")
    within(180, lambda: polls(machine).count("ok") > 3, "web hears of db")
    assert "SF-GUEST-READY" in machine.run("sf instance console db").stdout

    # What systemd is for
    first = machine.run("systemctl show -P MainPID sf-serve").stdout
    machine.run(f"kill -9 {first}")
    within(30, lambda: machine.run("sf network ls", check=False).returncode == 0, "sf serve is back")
    assert machine.run("systemctl show -P MainPID sf-serve").stdout != first
    off = "sf-mirror sf-mirror-sync.timer sf-mirror-refresh.timer sf-gc.timer sf-verify.timer sf-imaged"
    assert set(machine.run(f"systemctl is-enabled {off}", check=False).stdout.split()) == {"disabled"}
    machine.run("systemctl start sf-gc sf-verify")
    mirror = "runuser -u sf-mirror -- env SF_STATE_DIR=/var/lib/sf-mirror sf"
    machine.run(
        f"{mirror} mirror init && {mirror} image push /srv/tiny.qcow2 tiny:1 && {mirror} mirror publish"
    )
    machine.run(
        "systemctl start sf-mirror sf-mirror-refresh sf-mirror-gc sf-mirror-verify && systemctl stop sf-mirror"
    )

    # Upgrade
    guests = machine.run("systemctl show -P ActiveEnterTimestamp sf-guests").stdout
    qemus = machine.run("pgrep -x qemu-system-x86").stdout
    with timed("apt upgrade"):
        machine.run(f"{apt} install --no-install-recommends /root/debs/*.deb")
    within(60, lambda: machine.run("sf instance ls", check=False).returncode == 0, "sf serve is upgraded")
    count = len(polls(machine))
    within(180, lambda: len(polls(machine)) > count + 3, "web goes on")
    assert "failed" not in polls(machine)[3:], polls(machine)
    seen = ups(machine)
    assert seen == sorted(seen), "db was started anew"
    assert machine.run("pgrep -x qemu-system-x86").stdout == qemus
    assert machine.run("systemctl show -P ActiveEnterTimestamp sf-guests").stdout == guests
    print(f"{SUITE}: {len(polls(machine))} polls, {polls(machine).count('failed')} failed")

    # The host goes down and comes back
    with timed("poweroff of the host with two guests"):
        machine.power_off()
    with timed("boot of the host"):
        machine.boot()
    said = end(machine)
    print(
        "\n".join(
            line for line in said.splitlines() if re.search(r"sf-guests|sf\[|Stopp.*(libvirtd|sf:)", line)
        )
    )
    order = (
        "stopped; 2 guests",
        "system/web is off",
        "system/db is off",
        "Stopping libvirtd",
        "Stopped libvirtd",
    )
    places = [said.index(text) for text in order]
    assert places == sorted(places) and "was cut off" not in said
    within(240, lambda: both_run(machine), "both run")
    events = machine.run("sf instance events db --format json; sf instance events web --format json").stdout
    started = [
        max(
            float(at) for at, what in re.findall(r'"timestamp": ([\d.]+),[^{}]*?"message": "(started)"', half)
        )
        for half in events.split("\n]\n[")
    ]
    assert started[0] + 2 <= started[1], started
    within(120, lambda: polls(machine)[-1] == "ok", "web hears of db again")

    # Removal
    images = machine.run("ls /var/lib/sf/store/packs /var/lib/sf/instances").stdout
    with timed("apt remove with two running guests"):
        told = machine.run(f"{apt} remove sf-node sf-images").stdout
    assert "stay in /var/lib/sf;" in told and "stay in /var/lib/sf-mirror;" in told
    assert machine.run("ls /var/lib/sf/store/packs /var/lib/sf/instances").stdout == images
    ours = re.compile(r"\bsf([-_./]|$)")
    kept = re.compile(r"/var/lib/sf(-mirror)?(/|$)|/etc/sf(/|$)|user:sf-mirror|/etc/systemd/system/.*\bsf-")
    left = {line for line in traces(machine) - before if ours.search(line)}
    print("left after remove:", sorted({line for line in left if line.count("/") < 5}))
    assert not {line for line in left if not kept.match(line)}
    with timed("installed again"):
        machine.run(f"{apt} install --no-install-recommends /root/debs/*.deb")
    within(240, lambda: both_run(machine), "both run")
    machine.run(f"{apt} purge sf-node sf-images")
    left = {line for line in traces(machine) - before if ours.search(line)}
    print("left after purge:", sorted(left))
    assert left == set()
