"""Guests are changed while they exist: processors, memory, larger disks, another name."""

import json
import random
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import api_server, invariants
from tests.api_server import Running
from tests.drills import rounds, seed
from tests.system.machine import within
from tests.system.test_state_put_back import Site, host, site

__all__ = ["host", "site"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with api_server.running(tmp_path / "state") as found:
        yield found
        invariants.check(found.services.store)


def created(server: Running, name: str, **more: Any) -> Any:
    return server.wait_for(f"/instances/{server.instance(name, **more).body['uuid']}", "created")


def test_what_is_set_is_claimed_on_its_node_and_less_only_while_the_guest_is_off(server: Running) -> None:
    created(server, "web")
    found = server.call("PATCH", "/instances/web", {"cpus": 3, "memory": 1024, "disks": {"vda": 8}}).body
    assert (found["cpus"], found["memory"], found["disks"][0]["size"]) == (3, 1024, 8)

    def wanted() -> bool:
        spec = server.agent.desired and server.agent.desired.instances[0]
        return bool(spec and (spec.cpus, spec.memory_mib, spec.disks[0].size_bytes) == (3, 1024, 8 << 30))

    within(20, wanted, "its node knows")
    invariants.check(server.services.store)
    assert server.call("PATCH", "/instances/web", {"memory": 100_000}).status == 507
    assert server.call("PATCH", "/instances/web", {"cpus": 100}).status == 507
    for wrong in ({"cpus": 0}, {"memory": 1}, {"disks": {"vda": 7}}, {"disks": {"vdq": 9}}, {"disks": {"vda": 0}},
                  {"disks": {"vda": 2**21}}, {"state": "deleted"}, {"name": "a/b"}, {"name": ""}):  # fmt: skip
        assert server.call("PATCH", "/instances/web", wrong).status == 400, wrong
    assert server.call("PATCH", "/instances/web", {"memory": 512}).status == 409
    server.call("POST", "/instances/web/poweroff")
    within(20, lambda: server.get("/instances/web")["power_state"] == "off", "off")
    assert server.call("PATCH", "/instances/web", {"memory": 512, "cpus": 1}).status == 200
    assert server.get("/instances/web")["memory"] == 512


def test_twenty_who_want_the_last_memory_get_no_more_than_there_is(server: Running) -> None:
    for number in range(4):
        created(server, f"g{number}")

    def grow(number: int) -> int:
        return server.call("PATCH", f"/instances/g{number % 4}", {"memory": 2000 + number}).status

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(grow, range(20)))
    assert set(answers) <= {200, 409, 507} and 507 in answers
    assert sum(one["memory"] for one in server.get("/instances")) <= 8192 - 512


def test_another_name_is_the_only_one_and_the_old_one_is_free(server: Running) -> None:
    lan = server.network()["uuid"]
    web = created(server, "web", network=lan)
    created(server, "db", network=lan)
    assert server.call("PATCH", "/instances/web", {"name": "db"}).status == 409
    assert server.call("PATCH", "/instances/web", {"name": "DB"}).status == 409, "DNS knows no case"
    assert server.call("PATCH", "/instances/web", {"name": "www"}).body["uuid"] == web["uuid"]
    assert (
        server.get("/instances/www")["uuid"] == web["uuid"]
        and server.call("GET", "/instances/web").status == 404
    )

    def known() -> set[str]:
        networks = server.agent.desired.networks.networks if server.agent.desired else ()
        return {port.hostname for network in networks for port in network.ports}

    within(20, lambda: known() == {"www", "db"}, "DNS knows it")
    created(server, "web", network=lan)
    server.call("DELETE", "/instances/www")
    server.wait_for(f"/instances/{web['uuid']}", "deleted")
    created(server, "www")


def test_a_change_is_refused_where_the_record_is_another_by_now(server: Running) -> None:
    created(server, "web")
    tag = server.call("GET", "/instances/web").headers["etag"]
    assert server.call("PATCH", "/instances/web", {"cpus": 2}, headers={"If-Match": tag}).status == 200
    assert server.call("PATCH", "/instances/web", {"cpus": 3}, headers={"If-Match": tag}).status == 412


def disk_bytes(site: Site, uuid: str) -> int:
    """What the guest's disk has by its own header; while it moves there are two."""
    found = []
    for path in (site.state / "instances" / uuid).glob("vda*.qcow2"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            found.append(int(struct.unpack(">Q", file.read(32)[24:])[0]))
    return min(found, default=0)


@pytest.mark.system
def test_a_disk_grows_under_its_guest_and_the_rest_counts_from_the_next_start(site: Site) -> None:
    uuid = site.create("w1", "--disk", "1G")
    process = site.running()[uuid]
    said = site.sf("instance", "set", "w1", "--disk", "2G", "--memory", "48").stderr
    assert "memory from its next start on" in said
    within(30, lambda: disk_bytes(site, uuid) == 2 << 30, "the disk has grown")
    assert f"'{2 << 30}'" in repr(site.host.virsh("domblkinfo", uuid, "vda").stdout.split())
    assert site.running()[uuid] == process
    assert "49152 KiB" not in site.host.virsh("dominfo", uuid).stdout
    site.sf("instance", "stop", "w1", "--force")
    within(30, lambda: site.instance("w1")["power_state"] == "off", "off")
    assert "is off" in site.sf("instance", "set", "w1", "--disk", "vda=3G").stderr
    site.sf("instance", "rename", "w1", "w9")
    site.sf("instance", "start", "w9")
    within(30, lambda: site.instance("w9")["power_state"] == "on", "on")
    assert disk_bytes(site, uuid) == 3 << 30 and "49152 KiB" in site.host.virsh("dominfo", uuid).stdout
    assert site.sf("instance", "set", "w9", "--disk", "1G", check=False).returncode == 2


@pytest.mark.system
@pytest.mark.drill
def test_a_server_or_libvirtd_that_is_killed_meanwhile_leaves_the_size_that_was_asked_for(site: Site) -> None:
    rng = random.Random(seed())
    uuid = site.create("w1", "--disk", "1G")
    process = site.running()[uuid]
    for turn in range(rounds(full=20)):
        size = turn + 2
        site.sf("instance", "set", "w1", "--disk", f"{size}G")
        time.sleep(rng.uniform(0, 0.3))
        if turn % 2:
            site.host.kill_libvirtd()
            site.host.start_libvirtd()
        else:
            site.signal()
            site.start()
        within(60, lambda s=size: disk_bytes(site, uuid) == s << 30, f"{size} GiB")  # type: ignore[misc]
        within(30, lambda: site.instance("w1")["power_state"] == "on", "on")
        assert site.running()[uuid] == process


@pytest.mark.system
@pytest.mark.drill
def test_a_disk_that_moves_to_its_complete_image_and_grows_at_the_same_time_does_both(site: Site) -> None:
    """One owner does one after the other, whoever is killed between."""
    rng = random.Random(seed())
    for turn in range(rounds(full=10)):
        name = f"m{turn}"
        uuid = site.create(name, "--disk", "1G")
        process = site.running()[uuid]
        for size in (2, 3):
            time.sleep(rng.uniform(0, 0.4))
            site.sf("instance", "set", name, "--disk", f"{size}G")
        if turn % 2:
            site.signal()
            site.start()

        def settled(uuid: str = uuid) -> bool:
            record = json.loads((site.state / "instances" / uuid / "record.json").read_text())
            return not record["served"] and not record["moving"] and disk_bytes(site, uuid) == 3 << 30

        within(60, settled, "moved and grown")
        assert site.running()[uuid] == process
        site.sf("instance", "delete", name, "--wait")


@pytest.mark.system
@pytest.mark.drill
def test_a_disk_that_is_to_grow_while_it_is_snapshot_grows_after_that(site: Site) -> None:
    """Nothing of a snapshot is left in qemu when libvirt changes the disk, and the copy has the size of its moment."""
    rng = random.Random(seed())
    uuid = site.create("w1", "--disk", "1G")
    process = site.running()[uuid]
    for turn in range(rounds(full=20)):
        with ThreadPoolExecutor(2) as pool:
            taking = pool.submit(site.sf, "instance", "snapshot", "w1", "--format", "json", check=False)
            time.sleep(rng.uniform(0, 1.5))
            site.sf("instance", "set", "w1", "--disk", f"{turn + 2}G")
            if killed := turn % 2:
                site.signal()
                site.start()
            taken = taking.result()
        within(60, lambda gib=turn + 2: disk_bytes(site, uuid) == gib << 30, "it has grown")  # type: ignore[misc]
        if not killed:
            assert taken.returncode == 0 and json.loads(taken.stdout)["state"] == "created", taken.stderr

        def ended() -> bool:
            states = {one["state"] for one in site.listed("instance", "snapshots", "w1")}
            return states <= {"created", "error"}

        within(60, ended, "each snapshot ends")
        assert site.running()[uuid] == process and site.instance("w1")["power_state"] == "on"
        within(30, lambda: "sf-cbw" not in nodes(site, uuid), "nothing of it is left in qemu")
    for store in (site.state / "store-namespaces").iterdir():
        assert "every byte" in site.sf("store", "verify", "--full", "--store", str(store)).stdout


def nodes(site: Site, uuid: str) -> str:
    """The block nodes of the guest's qemu."""
    domain = f"sf-{json.loads((site.state / 'installation.json').read_text())['id']}-{uuid}"
    asked = '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'
    return site.host.virsh("qemu-monitor-command", domain, asked).stdout
