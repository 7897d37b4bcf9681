"""docs/howto/backup.md: a home server's place is taken by new hardware, out of one store."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.system.boot_sector import boot_sector
from tests.system.machine import within
from tests.system.test_state_put_back import Site, host, site

__all__ = ["host", "site"]
pytestmark = pytest.mark.system


@pytest.fixture
def hosts() -> Iterator[tuple[PrivateHost, PrivateHost]]:
    with ExitStack() as stack:
        yield stack.enter_context(PrivateHost()), stack.enter_context(PrivateHost())


def machine(host: PrivateHost, home: Path, name: str, bucket: Path) -> Site:
    home.mkdir()
    more = {"SF_STORE": str(bucket), "SF_STATE_BACKUP": str(bucket), "SF_ACCEL": "tcg", "SF_NODE_NAME": name}
    return Site(host, home, SF_LISTEN="127.0.0.1:13000", **more)


def test_state_images_and_guests_come_out_of_one_place_and_boot(
    hosts: tuple[PrivateHost, PrivateHost], tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket"
    old, new = (
        machine(host, tmp_path / name, name, bucket) for host, name in zip(hosts, ("old", "new"), strict=True)
    )
    old.sf("store", "init", str(bucket))
    old.start()
    (tmp_path / "disk.img").write_bytes(boot_sector("HELLO AGAIN\r\n"))
    old.sf("image", "push", str(tmp_path / "disk.img"), "loop")
    old.sf("network", "create", "lan", "10.42.0.0/24")
    brought, lost = (old.create(name, "--network", "lan") for name in ("web", "gone"))
    address = old.instance("web")["interfaces"][0]["ipv4"]
    old.sf("key", "add", "system", "laptop")
    snapshot = old.listed("instance", "snapshot", "gone")
    assert snapshot["state"] == "created"
    within(90, lambda: (bucket / "state").is_dir(), "the server backs itself up when it is due")
    old.sf("state", "backup", str(bucket))
    old.signal()
    for uuid in old.running():  # the old machine is gone
        old.host.virsh("destroy", uuid)
    key = (old.state / "auth/local-key").read_text()
    shutil.copytree(old.state / "instances" / brought, tmp_path / "saved")
    shutil.rmtree(old.state)

    said = new.sf("state", "restore", str(bucket)).stderr
    assert "2 guests" in said and "old" in said
    shutil.copytree(tmp_path / "saved", new.state / "instances" / brought)
    new.start()
    within(60, lambda: new.instance("web")["power_state"] == "on", "the guest whose disks were brought is on")
    within(30, lambda: "HELLO AGAIN" in new.sf("instance", "console", "web").stdout, "it has booted")
    found = new.instance("web")
    assert (found["uuid"], found["node"], found["interfaces"][0]["ipv4"]) == (
        brought,
        "old",
        address,
    )  # as it was called
    within(30, lambda: new.instance("gone")["state"] == "error", "of the other nothing is made anew")
    assert "none are made anew" in new.instance("gone")["error_message"] and set(new.running()) == {brought}
    assert (new.state / "auth/local-key").read_text() == key
    assert set(new.sf("key", "ls", "system", "--format", "name").stdout.split()) == {"laptop", "local"}
    new.create("fresh", "--network", "lan")
    new.sf("instance", "delete", "gone", "--wait")
    new.sf("instance", "create", "gone", "--image", snapshot["name"], "--network", "lan", "--memory", "32")
    within(60, lambda: "HELLO AGAIN" in new.sf("instance", "console", "gone").stdout, "its snapshot boots")
    assert lost not in {one["uuid"] for one in new.listed("instance", "ls")}
    assert "newest backup of it is of" in new.sf("doctor", check=False).stdout
    new.stop()


def test_a_node_that_joined_follows_the_restored_server_and_keeps_what_that_does_not_know(site: Site) -> None:
    url, token = (site.listed("node", "token")[key] for key in ("url", "token"))
    far = Site(site.host, site.home / "far", SF_ACCEL="tcg", SF_NODE_NAME="n2")
    far.home.mkdir()
    far.start("agent", "--join", url, "--token", token)
    within(60, lambda: "n2" in {n["name"] for n in site.listed("node", "ls")}, "n2 has joined")
    known = site.create("w2", "--on", "n2", "--network", "lan")
    site.sf("state", "backup", str(site.home / "kept.state"))
    later = site.create("w3", "--on", "n2", "--network", "lan")
    before, addresses = site.running(), {site.instance(n)["interfaces"][0]["ipv4"] for n in ("w2", "w3")}
    done = site.sf("state", "restore", str(site.home / "kept.state"), check=False)
    assert done.returncode == 5 and "another sf serve" in done.stderr, "not under a server that runs"
    site.signal()
    site.state.rename(site.home / "lost")
    site.sf("state", "restore", str(site.home / "kept.state"))
    shutil.copytree(site.home / "lost" / "store", site.state / "store")
    site.start()
    (orphan,) = site.orphans(later)
    assert (orphan["name"], orphan["node"], orphan["power_state"]) == ("w3", "n2", "on")
    within(60, lambda: site.instance("w2")["power_state"] == "on", "w2 is known")
    assert site.instance("w2")["uuid"] == known and site.running() == before
    fresh = site.create("w4", "--on", "n2", "--network", "lan")
    assert site.instance("w4")["interfaces"][0]["ipv4"] not in addresses and fresh in site.running()
    for name in ("w2", "w4"):
        site.sf("instance", "delete", name, "--wait")
    assert set(site.running()) == {later}
    far.stop()
