"""kill -9 of whoever takes part in a move, at random moments of it: the guest runs in one place, its disks whole."""

import itertools
import random
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imagestore import open_store, verify_store
from tests import drills
from tests.system.cluster import Cluster
from tests.system.machine import send, within
from tests.system.test_moves import nothing_left, runs_on

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not drills.everything(), reason="many minutes, in scripts/test --all"),
]

PLACE = 44 << 20
COUNT = f"""#!/bin/sh
# The same number on both disks, first on the first; what both had at its start is said.
read() {{ dd if=/dev/$1 bs=512 skip={PLACE >> 9} count=1 2>/dev/null | tr -cd 0-9 | sed 's/^0*//'; }}
i=$(read vda); i=${{i:-0}}; second=$(read vdb)
echo "SF-BEGAN $i ${{second:-0}}" >/dev/ttyS0
while true; do
    i=$((i + 1))
    for disk in vda vdb; do
        printf '%015d\\n' $i | dd of=/dev/$disk bs=512 seek={PLACE >> 9} conv=notrunc,sync,fsync 2>/dev/null
    done
    echo "SF-COUNT $i" >/dev/ttyS0
done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Cluster]:
    """n1 is the server; the guest `web` counts on n2 or n3."""
    with ExitStack() as stack:
        made = Cluster(stack, tmp_path_factory.mktemp("cluster"), tiny_image)
        script = made.key.with_name("count.sh")
        script.write_text(COUNT)
        words = ["--memory", "128", "--disk", "1G", "--disk", "1G", "--on", "n2", "--user-data", str(script)]
        made.server.sf("instance", "create", "web", "--image", "tiny:1", *words)
        within(150, lambda: said(made)[1] > 5, "web counts")
        yield made
        web = made.server.instance("web")["uuid"]
        made.server.sf("instance", "delete", "web", "--force", "--wait")
        assert all(nothing_left(made, node, web) for node in ("n2", "n3"))
        (own,) = (made.server.state / "store-namespaces").iterdir()
        store = open_store(str(own))
        assert not verify_store(store, full=True).problems and not list(store.names.list())
        store.backend.close()


def said(cluster: Cluster) -> tuple[list[int], int]:
    """What both disks had when the guest began, and how far it has counted; [] and -1 before it said so."""
    text = cluster.server.sf("instance", "console", "web", check=False).stdout
    began, counted = re.findall(r"SF-BEGAN (\d+) (\d+)", text), re.findall(r"SF-COUNT (\d+)", text)
    return [int(each) for each in began[-1]] if began else [], int(counted[-1]) if counted else -1


def goes(cluster: Cluster, node: str, uuid: str) -> bool:
    """Whether its processors run there; looked at where it goes first, then where it comes from."""
    return uuid in cluster.nodes[node].host.virsh("list", "--name", "--state-running", check=False).stdout


def kill(cluster: Cluster, what: str, here: str, there: str) -> None:
    """kill -9, and what a supervisor would start again."""
    role, _, where = what.partition(" of the ")
    machine = cluster.nodes[{"source": here, "destination": there}.get(where, "n1")]
    if role == "qemu":
        send(signal.SIGKILL, *machine.processes("qemu-system"))
    elif role == "libvirtd":
        machine.host.kill_libvirtd(9)
        machine.host.start_libvirtd()
    else:
        machine.signal()
        machine.start(*(("agent",) if role == "agent" else ()))


WHAT = ["agent of the source", "agent of the destination", "server", "libvirtd of the source",
        "libvirtd of the destination", "command"]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "how"),
    [(what, "--cold") for what in WHAT]
    + [(what, "") for what in (*WHAT, "qemu of the destination", "qemu of the source")],
)
def test_a_guest_that_moves_outlives_whoever_dies_meanwhile(cluster: Cluster, what: str, how: str) -> None:
    """One that moves live does not begin anew, whoever dies but its own qemu; its disks are looked at by a reboot."""
    server, moves, web = cluster.server, 0, cluster.server.instance("web")["uuid"]
    for number in range(drills.rounds(20, "SF_KILLS")):
        rng, here, counted = (
            random.Random(drills.seed() + number),
            server.instance("web")["node"],
            said(cluster)[1],
        )
        there = "n3" if here == "n2" else "n2"
        within(90, lambda: server.instance("web")["left"] == [], "its former node has removed it")
        words = ("instance", "migrate", "web", "--on", there, "--timeout", "2s", *how.split())
        boots = said(cluster)[0]
        moving = subprocess.Popen(
            server.argv("sf", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(rng.uniform(0.2, 4.0))
        if what == "command":
            moving.kill()
        else:
            kill(cluster, what, here, there)
        _, why = moving.communicate(timeout=300)

        def over(between: tuple[str, str] = (there, here)) -> bool:
            looked = (goes(cluster, node, web) for node in between)
            assert sum(looked) <= 1 if not how else len(runs_on(cluster, web)) <= 1
            states = [one["state"] for one in server.listed("instance", "snapshots", "web")]
            now = server.instance("web")
            if (
                what == "qemu of the source"
                and now["power_state"] in ("crashed", "off")
                and not now["moving"]
            ):
                server.sf("instance", "start", "web")
            done = now["power_state"] == "on" and not now["arriving"] and not now["moving"]
            return done and all(state in ("created", "error") for state in states)

        within(200, over, f"round {number}: {why}")
        at = server.instance("web")["node"]
        within(150, lambda at=at: runs_on(cluster, web) == [at], "it runs where its record says")  # type: ignore[misc]
        within(150, lambda c=counted: said(cluster)[1] > c + 3, f"round {number}: it counts on, on {at}")  # type: ignore[misc]
        if not how:
            assert "qemu" in what or said(cluster)[0] in ([], boots), f"round {number}: it began anew"
            counted = said(cluster)[1]
            server.sf("instance", "reboot", "web", "--hard")
            within(150, lambda c=counted: min([-1, *said(cluster)[0]][1:] or [-1]) >= c, "it began anew")  # type: ignore[misc]
        first, second = said(cluster)[0]
        assert first in (second, second + 1), f"round {number}: the disks are of two moments"
        assert at == here or first >= counted, f"round {number}: what it had written is gone"
        moves += at == there
        print(f"round {number}: {what}: {here} -> {at} {why.strip()[-160:]}")
    print(f"{what}: moved {moves} times all the same")


def pinged(cluster: Cluster, name: str, moves: int) -> None:
    """Move a guest of network `lan` from n2 to n3 and back, so often; prints silence and bytes of each."""
    server = cluster.server
    address, router = server.instance(name)["interfaces"][0]["ipv4"], cluster.nodes[cluster.router()]
    vni = server.listed("network", "show", "lan")["vxlan_id"]
    spaces = router.host.run(["ip", "netns", "list"]).stdout.split()
    (space,) = [space for space in spaces if space.endswith(f"-{vni:06x}")]

    def memories() -> list[int]:
        said = server.listed("instance", "events", name)
        return [int(e["extra"]["memory_bytes"]) for e in said if e["message"] == "goes on here"]

    stalls, heard = list[float](), cluster.key.with_name("pings")
    for number in range(moves):
        node = "n3" if number % 2 == 0 else "n2"
        there = cluster.nodes[node]
        argv = ["ip", "netns", "exec", space, "ping", "-n", "-D", "-i", "0.01", address]
        with heard.open("w") as out:  # a pipe that nobody reads would hold it up
            pinging = router.host.popen(argv, stdout=out)
        time.sleep(1)
        count = "cat /sys/class/net/eth0/statistics/rx_bytes"
        before = int(there.host.run(["sh", "-c", count]).stdout)
        server.sf("instance", "migrate", name, "--on", node)
        received = int(there.host.run(["sh", "-c", count]).stdout) - before
        time.sleep(1)
        router.host.run(["pkill", "-INT", "-f", f"ping -n -D -i 0.01 {address}"])
        pinging.wait(30)
        answers = re.findall(r"\[([\d.]+)\] \d+ bytes from", heard.read_text())
        uuid = server.instance(name)["uuid"]
        assert runs_on(cluster, uuid) == [node]
        within(60, lambda: server.instance(name)["left"] == [], "it is gone where it was")
        held = sum(p.stat().st_blocks * 512 for p in (there.state / "instances" / uuid).glob("*.qcow2"))
        within(60, lambda n=number: len(memories()) > n, "its node has said what came")  # type: ignore[misc]
        memory = memories()[0]  # the newest first
        stalls.append(max(float(later) - float(sooner) for sooner, later in itertools.pairwise(answers)))
        more = f"{received} bytes received, {received - memory} more than memory; disks hold {held}"
        print(f"move {number}: silent {stalls[-1]:.3f} s; {more}", flush=True)
    print(f"silent: median {statistics.median(stalls):.3f} s, worst {max(stalls):.3f} s", flush=True)


def test_ten_live_moves_under_pings_and_writes(cluster: Cluster) -> None:
    """Prints what docs/performance.md says."""
    server, script = cluster.server, cluster.key.with_name("count.sh")
    server.sf("network", "create", "lan", "10.42.0.0/24")
    words = ["--memory", "128", "--disk", "1G", "--on", "n2", "--network", "lan", "--user-data", str(script)]
    server.sf("instance", "create", "pinged", "--image", "tiny:1", *words, "--disk", "1G")
    cluster.ready("pinged")
    pinged(cluster, "pinged", 10)
    server.sf("instance", "delete", "pinged", "--force", "--wait")
