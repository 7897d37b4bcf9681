"""A real Debian 12 resumes by the recipe of contrib/renew: itself before it is reached, and logged in to at once."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.system.machine import ROOT, Machine, within
from tests.system.reached import Reached, login
from tests.system.test_agent_drills import remove_everything
from tests.system.test_warm import RESUMED, comes_up, each_itself, end_something, events, says

sys.path.insert(0, str(ROOT / "scripts"))

from guest_images.debian_image import corpus

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.skipif(not drills.everything(), reason="half an hour of emulation: scripts/test --all"),
    pytest.mark.timeout(3600),
]
SIZES = {"resumed": "512", "booted": "528"}
# Two daemons that ran before: of one the kernel is asked for bytes, the other has random numbers of its own.
DAEMONS = """
- path: /usr/local/bin/lottery
  permissions: "0755"
  content: |
    #!/usr/bin/python3
    import os, random, signal, time
    def draw(*_):
        with open("/run/lottery.new", "w") as file:
            file.write(f"{os.urandom(16).hex()} {random.random()}")
        os.rename("/run/lottery.new", "/run/lottery")
    signal.signal(signal.SIGUSR1, draw)
    random.random()
    while True:
        time.sleep(60)
- path: /etc/systemd/system/lottery@.service
  content: |
    [Service]
    ExecStart=/usr/local/bin/lottery
    [Install]
    WantedBy=multi-user.target
- path: /etc/sf/renew.d/lottery
  permissions: "0755"
  content: |
    #!/bin/sh
    systemctl restart lottery@own
runcmd:
- systemctl enable lottery@kernel lottery@own
"""
DRAW = """for of in kernel own; do rm -f /run/lottery; systemctl kill -s USR1 lottery@$of
until [ -e /run/lottery ]; do sleep 0.1; done; cut -d' ' -f$([ $of = own ] && echo 2 || echo 1) /run/lottery; done"""
SELF = f"""cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; cat /etc/hostname | sed s/^/file-/
md5sum </etc/ssh/ssh_host_ed25519_key; readlink /var/lib/cloud/instance; cat /sys/class/net/eth0/address
networkctl status eth0 | sed -n 's/ *DHCP4 Client ID: //p'; ip -4 -o address show eth0 | grep -o 'inet [0-9.]*'
head -c 16 /dev/urandom | md5sum; head -c 16 /dev/random | md5sum; {DRAW}"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with PrivateHost() as host:
        one = Machine(host, tmp_path_factory.mktemp("debian"), SF_ACCEL="tcg")
        recipe = one.home / "recipe.yaml"
        recipe.write_text((ROOT / "contrib/renew/debian.yaml").read_text() + DAEMONS)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", one.home / "key"], check=True)
        one.sf("image", "push", str(corpus(variants=("A",))["A"]), "debian:12")
        one.start()
        one.sf("network", "create", "lan", "10.42.0.0/24")
        for words in (
            ("build", "my/instant:12", "--base", "debian:12", "--user-data", str(recipe)),
            ("warm", "my/instant:12"),
        ):
            took_s = slowly(one, "image", *words, "--memory", SIZES["resumed"])
            print(f"\nsf image {words[0]}: {took_s:.0f} s", flush=True)
        yield one
        remove_everything(one)
        one.signal()


def slowly(machine: Machine, *words: str) -> float:
    """What an emulated Debian takes longer for than other commands; seconds."""
    began_s = time.monotonic()
    done = subprocess.run(machine.argv("sf", *words), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stderr}\n{machine.said()}"
    return time.monotonic() - began_s


def create(machine: Machine, name: str, kind: str = "resumed", *more: str) -> None:
    words = ("--image", "my/instant:12", "--memory", SIZES[kind], "--network", "lan")
    machine.sf("instance", "create", name, *words, "--ssh-key", f"{machine.home}/key.pub", *more)


def address(machine: Machine, name: str) -> str:
    return str(machine.instance(name)["interfaces"][0]["ipv4"])


def logged_in(machine: Machine, name: str, within_s: float = 900) -> str:
    """Its host key, as soon as the user's key is accepted."""
    at, found = address(machine, name), list[str]()

    def accepted() -> bool:
        done = login(machine, machine.home / "key", at, "hostname")
        found[:] = re.findall(r"Server host key: (.*)", done.stderr)
        return done.returncode == 0 and done.stdout.strip() == name

    within(within_s, accepted, f"{name} lets its user in")
    return found[0]


def delete(machine: Machine, *names: str) -> None:
    for name in names:
        machine.sf("instance", "delete", name)
    for name in names:
        within(60, lambda n=name: machine.sf("instance", "show", n, check=False).returncode, "it is gone")  # type: ignore[misc]


def test_two_that_resume_at_once_have_nothing_in_common(machine: Machine) -> None:
    names = ("one", "two")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: create(machine, name), names))
        keys = list(pool.map(lambda name: logged_in(machine, name), names))
        seen = list(pool.map(lambda name: says(machine, name, SELF), names))
    print(f"\n{json.dumps(seen, indent=1)}", flush=True)
    for name in names:
        assert RESUMED in events(machine, name), events(machine, name)
    assert len(seen[0]) == len(seen[1]) == 13 and not set(seen[0]) & set(seen[1]), seen
    for name, key, said in zip(names, keys, seen, strict=True):
        shown = machine.instance(name)
        assert key not in [other for other in keys if other is not key]
        assert said[2:4] == [name, f"file-{name}"] and said[5].endswith(shown["uuid"])
        assert said[8] == f"inet {shown['interfaces'][0]['ipv4']}"
    # Its next boot finds it as it is now: the same keys and ids, whatever cloud-init thinks of a config drive.
    machine.sf("instance", "reboot", "one")

    def rebooted() -> bool:
        time.sleep(3)  # each question takes a processor from it
        asked = ("instance", "exec", "one", "--", "cat", "/proc/sys/kernel/random/boot_id")
        return machine.sf(*asked, check=False).stdout.strip() not in ("", seen[0][1])

    within(900, rebooted, "it reboots")
    assert logged_in(machine, "one") == keys[0]
    slowly(machine, "instance", "exec", "one", "--", "cloud-init", "status", "--wait")
    ids = says(machine, "one", "cat /etc/machine-id; cat /var/lib/cloud/data/instance-id")
    assert ids == [seen[0][0], machine.instance("one")["uuid"]]
    delete(machine, *names)


def test_what_is_the_users_own_is_done_by_cloud_init(machine: Machine) -> None:
    data = machine.home / "data"
    data.write_text("#cloud-config\nruncmd:\n- hostname >/etc/ran\n- cat /etc/machine-id >>/etc/ran\n")
    create(machine, "own", "resumed", "--user-data", str(data))
    key = logged_in(machine, "own")
    assert RESUMED in events(machine, "own")
    slowly(machine, "instance", "exec", "own", "--", "cloud-init", "status", "--wait")
    ids = says(machine, "own", "cat /etc/ran; cat /etc/machine-id; cat /var/lib/cloud/data/instance-id")
    assert ids[0] == "own" and ids[1] == ids[2] and ids[3] == machine.instance("own")["uuid"], ids
    assert logged_in(machine, "own") == key
    delete(machine, "own")


def test_it_is_logged_in_to_at_once(machine: Machine) -> None:
    """Figures: seconds from the exec of `sf instance create`, by turns."""
    figures = dict[str, list[float]]()
    kinds = ["resumed", "booted", *4 * ["resumed"], "booted"]
    for number, kind in enumerate(kinds):
        name, began_s = f"t{number}", time.time()
        create(machine, name, kind)
        logged_in(machine, name)
        figures.setdefault(f"{kind}: logged in", []).append(round(time.time() - began_s, 2))
        told = {row["message"]: row["timestamp"] for row in machine.listed("instance", "events", name)}
        figures.setdefault(f"{kind}: started", []).append(round(told["started"] - began_s, 2))
        assert (RESUMED in told) == (kind == "resumed"), told
        delete(machine, name)
    print(f"\nload {os.getloadavg()}: {json.dumps(figures, indent=1)}", flush=True)
    if place := os.environ.get("SF_FIGURES"):
        Path(place).write_text(json.dumps(figures))


def test_whatever_is_killed_no_debian_is_reached_before_it_is_itself(machine: Machine) -> None:
    names, keys = dict[str, str](), set[str]()
    with Reached(machine) as reached:
        for number in range(drills.rounds(4)):
            name = f"k{number}"
            create(machine, name)
            names[machine.instance(name)["interfaces"][0]["macaddr"]] = name
            what = end_something(machine, name, random.Random(drills.seed() + number), 4)
            within(900, lambda n=name: comes_up(machine, n), f"{what}: it is up")  # type: ignore[misc]
            key = logged_in(machine, name)
            print(f"\n{what}: {events(machine, name)}", flush=True)
            assert key not in keys
            keys.add(key)
            delete(machine, name)
    each_itself(reached, names)
