"""Which networks and ports a node keeps for guests that nobody knows there."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from compute.agent.guest.record import Tap
from compute.agent.quarantine import keep
from net import Network, NodeNetworks, Port

LAN = Network(
    "aaaaaaaa-0000-4000-8000-000000000001", 77, "lan", IPv4Network("10.0.0.0/24"), IPv4Address("10.0.0.1")
)
PORT = Port(
    "bbbbbbbb-0000-4000-8000-000000000001", "02:00:00:00:00:01", IPv4Address("10.0.0.7"), "web", "n2", "tap0"
)


class Left:
    """A guest that is here, and that the desired state does not know."""

    def __init__(self, port: Port) -> None:
        self.taps, self.trouble = (Tap(port, LAN.uuid, network=LAN),), ""

    def notice(self, trouble: str) -> None:
        self.trouble = trouble


def kept(left: Left, *ports: Port) -> tuple[Port, ...]:
    desired: Any = NodeNetworks("0badcafe", "n2", (replace(LAN, ports=ports),), (), IPv4Address("192.0.2.2"))
    return keep(desired, [left]).networks[0].ports  # type: ignore[list-item]


def test_what_nobody_knows_keeps_its_port() -> None:
    left = Left(PORT)
    assert kept(left) == (PORT,) and not left.trouble


def test_the_old_copy_of_a_guest_that_another_node_has_by_now_does_not_draw_its_packets_here() -> None:
    """Its interface went along: the port of the same uuid is where the guest is."""
    left, there = Left(PORT), replace(PORT, node="n3", tap="")
    assert kept(left, there) == (there,)
    assert "its link is down" in left.trouble


def test_an_address_that_another_guest_has_by_now_is_that_ones() -> None:
    left, there = Left(PORT), replace(PORT, uuid="cccccccc-0000-4000-8000-000000000001")
    assert kept(left, there) == (there,) and "another's" in left.trouble
