"""Nothing leaks: whatever fails, whoever is killed, the node ends as it began."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from net.plane import Plane
from tests import drills
from tests.net.machines import Cluster, Node

pytestmark = [pytest.mark.system, pytest.mark.drill]
ROOT = Path(__file__).parents[2]


def _everything(node: Node, state: Path) -> str:
    kernel = (
        "ip -o link | sed 's/^[0-9]*: //'; ip -o -4 addr | sed 's/^[0-9]*: //'; ip route; ip rule; ip -6 route;"
        " ip neigh show proxy; ip neigh show nud permanent; bridge fdb | grep permanent; nft list ruleset;"
        " ls /run/netns; ss -Hlun"
    )
    files = sorted(str(path) for path in state.rglob("*") if path.name not in ("desired", "done"))
    return node.space.sh(kernel) + "\n".join(map(str, [*node.space.processes(), *files]))


@pytest.mark.timeout(1800)
def test_cycles_of_networks_ports_and_floating_ips_with_faults_at_every_step_leave_the_baseline(
    tmp_path: Path,
) -> None:
    cycles = drills.rounds(full=300)
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        state = tmp_path / "agent"
        state.mkdir()
        node.space.sh("sysctl -qw net.ipv4.ip_forward=1; iptables -P FORWARD DROP; mkdir /run/netns")
        node.space.sh(
            "ip link add br0 type bridge; ip link add lan0 master br0 type veth peer name lan1\n"
            "for link in br0 lan0 lan1; do ip link set $link up; done\n"
            "until ip link show br0 | grep -q 'state UP'; do sleep 0.1; done"
        )
        node.space.sh(
            "ip addr add 2001:db8:9::1/64 dev eth0 nodad; sysctl -qw net.ipv6.conf.all.forwarding=1\n"
            "ip -6 route add default via 2001:db8:9::fe\n"
            "while ip -6 addr | grep -q tentative; do sleep 0.1; done"
        )
        before = _everything(node, state)
        starts = 0
        while True:
            starts += 1
            assert starts < 20 + 2 * cycles
            command = [sys.executable, "-m", "tests.net.churn", str(state), cluster.installation]
            command += [str(drills.seed() + starts), str(cycles)]

            def run(command: list[str] = command) -> subprocess.CompletedProcess[str]:
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                return subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
                )

            ended = node.space.call(run)
            if ended.returncode == 0:
                break
            assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
        # The last process that was killed may have been in the middle of a cycle whose network is still desired.
        plane = Plane(cluster.installation, state)
        node.space.call(plane.apply, replace(cluster.desired(), node="n1"))
        (state / "net").rmdir()  # empty
        assert _everything(node, state) == before
        print(f"{cycles} cycles, {starts} starts of the agent")
