"""What dnsmasq is told, and where its upstream servers come from."""

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from net.kernel import dnsmasq
from net.plan import dhcp
from net.plan.facts import Dnsmasq
from net.plan.model import Network, Port

BLOCK = IPv4Network("10.42.0.0/24")
PORT = Port("p", "02:00:00:00:00:01", BLOCK[2], "web", "n1")


def _settings(*, uplink: bool = True, **more: object) -> Dnsmasq:
    network = Network("u", 5, "lan", BLOCK, BLOCK[1], ports=(PORT,), **more)  # type: ignore[arg-type]
    return dhcp.settings(network, [IPv4Address("192.0.2.53")] if uplink else [], uplink=uplink)


def test_every_guest_has_its_fixed_address_and_its_name() -> None:
    made = _settings(mtu_bytes=8950, dns_entries=(("db.sf.local", IPv4Address("10.42.0.9")),))
    assert made.hosts == "02:00:00:00:00:01,10.42.0.2,web\n"
    assert made.names == "10.42.0.2 web\n10.42.0.9 db.sf.local\n"
    for line in ("dhcp-option=option:mtu,8950", "server=192.0.2.53", "dhcp-option=option:router,10.42.0.1"):
        assert line in made.config.splitlines()


def test_a_network_without_a_way_out_gives_no_default_route_but_its_routed_addresses() -> None:
    lines = _settings(uplink=False, routed=((IPv4Address("203.0.113.7"), BLOCK[2]),)).config.splitlines()
    assert "dhcp-option=option:router" in lines
    assert "dhcp-option=option:classless-static-route,203.0.113.7/32,10.42.0.1" in lines
    assert not [line for line in lines if line.startswith("server=")]


def test_without_dhcp_no_address_is_offered_and_without_dns_no_name_is_answered() -> None:
    assert "dhcp-range" not in _settings(provide_dhcp=False).config
    quiet = _settings(provide_dns=False)
    assert "port=0" in quiet.config.splitlines()
    assert quiet.names == ""


def test_upstream_servers_come_from_the_first_file_that_names_one_which_is_not_loopback(
    tmp_path: Path,
) -> None:
    resolved, plain = tmp_path / "resolved", tmp_path / "resolv.conf"
    plain.write_text(
        "# by hand\nsearch lan\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1\n"
    )
    assert dnsmasq.upstream((resolved, plain)) == (IPv4Address("192.0.2.1"),)
    resolved.write_text("nameserver 192.0.2.7\nnameserver 192.0.2.8\n")
    assert dnsmasq.upstream((resolved, plain)) == (IPv4Address("192.0.2.7"), IPv4Address("192.0.2.8"))
    resolved.write_text("nameserver 127.0.0.1\n")
    plain.write_text("")
    assert dnsmasq.upstream((resolved, plain)) == ()
