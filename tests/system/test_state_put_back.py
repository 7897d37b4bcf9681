"""What runs is never destroyed because the state does not know it: real libvirtd, qemu and networks."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.system.boot_sector import boot_sector
from tests.system.machine import Machine, within

pytestmark = pytest.mark.system


class Site(Machine):
    """A machine whose guests are boot sectors that run until they are stopped."""

    def running(self) -> dict[str, str]:
        """Uuid → process of every guest."""
        files = (self.host.directory / "run/libvirt/qemu").glob("sf-*.pid")
        return {path.stem.split("-", 2)[2]: path.read_text().strip() for path in files}

    def create(self, name: str, *words: str) -> str:
        """A guest; its uuid, once it runs."""
        self.sf("instance", "create", name, "--image", "loop", "--memory", "32", *words)
        within(60, lambda: self.instance(name)["power_state"] == "on", f"{name} is on")
        return str(self.instance(name)["uuid"])

    def signal(self, number: int = signal.SIGKILL) -> None:
        """To the one on this state directory."""
        assert self.server is not None
        for pid in self.host.run(["pgrep", "-f", "bin/sf (serve|agent)"], check=False).stdout.split():
            settings = self.host.run(["cat", f"/proc/{pid}/environ"], check=False).stdout.split("\0")
            if f"SF_STATE_DIR={self.state}" in settings:
                self.host.run(["kill", f"-{int(number)}", pid], check=False)
        self.server.wait(30)

    def stop(self) -> None:
        self.signal(signal.SIGINT)

    def db(self) -> list[Path]:
        return sorted(self.state.glob("sf.db*"))

    def keep(self) -> Path:
        """A copy of the database of a server that was stopped."""
        shutil.copy(self.state / "sf.db", self.home / "kept.db")
        return self.home / "kept.db"

    def put_back(self, kept: Path | None) -> None:
        for path in self.db():
            path.unlink()
        if kept:
            shutil.copy(kept, self.state / "sf.db")

    def orphans(self, *uuids: str) -> list[dict[str, str]]:
        within(
            30, lambda: {o["uuid"] for o in self.listed("node", "orphans")} == set(uuids), "orphans are shown"
        )
        found: list[dict[str, str]] = self.listed("node", "orphans")
        return found

    def taps(self) -> dict[str, str]:
        """Every guest's tap and whether it is up, in all namespaces."""
        found = {}
        for line in self.host.run(["ip", "netns", "list"]).stdout.split("\n"):
            if name := line.split(" ")[0]:
                links = json.loads(self.host.run(["ip", "-n", name, "-j", "link"]).stdout)
                found |= {
                    k["ifname"]: "UP" if "UP" in k["flags"] else "DOWN"
                    for k in links
                    if k["ifname"][:3] == "sft"
                }
        return found


@pytest.fixture(scope="module")
def host() -> Iterator[PrivateHost]:
    with PrivateHost() as made:
        yield made


@pytest.fixture
def site(host: PrivateHost, tmp_path: Path) -> Iterator[Site]:
    settings = {"SF_ACCEL": "tcg", "SF_NODE_NAME": "n1", "SF_LISTEN": "127.0.0.1:13000"}
    found = Site(host, tmp_path, **settings, SF_AGENT_LISTEN="127.0.0.1:13001")
    disk = tmp_path / "loop.img"
    disk.write_bytes(boot_sector("HELLO\r\n"))
    found.start()
    found.sf("image", "push", str(disk), "loop")
    found.sf("network", "create", "lan", "10.42.0.0/24")
    yield found
    found.stop()
    for uuid in found.running():
        host.virsh("destroy", uuid)
    for name in host.virsh("list", "--all", "--name").stdout.split():
        host.virsh("undefine", name)
    for line in host.run(["ip", "netns", "list"]).stdout.split("\n"):
        if line:
            host.run(["ip", "netns", "delete", line.split(" ")[0]])


def test_a_database_from_before_a_guest_was_made_destroys_nothing_and_the_guest_can_be_adopted(
    site: Site,
) -> None:
    """A1: w1's qemu was killed and its disk deleted within 6 s, without a word."""
    old = site.create("w0", "--network", "lan")
    site.stop()
    kept = site.keep()
    site.start()
    new = site.create("w1", "--network", "lan")
    address = site.instance("w1")["interfaces"][0]["ipv4"]
    before, taps = site.running(), site.taps()
    site.stop()
    site.put_back(kept)
    site.start()
    (orphan,) = site.orphans(new)
    assert (orphan["name"], orphan["namespace"], orphan["power_state"], orphan["node"]) == (
        "w1",
        "system",
        "on",
        "n1",
    )
    assert site.instance("w0")["power_state"] == "on" and site.running() == before and site.taps() == taps
    third = site.create("w2", "--network", "lan")
    assert site.instance("w2")["interfaces"][0]["ipv4"] != address
    site.sf("node", "orphans", "--adopt", new)
    assert site.orphans() == []
    found = site.instance("w1")
    assert (found["uuid"], found["power_state"], found["interfaces"][0]["ipv4"]) == (new, "on", address)
    assert {old, new, third} == set(site.running()) and site.running()[new] == before[new]
    site.sf("instance", "delete", "w1")
    within(30, lambda: new not in site.running(), "a recorded delete is carried out")
    within(30, lambda: not (site.state / "instances" / new).exists(), "its disks go after it")


def test_a_guest_deleted_since_is_not_made_anew_and_whose_address_is_whose_is_said(site: Site) -> None:
    """A4: on a clash of addresses the quarantined guest's link is down, and that is said; A1: no empty disks."""
    old = site.create("w0", "--network", "lan")
    site.stop()
    kept = site.keep()
    site.start()
    site.sf("instance", "delete", "w0")
    within(60, lambda: old not in site.running(), "w0 is gone")
    new = site.create("w1", "--network", "lan,address=10.42.0.2")
    before = site.running()
    site.stop()
    site.put_back(kept)
    site.start()
    site.orphans(new)
    within(30, lambda: site.instance("w0")["state"] == "error", "w0 has no disks")
    assert "none are made anew" in site.instance("w0")["error_message"]
    within(30, lambda: "its link is down" in site.orphans(new)[0]["error_message"], "the clash is said")
    assert site.running() == before and list(site.taps().values()) == ["DOWN"]
    assert "its link is down" in site.sf("doctor", check=False).stdout
    site.sf("instance", "delete", "w0")
    within(60, lambda: list(site.taps().values()) == ["UP"], "the address is free, and the link up")
    site.sf("node", "orphans", "--adopt", new)
    assert site.instance("w1")["interfaces"][0]["ipv4"] == "10.42.0.2" and site.running() == before


def test_a_lost_database_destroys_nothing_and_everything_can_be_adopted_with_its_network(site: Site) -> None:
    """A1: the same with a lost database."""
    uuid = site.create("w1", "--network", "lan")
    found = site.instance("w1")
    vni = site.listed("network", "show", "lan")["vxlan_id"]
    before, taps = site.running(), site.taps()
    site.stop()
    site.put_back(None)
    site.start()
    site.orphans(uuid)
    assert site.running() == before and site.taps() == taps and set(taps.values()) == {"UP"}
    site.sf("node", "orphans", "--adopt", uuid)
    network = site.listed("network", "show", "lan")
    assert (network["vxlan_id"], network["netblock"]) == (vni, "10.42.0.0/24")
    again = site.instance("w1")
    assert again["interfaces"][0]["ipv4"] == found["interfaces"][0]["ipv4"]
    assert site.running() == before


def test_an_empty_database_is_refused_with_its_path_and_nothing_is_touched(site: Site) -> None:
    """A6: a database of 0 bytes was taken for a new installation."""
    site.create("w1")
    before = site.running()
    site.stop()
    whole = site.keep()
    site.put_back(None)
    (site.state / "sf.db").touch()
    done = subprocess.run(site.argv("sf", "serve"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{site.state}/sf.db is damaged: it is empty" in done.stderr
    assert site.running() == before and (site.state / "sf.db").stat().st_size == 0
    site.put_back(whole)
    site.start()
    assert site.instance("w1")["power_state"] == "on" and site.running() == before


def test_another_name_of_the_host_changes_nothing_and_naming_it_back_neither(site: Site) -> None:
    """A2: rename the host and every guest on it was gone; naming it back made them anew with empty disks."""
    uuid = site.create("w1", "--network", "lan")
    before, taps = site.running(), site.taps()
    directory = site.state / "instances" / uuid
    record = directory / "record.json"  # the disk may still move to the complete image, into its second file
    within(30, lambda: not json.loads(record.read_text())["served"], "its disk is where it stays")
    (disk,) = directory.glob("vda*.qcow2")
    inode = disk.stat().st_ino
    for name in ("renamed", "n1"):
        site.stop()
        site.settings["SF_NODE_NAME"] = name
        site.start()
        assert [n["name"] for n in site.listed("node", "ls")] == ["n1"]
        within(30, lambda: site.instance("w1")["power_state"] == "on", "it is on")
        assert site.instance("w1")["node"] == "n1"
        assert site.listed("node", "orphans") == []
        assert (site.running(), site.taps(), disk.stat().st_ino) == (before, taps, inode)
        assert [line.count(" n1:") for line in site.said().splitlines() if " renamed," in line] == [1]
        site.sf("instance", "set", "w1", "--cpus", "2" if name == "renamed" else "3")
        assert {event["fqdn"] for event in site.listed("instance", "events", "w1")} == {"n1"}
    site.create("w2", "--network", "lan")


def test_a_copy_of_the_state_directory_beside_the_original_is_refused_with_both_paths(site: Site) -> None:
    """A5: it deleted the original's guests."""
    site.create("w1")
    before = site.running()
    copy = site.home / "copy"
    subprocess.run(["cp", "-a", site.state, copy], check=True)
    more = ("SF_STATE_DIR=" + str(copy), "SF_LISTEN=127.0.0.1:13900", "SF_AGENT_LISTEN=")
    done = subprocess.run(site.argv("env", *more, "sf", "serve"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert str(copy) in done.stderr and f"{site.state}," in done.stderr
    assert site.running() == before


def test_a_node_that_was_removed_while_it_was_dead_is_told_when_it_comes_back(site: Site) -> None:
    """A3: the record stays until the node that may hold the guest has confirmed; several nodes share one host."""
    mine = site.create("w1")
    url, token = (site.listed("node", "token")[key] for key in ("url", "token"))
    far = Site(
        site.host, site.home / "far", SF_ACCEL="tcg", SF_NODE_NAME="n2", SF_STORE=f"{site.state}/store"
    )
    far.home.mkdir()
    far.start("agent", "--join", url, "--token", token)
    within(60, lambda: "n2" in {n["name"] for n in site.listed("node", "ls")}, "n2 has joined")
    there = site.create("w2", "--on", "n2")
    far.signal()
    within(60, lambda: site.listed("node", "show", "n2")["state"] == "missing", "n2 is missing")
    site.sf("node", "remove", "n2")
    assert {i["name"] for i in site.listed("instance", "ls")} == {"w1"}
    assert set(site.running()) == {mine, there}
    far.start("agent")
    within(60, lambda: set(site.running()) == {mine}, "the recorded deletion is carried out")
    within(30, lambda: not (far.state / "instances" / there).exists(), "its disks are gone")
    assert site.instance("w1")["power_state"] == "on"
    far.stop()
