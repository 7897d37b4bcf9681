"""dnsmasq over the life of a network: adopted, reloaded, started anew; ports that come and go while guests run."""

import os
import resource
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.errors import Conflict
from net.kernel import dnsmasq
from net.plan import names
from net.plan.model import Network
from net.plane import Plane
from tests.net.machines import OUTSIDE, Cluster, Node, make_network, make_port

pytestmark = pytest.mark.system


def _server(node: Node, network: Network) -> int:
    prefix = names.namespace(node.plane.installation, network.vni)
    (running,) = node.space.call(dnsmasq.running, prefix)
    return running.pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.01)


def test_the_server_outlives_its_maker_and_is_adopted_by_the_next(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        network = make_network(make_port(2, "n1"))
        desired = cluster.apply(network)
        pid = _server(node, network)
        assert os.getpgid(pid) != os.getpgid(0)
        assert os.getsid(pid) != os.getsid(0)
        node.plane = Plane(cluster.installation, tmp_path / "n1")
        assert node.apply(desired) == []
        assert _server(node, network) == pid


def test_a_port_that_comes_is_served_by_the_same_process_and_one_that_goes_frees_its_address(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        one, two = make_port(2, "n1"), make_port(3, "n1")
        network = make_network(one)
        cluster.apply(network)
        pid = _server(node, network)
        with cluster.guest(network, one) as guest:
            guest.dhcp()
            both = replace(network, ports=(one, two))
            cluster.apply(both)
            assert _server(node, network) == pid
            with cluster.guest(both, two) as late:
                assert IPv4Address(late.dhcp()[0]) == two.address
                assert late.pings(one.address)
                node.space.call(node.plane.remove_tap, two)
                assert not late.pings(one.address, tries=2)
                node.space.call(node.plane.remove_tap, two)
            # The address that is free now goes to another MAC, which must get it in spite of the first lease.
            heir = replace(two, uuid="heir", mac="02:00:00:00:0a:03")
            cluster.apply(network)
            desired = cluster.apply(replace(network, ports=(one, heir)))
            with cluster.guest(replace(network, ports=(one, heir)), heir) as successor:
                assert IPv4Address(successor.dhcp()[0]) == two.address
                assert successor.pings(one.address)
                assert guest.pings(OUTSIDE)
                assert node.apply(desired) == []


def test_a_server_killed_between_its_files_and_its_signal_is_started_anew(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        network = make_network(make_port(2, "n1"))
        desired = cluster.apply(network)
        directory = tmp_path / "n1" / "net" / node.plane.namespace(network)
        for half_done in (
            lambda: (directory / "loaded").unlink(),
            lambda: (directory / "hosts").write_text("02:00:00:00:00:66,10.42.0.66\n"),
            lambda: _kill(_server(node, network)),
        ):
            half_done()
            assert node.apply(desired) != []
            assert node.apply(desired) == []
            assert "02:00:00:00:00:02,10.42.0.2" in (directory / "hosts").read_text()
            _server(node, network)


def test_a_tap_is_never_taken_from_a_running_guest_nor_a_strangers_device_from_anybody(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        port = make_port(2, "n1")
        network = make_network(port)
        desired = cluster.apply(network)
        with cluster.guest(network, port) as guest, pytest.raises(Conflict, match="held"):
            node.space.call(node.plane.create_tap, port)
        # The guest is off now; its tap lies in the network and is made anew for the next start.
        assert node.space.call(node.plane.create_tap, port) == guest.name
        assert guest.name in node.space.sh("ip -o link show type tun")
        assert node.apply(desired) == []
        node.space.call(node.plane.remove_tap, port)
        node.space.sh(f"ip tuntap add {guest.name} mode tap && ip link set {guest.name} alias mine")
        with pytest.raises(Conflict, match="mine"):
            node.space.call(node.plane.create_tap, port)
        with pytest.raises(Conflict, match="mine"):
            node.space.call(node.plane.remove_tap, port)


def test_a_tap_whose_agent_died_before_it_was_moved_is_brought_home_by_the_next_reconcile(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        one, two = make_port(2, "n1"), make_port(3, "n1")
        network = make_network(one, two)
        desired = cluster.apply(network)
        with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
            guest.static()
            other.static()
            # As it was after the domain's start: held by the guest, in the host's namespace.
            node.inside(network, f"ip link set {guest.name} netns {node.space.tid}")
            assert guest.reaches_not(two.address)
            assert node.apply(desired) != []
            assert node.apply(desired) == []
            assert guest.pings(two.address)


def test_the_routers_own_floating_address_is_what_the_world_sees(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        port = make_port(2, "n1")
        network = make_network(port, router_floating=IPv4Address("10.9.9.50"))
        cluster.apply(network)
        with cluster.guest(network, port) as guest:
            guest.static()
            with cluster.world.sniffing("icmp and dst host 10.9.9.254") as sources:
                assert guest.pings("10.9.9.254")
            assert sources == {"10.9.9.50"}
            assert cluster.world.works("ping -n -c 3 -W 2 10.9.9.50")
            assert not cluster.world.works(
                f"ip route add 10.42.0.0/24 via 10.9.9.50 && ping -n -c 2 -W 1 {port.address}"
            )


def test_the_server_runs_as_its_own_user_where_that_one_can_read_its_files(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all, Cluster(Path(open_to_all)) as cluster:
        Path(open_to_all).chmod(0o755)
        node = cluster.nodes[0]
        one, two = make_port(2, "n1"), make_port(3, "n1")
        cluster.apply(make_network(one, vni=5))
        network = make_network(one, two, vni=5)
        cluster.apply(network)
        user = next(
            line for line in Path("/etc/passwd").read_text().splitlines() if line.startswith("dnsmasq:")
        )
        assert Path(f"/proc/{_server(node, network)}").stat().st_uid == int(user.split(":")[2])
        with cluster.guest(network, two) as guest:  # it was added by a reload, after privileges were dropped
            assert IPv4Address(guest.dhcp()[0]) == two.address
        node.remove_all()


def test_a_process_with_a_thousand_open_files_still_sets_its_filters(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Cluster(tmp_path) as cluster, ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.enter_context(Path("/dev/null").open("rb"))
        port = make_port(2, "n1")
        network = make_network(port)
        desired = cluster.apply(network)
        assert cluster.nodes[0].apply(desired) == []
        assert "sf-" in cluster.nodes[0].inside(network, "nft list tables")


@pytest.mark.parametrize("what", ["tap", "namespace"])
def test_what_an_outsider_removes_is_put_back_under_the_running_guest(tmp_path: Path, what: str) -> None:
    """D4: without its tap or its network's namespace a guest was off the network until it was rebooted."""
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        one, two = make_port(2, "n1"), make_port(3, "n1")
        network = make_network(one, two)
        desired = cluster.apply(network)
        with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
            guest.static()
            other.static()
            assert guest.pings(two.address) and guest.pings(OUTSIDE)
            assert node.apply(desired) == []
            if what == "tap":
                node.inside(network, f"ip link del {guest.name}")
            else:
                node.space.sh(f"ip netns del {node.plane.namespace(network)}")
            assert guest.reaches_not(two.address) or what == "namespace"
            assert node.apply(desired) != []
            assert node.apply(desired) == []
            assert guest.pings(two.address) and guest.pings(OUTSIDE)
            assert other.pings(one.address)


def test_a_real_qemu_that_lost_its_tap_has_it_again_as_it_was(tmp_path: Path) -> None:
    """D4."""
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        one = make_port(2, "n1")
        network = make_network(one)
        desired = cluster.apply(network)
        tap = node.space.call(node.plane.create_tap, one)
        arguments = f"-netdev tap,id=n,ifname={tap},script=no,downscript=no -device virtio-net-pci,netdev=n"
        qemu = node.space.popen_quietly(f"qemu-system-x86_64 -M q35 -nodefaults -display none -S {arguments}")
        try:
            while _tap_of(qemu.pid) != tap:
                assert qemu.poll() is None, qemu.communicate()
            node.space.call(node.plane.adopt_tap, network, one)
            assert node.apply(desired) == []
            before = _tap_of(qemu.pid)
            node.space.sh(f"ip netns del {node.plane.namespace(network)}")
            assert node.apply(desired) != []
            assert node.apply(desired) == []
            assert _tap_of(qemu.pid) == before == tap
            assert "NO-CARRIER" not in node.inside(network, f"ip -o link show {tap}")
            assert qemu.poll() is None
        finally:
            qemu.kill()
            qemu.communicate()
        # Who ended gets nothing back.
        node.space.call(node.plane.remove_tap, one)
        assert node.apply(desired) == []


def _tap_of(pid: int) -> str:
    """The tap that a process holds, "" if none."""
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # it closes others while we look
            if found := [line for line in path.read_text().splitlines() if line.startswith("iff:")]:
                return found[0][4:].strip()
    return ""
