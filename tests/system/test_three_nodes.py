"""Three machines on one: joined with the real commands, with real libvirtd, dnsmasq, nftables, and guests in qemu.

All of them have a firewall that forwards nothing, and bridge-nf-call-iptables on. n1 is the server; the world is a
fourth machine, which is also the switch between them.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.system.cluster import WORLD, Cluster
from tests.system.machine import within

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

FULL_MTU_PING = "ping -c 3 -W 5 -s 1422"  # 1450 with the headers of IPv4 and ICMP


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(stack, tmp_path_factory.mktemp("cluster"), tiny_image)
        made.server.sf("network", "create", "lan", "10.42.0.0/24")
        made.server.sf("network", "create", "other", "10.42.0.0/24", "--ipv6", "auto")
        made.create("a", "n2", "lan,address=10.42.0.5,float")
        made.create("b", "n3", "lan,address=10.42.0.7")
        made.create("c", "n2", "other,address=10.42.0.7")
        made.ready("a", "b", "c")
        yield made


def says(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout}{done.stderr}"


def test_guests_reach_each_other_across_nodes_by_name_and_with_full_packets(cluster: Cluster) -> None:
    done = cluster.inside("a", f"{FULL_MTU_PING} b && cat /sys/class/net/eth0/mtu")
    assert done.returncode == 0, says(done)
    assert "1450" in done.stdout.splitlines()[-1]


def test_a_guest_has_the_ipv6_address_that_its_network_gave_it(cluster: Cluster) -> None:
    (link,) = cluster.server.instance("c")["interfaces"]
    assert link["ipv6"].endswith("::7")
    ping = ("network", "ping", "other", link["ipv6"])
    within(30, lambda: "bytes from" in cluster.server.sf(*ping, check=False).stdout, "it answers")
    gateway = link["ipv6"].removesuffix("7") + "1"
    said = cluster.inside("c", f"ip -6 address show dev eth0; ping -c 2 -W 5 {gateway}", "other").stdout
    assert f"{link['ipv6']}/64 scope global" in said and "tentative" not in said, said
    assert f"bytes from {gateway}" in said, said


def test_a_guest_reaches_the_world_and_the_world_its_floating_address_and_so_does_its_neighbour(
    cluster: Cluster,
) -> None:
    for name in ("a", "b"):
        done = cluster.inside(name, f"ping -c 3 -W 5 {WORLD}")
        assert done.returncode == 0, says(done)
    floating = cluster.floating("a")
    assert IPv4Address(floating) in IPv4Network("10.77.0.192/28")
    within(30, lambda: cluster.from_world(floating), f"{floating} answers the world")
    for name in ("a", "b"):  # hair-pin: by the way of the router, back to the network it came from
        done = cluster.inside(name, f"ping -c 3 -W 5 {floating}")
        assert done.returncode == 0, f"{name}: {says(done)}"


def test_a_published_port_leads_the_world_to_a_guest_and_moves_with_the_router(cluster: Cluster) -> None:
    cluster.server.sf("instance", "publish", "b", "2222:22")
    done = cluster.server.sf("instance", "publish", "a", "13002:22", check=False)
    assert (done.returncode, "listens on port 13002/tcp" in done.stderr) == (5, True)

    def banner() -> str:
        address = f"10.77.0.{cluster.router()[1]}"
        words = ["timeout", "5", "bash", "-c", f"exec 3<>/dev/tcp/{address}/2222 && head -1 <&3"]
        return cluster.world.run(words, check=False).stdout

    within(30, lambda: banner().startswith("SSH-2.0"), "the world reaches the guest's port")
    old = cluster.router()
    cluster.server.sf("node", "drain", old)
    within(30, lambda: cluster.router() != old and banner().startswith("SSH-2.0"), "the port moved along")
    cluster.server.sf("node", "drain", old, "--undo")
    cluster.server.sf("rules", "create", "shut")
    cluster.server.sf("rules", "attach", "shut", "b")
    within(30, lambda: not banner(), "nobody may speak to it")
    assert cluster.inside("a", "ping -c 1 -W 2 b").returncode != 0
    cluster.server.sf("rules", "set", "shut", "--allow", "tcp:22", "--allow", "icmp@lan")
    within(30, lambda: banner().startswith("SSH-2.0"), "its rules let ssh in")
    assert cluster.inside("a", "ping -c 1 -W 5 b").returncode == 0
    cluster.server.sf("rules", "detach", "shut", "b")
    cluster.server.sf("rules", "delete", "shut")
    cluster.server.sf("instance", "publish", "b", "2222:22", "--undo")
    within(30, lambda: not banner(), "it is closed")


def test_a_guest_on_the_nodes_own_lan_has_its_address_from_there_and_answers_there(cluster: Cluster) -> None:
    node = cluster.nodes["n3"].host
    cluster.net(cluster.world, "ip link add lan0 type bridge; ip address add 192.168.77.1/24 dev lan0")
    cluster.net(node, "ip link add br-home type bridge; ip link set br-home up")
    cluster.net(
        cluster.world,
        f"ip link add cable type veth peer name eth1 netns /proc/{node.pid}/ns/net; ip link set cable master lan0 up\n"
        "ip link set lan0 up",
    )
    cluster.net(node, "ip link set eth1 master br-home up")
    served = "--port=0 --interface=lan0 --bind-interfaces --leasefile-ro --no-ping --conf-file=/dev/null"
    cluster.world.run(
        ["dnsmasq", *served.split(), "--dhcp-range=192.168.77.100,192.168.77.120", "--pid-file=/run/lan.pid"]
    )
    made = cluster.server.sf("network", "create", "home", "--bridge", "br-home")
    assert "br-home" in made.stderr, "what the first nodes say that have looked"

    def said(*words: str) -> bool:
        asked = cluster.server.sf("network", "doctor", "home", "--format", "json", check=False).stdout
        return any(all(word in str(row) for word in words) for row in json.loads(asked or "[]"))

    within(60, lambda: said("there is no bridge br-home here"), "a node says that it has no bridge")
    rule = 'nft insert rule ip filter FORWARD iifname "br-home" oifname "br-home" accept'
    within(60, lambda: said("n3", rule), "n3 says what its firewall does")
    cluster.net(node, 'nft insert rule ip filter FORWARD iifname "br-home" oifname "br-home" accept')
    cluster.create("tv", "n3", "home")
    within(150, lambda: cluster.server.ready_line("tv"), "tv is ready")
    address = cluster.server.ready_line("tv").split()[3]
    assert IPv4Address(address) in IPv4Network("192.168.77.96/27")
    assert cluster.from_world(address)
    cluster.server.sf("instance", "delete", "tv", "--wait")
    assert "sft" not in node.run(["ip", "-o", "link", "show", "master", "br-home"]).stdout
    cluster.server.sf("network", "delete", "home")


def test_two_networks_with_the_same_addresses_do_not_meet(cluster: Cluster) -> None:
    names = {net: cluster.inside(guest, "hostname", net) for guest, net in (("b", "lan"), ("c", "other"))}
    assert [names["lan"].stdout.strip(), names["other"].stdout.strip()] == ["b", "c"]
    assert cluster.inside("c", "ping -c 2 -W 2 10.42.0.5", "other").returncode != 0
    assert cluster.inside("c", "ping -c 2 -W 2 10.42.0.1", "other").returncode == 0


def test_consoles_and_pings_of_other_nodes_come_through_the_server(cluster: Cluster) -> None:
    assert "SF-GUEST-READY" in cluster.server.sf("instance", "console", "b").stdout
    assert " 0% packet loss" in cluster.server.sf("network", "ping", "lan", "10.42.0.7").stdout


def test_a_node_that_reaches_no_store_boots_from_its_neighbours_whose_services_are_not_root(
    cluster: Cluster,
) -> None:
    """Its image service knows what the image consists of, and none of its bytes."""

    def peers(node: str) -> str:
        return cluster.nodes[node].host.run(["ss", "-ltnH", "sport = :13002"]).stdout

    def services(node: str) -> list[list[str]]:
        shown = cluster.nodes[node].host.run(["ps", "-eo", "uid=,pid=,args="]).stdout.splitlines()
        return [line.split(None, 2)[:2] for line in shown if "imagestore.cache.imaged" in line]

    for name in cluster.nodes:
        within(30, lambda n=name: f"10.77.0.{n[1]}:13002" in peers(n), f"{name} serves")  # type: ignore[misc]
    ((user, pid),) = services("n1")
    assert int(user) != 0
    packs = str(cluster.server.state / "store" / "packs")
    cluster.server.host.run(["mount", "-t", "tmpfs", "none", packs])
    try:
        cluster.server.host.run(["kill", "-9", pid])
        within(30, lambda: [p for _, p in services("n1") if p != pid], "n1 has another service")
        within(30, lambda: "10.77.0.1:13002" in peers("n1"), "it was told its peers")

        def empty() -> bool:  # while the others ask, what it had fetched for them stays open
            cluster.server.sf("cache", "prune", check=False)
            return cluster.server.listed("cache", "ls") == []

        within(120, empty, "n1 has forgotten what it had fetched for the others")
        words = ["--image", "tiny:1", "--memory", "128", "--on", "n1"]
        cluster.server.sf("instance", "create", "e", *words)
        within(150, lambda: cluster.server.ready_line("e"), "e is ready")
        events = lambda: [e["message"] for e in cluster.server.listed("instance", "events", "e")]  # noqa: E731
        within(60, lambda: any("read directly now" in line for line in events()), "e's image is complete")
        received = cluster.server.instance("e")["image_bytes"]["vda"]["received"]
        assert received["peer"] > 1 << 20 and "store" not in received
    finally:
        cluster.server.host.run(["umount", packs])
    cluster.server.sf("instance", "delete", "e")


def test_a_restart_of_the_server_is_noticed_by_no_guest(cluster: Cluster) -> None:
    running = {name: cluster.nodes[name].host.run(["pgrep", "qemu"]).stdout for name in ("n2", "n3")}
    routes_elsewhere, floating = cluster.router() != "n1", cluster.floating("a")
    cluster.server.signal()
    assert not routes_elsewhere or cluster.from_world(floating)
    time.sleep(10)  # longer than the agents' leases: those that route stop, guests run on
    cluster.server.start()
    within(60, lambda: cluster.server.instance("a")["power_state"] == "on", "a is on")
    assert {n: cluster.nodes[n].host.run(["pgrep", "qemu"]).stdout for n in running} == running
    # A router on another node has stopped by itself, and begins again; we enter guests by its namespace.
    within(60, lambda: cluster.gateways() == [cluster.router()], "one node routes")
    assert cluster.inside("a", "ping -c 2 -W 5 b").returncode == 0


def move_router_off_the_server(cluster: Cluster) -> str:
    if cluster.router() == "n1":
        cluster.server.sf("node", "drain", "n1")
        within(30, lambda: cluster.router() != "n1" and cluster.gateways() == [cluster.router()], "drained")
    return cluster.router()


def never_two_until(cluster: Cluster, true: Callable[[], bool], what: str) -> float:
    """Wait up to 60 s, looking all the time that no two nodes route. How long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < 60, what
        assert len(cluster.gateways()) <= 1
    return time.monotonic() - began


def test_a_partitioned_router_stops_by_itself_and_another_takes_over(cluster: Cluster) -> None:
    old, floating = move_router_off_the_server(cluster), cluster.floating("a")
    cluster.net(cluster.world, f"ip link set {old} down")
    never_two_until(cluster, lambda: cluster.gateways() not in ([], [old]), "another node routes")
    assert cluster.router() != old
    cluster.net(cluster.world, f"ip link set {old} up")
    never_two_until(cluster, lambda: cluster.from_world(floating), "the floating address answers again")
    within(60, lambda: cluster.inside("a", "ping -c 1 -W 3 b").returncode == 0, "the mesh is whole again")
    assert cluster.gateways() == [cluster.router()]


def test_a_node_that_lost_power_is_replaced_as_router_and_comes_back_as_it_should_be(
    cluster: Cluster,
) -> None:
    within(60, lambda: "n2" in cluster.alive(), "the node is back from what was before")
    cluster.server.sf("network", "create", "brief", "10.43.0.0/24")
    cluster.create("d", "n2", "brief")
    cluster.ready("d")
    brief = cluster.server.listed("network", "show", "brief")["vxlan_id"]
    while cluster.router() != "n2":  # put the router where the power will fail
        other = cluster.router()
        cluster.server.sf("node", "drain", other)
        within(30, lambda o=other: cluster.router() != o, f"{other} is drained")  # type: ignore[misc]
    floating = cluster.floating("a")
    node = cluster.nodes["n2"]
    node.host.stop()
    cluster.server.sf("node", "drain", "n1", "--undo")
    cluster.server.sf("instance", "delete", "d")
    never_two_until(cluster, lambda: cluster.gateways() not in ([], ["n2"]), "another node routes")
    within(30, lambda: cluster.inside("b", f"ping -c 2 -W 5 {WORLD}").returncode == 0, "b reaches the world")
    node.host.start()
    cluster.plug("n2")
    node.start("agent")
    within(90, lambda: cluster.server.instance("a")["power_state"] == "on", "a runs again")
    cluster.ready("a", "c")
    never_two_until(cluster, lambda: cluster.from_world(floating), "the floating address answers")
    assert cluster.gateways() == [cluster.router()]
    assert cluster.inside("a", "ping -c 2 -W 5 b").returncode == 0
    within(60, lambda: "d" not in [i["name"] for i in cluster.server.listed("instance", "ls")], "d is gone")
    within(60, lambda: f"-{brief:06x}" not in node.host.run(["ip", "netns"]).stdout, "its network as well")
    assert len(node.host.virsh("list", "--all", "--name").stdout.split()) == 2
