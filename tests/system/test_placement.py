"""Where guests go, and what is said of it beforehand: a real server with three nodes, whose machines are played."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute.cluster import liveness
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import new_uuid, transact
from compute.config import Config
from compute.wire.codec import to_plain
from compute.wire.spec import NodeFacts
from tests import invariants
from tests.api_server import Running, running

ROOT, GIB = Path(__file__).parents[2], 1 << 30


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """node1 is the played agent's; node2 and node3 live, and say nothing more."""
    monkeypatch.setattr(liveness, "LEASE_S", 3600.0)
    config = Config(state_dir=tmp_path / "state", node_name="node1", disk_ratio=2.0)
    with running(tmp_path / "state", config=config) as found:
        for number, memory_mib in ((2, 6144), (3, 4096)):
            facts = NodeFacts(4, memory_mib, f"192.0.2.{number}", disk_bytes=20 * GIB)
            node = Node(uuid=new_uuid(), name=f"node{number}", facts=to_plain(facts))
            transact(found.services.store, lambda txn, node=node: txn.create(node))  # type: ignore[misc]
            claims = Claims(name=node.name, disk_bytes=0)
            transact(found.services.store, lambda txn, one=claims: txn.create(one))  # type: ignore[misc]
            found.services.controller.nodes.renew(node.name)
        yield found
        invariants.check(found.services.store)


@pytest.fixture
def sf(server: Running, tmp_path: Path) -> Any:
    env = {**os.environ, "SF_API_URL": server.url, "SF_KEY": server.key, "HOME": str(tmp_path)}

    def run(line: str, code: int = 0) -> str:
        argv = [ROOT / ".venv/bin/sf", *line.split()]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_dry_run_says_of_each_node_why_it_would_be_taken_or_not_and_makes_nothing(
    server: Running, sf: Any
) -> None:
    sf("network create lan 10.42.0.0/24")
    sf("node drain node2")
    before = server.services.store.revision()
    create = "instance create web --image debian:12 --network lan --cpus 2 --memory 4000 --disk 30G"
    said = sf(f"{create} --dry-run")
    assert [line.split(maxsplit=6) for line in said.splitlines()[1:]] == [
        ["node1", "64", "7.5", "GiB", "would", "be", "taken"],
        ["node2", "64", "5.5", "GiB", "40.0", "GiB", "is drained"],
        ["node3", "64", "3.5", "GiB", "40.0", "GiB", "has 3584 MiB of memory free"],
    ]
    first, *others = json.loads(sf(f"{create} --dry-run --format json"))
    assert first == {
        "name": "node1", "fits": True, "why_not": "", "cpus": 64, "memory_mib": 7680, "disk_bytes": None
    }  # fmt: skip
    assert [one["fits"] for one in others] == [False, False]
    assert "node3" in (said := sf(f"{create} --on node3 --dry-run", 6)) and "node1" not in said
    assert "no node has room for web" in said
    assert "no room: node3 has 3584" in sf(f"{create} --on node3", 6), "it is the same that places"
    sf(f"{create} --on node9 --dry-run", 3)
    assert server.services.store.revision() == before, "of the refused ones there is nothing, too"


def test_a_dry_run_refuses_whatever_would_be_refused(server: Running, sf: Any, tmp_path: Path) -> None:
    sf("instance create web --image debian:12")
    assert "already" in sf("instance create web --image debian:12 --dry-run", 5)
    sf("namespace create shop")
    sf("namespace quota set shop instances=0")
    shop = {"namespace": "shop", "dry_run": True}
    answer = server.instance("db", **shop)
    assert answer.status == 507 and "instances 1, of 0" in answer.body["error"]
    sf("instance create db --image debain:12 --dry-run", 3)
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    assert "does not keep" in sf(f"instance create db --image {tmp_path}/disk.raw --dry-run", 2)


def test_a_guest_goes_where_the_dry_run_said_and_disks_fill_a_node(server: Running, sf: Any) -> None:
    for name, memory, node in (
        ("a", 1000, "node1"),
        ("b", 1000, "node1"),
        ("c", 5000, "node1"),
        ("d", 1000, "node2"),
    ):
        create = f"instance create {name} --image debian:12 --memory {memory} --disk 15G"
        assert json.loads(sf(f"{create} --dry-run --format json"))[0]["name"] == node
        assert f"node    {node}" in sf(create)
    sf("instance create e --image debian:12 --on node2 --disk 25G")
    assert "node2 has 0 B of disk free" in sf("instance create f --image debian:12 --on node2", 6)
    assert "node2 has 0 B of disk free" in sf("instance create f --disk 1G --on node2", 6)
    full = {"disk_total_bytes": 20.0 * GIB, "disk_bytes": 19.0 * GIB}
    server.services.controller.usage._said["node3"] = [(0.0, {"": full}), (1.0, {"": full})]
    assert "node3 has 1.0 GiB left for disks" in sf("instance create f --disk 1G --on node3", 6)


def test_nodes_have_labels_and_guests_ask_for_them_and_for_each_other(server: Running, sf: Any) -> None:
    sf("node set node2 --label rack=a --label disk=ssd")
    sf("node set node3 --label rack=a")
    assert "rack=a disk=ssd" in sf("node show node2") and "rack=a" in sf("node ls")
    create = "instance create {} --image debian:12 --memory 100 --label role=web --node-label rack=a {}"
    assert "node    node2" in sf(create.format("w1", ""))
    assert json.loads(sf("instance show w1 --format json"))["node_labels"] == {"rack": "a"}
    assert "node    node3" in sf(create.format("w2", "--apart role=web"))
    assert "node    node2" in sf(create.format("w3", "--node-label disk=ssd --apart role=web"))
    said = sf(create.format("w4", "--near role=web --dry-run"))
    assert said.splitlines()[1].startswith("node2"), "there are two of them"
    assert "fits, but node2 suits its affinity" in said and "is not rack=a" in said
    said = sf(create.format("w4", "--node-label disk=hdd"), 6)
    assert "node2 is not disk=hdd; node3 is not disk=hdd" in said
    sf("node set node2 --label disk=")
    assert "disk=ssd" not in sf("node show node2")
    sf("node set node2 --label disk=", 3)
    sf("node set node3 --label rack", 2)  # a slip of the finger takes nothing away
