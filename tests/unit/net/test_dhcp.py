"""What dnsmasq is told, and where its upstream servers come from."""

import os
import select
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest

from net.kernel import dnsmasq
from net.plan import dhcp
from net.plan.facts import Dnsmasq
from net.plan.model import Network, Port
from tests.ending import killed
from tests.servers import free_ports

BLOCK = IPv4Network("10.42.0.0/24")
PORT = Port("p", "02:00:00:00:00:01", BLOCK[2], "web", "n1")


def _network(**more: object) -> Network:
    return Network("u", 5, "lan", BLOCK, BLOCK[1], **{"ports": (PORT,), **more})  # type: ignore[arg-type]


def _settings(*, uplink: bool = True, **more: object) -> Dnsmasq:
    return dhcp.settings(
        _network(**more), [IPv4Address("192.0.2.53")] if uplink else [], uplink=uplink, six=False
    )


def test_every_guest_has_its_fixed_address_and_its_name() -> None:
    made = _settings(mtu_bytes=8950, dns_entries=(("db.sf.internal", IPv4Address("10.42.0.9")),))
    assert made.hosts == "02:00:00:00:00:01,10.42.0.2,web.sf.internal\n"
    assert made.names == "10.42.0.2 web\n10.42.0.9 db.sf.internal\n"
    for line in (
        "dhcp-option=option:mtu,8950",
        "server=192.0.2.53",
        "dhcp-option=option:router,10.42.0.1",
    ):
        assert line in made.config.splitlines()


def test_a_network_without_a_way_out_gives_no_default_route_but_its_routed_addresses() -> None:
    settings = _settings(uplink=False, routed=((IPv4Address("203.0.113.7"), BLOCK[2]),))
    lines = settings.config.splitlines()
    assert "dhcp-option=option:router" in lines
    assert "dhcp-option=option:classless-static-route,203.0.113.7/32,10.42.0.1" in lines
    assert not [line for line in lines if line.startswith("server=")]


@pytest.mark.parametrize("name", ["ignore", "infinite", "5m", "1w", "10", "tag", "0x5"])
def test_no_guests_name_is_a_word_of_the_servers_language(name: str) -> None:
    """G3."""
    made = dhcp.settings(_network(ports=(replace(PORT, hostname=name),)), [], uplink=True, six=False)
    assert made.hosts == f"02:00:00:00:00:01,10.42.0.2,{name}.sf.internal\n"
    assert made.names == f"10.42.0.2 {name}\n"


@pytest.mark.parametrize("name", ["a b", "x\n0.0.0.0 www", "a,ignore", "#", "", "../x", "a" * 64])
def test_what_is_no_name_reaches_no_file(name: str) -> None:
    """G3."""
    network = _network(ports=(replace(PORT, hostname=name),), dns_entries=((name, BLOCK[9]),))
    made = dhcp.settings(network, [], uplink=True, six=False)
    assert made.hosts == "02:00:00:00:00:01,10.42.0.2\n"
    assert made.names == ""


def test_only_a_guest_whose_packets_go_out_is_told_of_a_router() -> None:
    """G4: where there is no NAT, a floating or a routed address of another guest leads nobody else out."""
    ports = (
        PORT,
        replace(PORT, uuid="f", mac="02:00:00:00:00:02", address=BLOCK[3], floating=BLOCK[99]),
        replace(PORT, uuid="r", mac="02:00:00:00:00:03", address=BLOCK[4]),
    )
    network = _network(provide_nat=False, ports=ports, routed=((IPv4Address("203.0.113.7"), BLOCK[4]),))
    lines = dhcp.settings(network, [], uplink=True, six=False).config.splitlines()
    assert [line for line in lines if "dhcp-mac" in line] == [
        "dhcp-mac=set:out,02:00:00:00:00:02", "dhcp-mac=set:out,02:00:00:00:00:03",
    ]  # fmt: skip
    for line in ("dhcp-option=tag:out,option:router,10.42.0.1", "dhcp-option=tag:!out,option:router"):
        assert line in lines


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


PROGRAM = shutil.which("dnsmasq", path=f"{os.environ['PATH']}:/usr/sbin")


def _query(name: str, kind: int) -> bytes:
    words = b"".join(bytes([len(word)]) + word.encode() for word in name.split("."))
    return b"ab" + bytes([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + words + bytes([0, 0, kind, 0, 1])


@pytest.mark.skipif(PROGRAM is None, reason="needs dnsmasq")
def test_what_is_said_of_a_name_of_the_worlds_is_all_that_guests_hear_of_it(tmp_path: Path) -> None:
    """One that gets the IPv6 address of the world's goes there, past the IPv4 one that it was to have."""
    entries = (
        ("db.example.net", BLOCK[9]), ("example.net", BLOCK[8]), ("Six.example.org.", IPv6Address("fd00::6")),
        ("in.sf.internal", BLOCK[7]), ("printer", BLOCK[6]),
    )  # fmt: skip
    made, names = _settings(dns_entries=entries), tmp_path / "names"
    names.write_text(made.names)
    words = ("local=", "server=/", "domain", "expand-hosts")
    told = [f"--{line}" for line in made.config.splitlines() if line.startswith(words)]
    world, guest = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with world, guest:
        world.bind(("127.0.0.1", 0))
        guest.connect(("127.0.0.1", port := free_ports()))
        argv = [str(PROGRAM), "-d", "--conf-file=/dev/null", f"--port={port}", f"--addn-hosts={names}", *told]
        argv += ["--listen-address=127.0.0.1", "--bind-interfaces", "--no-hosts", "--no-resolv"]
        argv.append(f"--server=127.0.0.1#{world.getsockname()[1]}")

        def hears(name: str, kind: int) -> str | int:
            guest.send(_query(name, kind))
            ready, _, _ = select.select([world, guest], [], [], 20)
            answer = ready[0].recv(999)
            return "the world's" if ready[0] is world else answer[7]

        with killed(subprocess.Popen(argv, stderr=subprocess.DEVNULL)):
            until = time.monotonic() + 20
            while time.monotonic() < until:
                with suppress(ConnectionRefusedError):  # it has not begun
                    guest.send(_query("printer", 1))
                    guest.recv(999)
                    break
            for name, of_kind in {
                "db.example.net": (1, 0), "DB.example.net": (1, 0), "example.net": (1, 0),
                "six.example.org": (0, 1), "in.sf.internal": (1, 0), "printer": (1, 0),
                "www.example.net": ("the world's",) * 2, "x.db.example.net": ("the world's",) * 2,
                "dbexample.net": ("the world's",) * 2, "x.in.sf.internal": (0, 0), "x.printer": ("the world's",) * 2,
            }.items():  # fmt: skip
                assert (hears(name, 1), hears(name, 28)) == of_kind, name
