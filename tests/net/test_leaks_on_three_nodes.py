"""Nothing leaks on three real nodes: networks of every kind come and go while servers and agents are killed."""

import pickle
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from compute.cluster import desired
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.sqlite import SqliteStore
from compute.serve import installation_id
from tests import drills
from tests.system.boot_sector import boot_sector
from tests.system.cluster import Cluster
from tests.system.machine import Machine, within

pytestmark = [pytest.mark.system, pytest.mark.drill]
KINDS = 5
KERNEL = (
    "ip -o link | sed 's/^[0-9]*: //'; ip -o addr | sed 's/^[0-9]*: //'; ip route; ip rule; ip -6 route;"
    " ip neigh show proxy; ip neigh show nud permanent; bridge fdb | grep permanent; nft list ruleset;"
    " ls /run/netns; ss -Hlun"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "sector.raw").write_bytes(boot_sector("HELLO\r\n"))
    with ExitStack() as stack:
        made = Cluster(
            stack, tmp_path, tmp_path / "sector.raw", prepare=_wire, SF_FLOATING_POOL="10.77.0.128/26"
        )
        made.server.sf("image", "tag", "tiny:1", "sector:1")
        yield made


def _wire(cluster: Cluster, machine: Machine) -> None:
    """A LAN of the node's own, and a way to the world by IPv6."""
    name = machine.settings["SF_NODE_NAME"]
    cluster.net(
        machine.host,
        "ip link add br-home type bridge; ip link add lan0 master br-home type veth peer name lan1\n"
        "for link in br-home lan0 lan1; do ip link set $link up; done\n"
        f"ip address add 2001:db8:77::{name[1]}/64 dev eth0 nodad; sysctl -qw net.ipv6.conf.all.forwarding=1\n"
        "ip -6 route add default via 2001:db8:77::fe\n"
        "until ip link show br-home | grep -q 'state UP'; do sleep 0.1; done\n"
        "while ip -6 addr | grep -q tentative; do sleep 0.1; done",
    )


def everything(cluster: Cluster) -> dict[str, str]:
    """What a network could leave on each node: in its kernel, among its processes, domains and files."""
    found = {}
    for name, node in cluster.nodes.items():
        kernel = node.host.run(["sh", "-c", KERNEL]).stdout
        kept = [trace for trace in node.traces() if trace.startswith(("domain", "process", "file"))]
        found[name] = "\n".join([kernel, *sorted(kept)])
    return found


def kill_at_random(
    cluster: Cluster, maker: subprocess.Popen[bytes], kills: int, log: Path, cycles: int
) -> int:
    """kill -9 of the server or of an agent, and its start: spread over the cycles. How many there were."""
    rng, done = random.Random(drills.seed()), 0
    moments = sorted(rng.uniform(0, cycles) for _ in range(kills))
    while maker.poll() is None:
        cycle = len(log.read_text().splitlines()) if log.exists() else 0
        if done < kills and cycle >= int(moments[done]):
            time.sleep(rng.uniform(0, 3))
            name = rng.choice(list(cluster.nodes))
            cluster.nodes[name].signal(signal.SIGKILL)
            time.sleep(rng.uniform(0, 2))
            cluster.nodes[name].start(*([] if name == "n1" else ["agent"]))
            done += 1
        time.sleep(0.1)
    return done


def make(cluster: Cluster, log: Path, *words: object) -> subprocess.Popen[bytes]:
    argv = cluster.server.module(
        "tests.net.maker", str(cluster.server.state), str(log), *(str(word) for word in words)
    )
    with log.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=err, stderr=err)


def reconcile_twice(cluster: Cluster, directory: Path) -> dict[str, str]:
    """What each node has to put right, were it told once more what the server wants of it."""
    found, installation = {}, installation_id(cluster.server.state)
    with closing(SqliteStore(cluster.server.state / "sf.db")) as store:
        for name, node in cluster.nodes.items():
            told = desired.read(Transaction(store), name, installation, list(cluster.nodes), "eth0").networks
            assert len(told.networks) == 2 * KINDS
            path = directory / f"{name}.desired"
            path.write_bytes(pickle.dumps(told))
            command = node.module("tests.net.reconciled", str(node.state), str(path))
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            found[name] = done.stdout + done.stderr
    return found


@pytest.mark.timeout(7200)
def test_networks_of_every_kind_come_and_go_on_three_nodes_through_kills_and_leave_the_baseline(
    cluster: Cluster, tmp_path: Path
) -> None:
    before, nothing = everything(cluster), dict.fromkeys(cluster.nodes, "")
    if drills.everything():
        come_and_go(cluster, tmp_path / "drill.log", 30, 2, 102)
        within(60, lambda: everything(cluster) == before, "all three nodes are as they were")

    come_and_go(cluster, tmp_path / "kept.log", 2, 0, 2, "keep")
    within(60, lambda: len(cluster.alive()) == 3, "all nodes are there")
    # Routers stop by themselves when their server was away for long, and begin again.
    within(60, lambda: reconcile_twice(cluster, tmp_path) == nothing, "every node is as it must be")
    for kind in ("instance", "network", "rules"):
        listed = cluster.server.listed(kind, "ls")
        for one in listed:
            cluster.server.sf(kind, "delete", one["uuid"])
        within(60, lambda kind=kind: not cluster.server.listed(kind, "ls"), f"no {kind} is there")  # type: ignore[misc]
    within(60, lambda: everything(cluster) == before, "nothing is left of what was there then")


def come_and_go(cluster: Cluster, log: Path, kills: int, first: int, last: int, *words: str) -> None:
    maker = make(cluster, log, first, last, *words)
    killed = kill_at_random(cluster, maker, kills, log, last - first)
    assert maker.returncode == 0, log.with_suffix(".err").read_text()[-4000:]
    print(f"{last - first} cycles, {killed} kills")
