"""The config drive, read back from the ISO as a guest would."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pycdlib
import pytest

from compute.agent.guest import config_drive
from compute.wire.spec import DiskSpec, InstanceSpec, InterfaceSpec
from net import ipam
from net.plan.model import Network, Port

LAN = Network("lan-uuid", 7, "lan", IPv4Network("10.42.0.0/24"), IPv4Address("10.42.0.1"), mtu_bytes=1450)
STATIC = Network(
    "static-uuid",
    8,
    "st",
    IPv4Network("10.43.0.0/22"),
    IPv4Address("10.43.0.1"),
    mtu_bytes=1400,
    provide_dhcp=False,
)
SPEC = InstanceSpec(
    "6b1f9d1e-7a77-4f0e-9a54-0f6a5f0e2f11",
    "web",
    "system",
    1,
    512,
    (DiskSpec("vda"),),
    (
        InterfaceSpec("if-1", "static-uuid", "02:00:00:00:00:01", "10.43.0.9"),
        InterfaceSpec("if-2", "lan-uuid", "02:00:00:00:00:02", "10.42.0.9"),
    ),
    ssh_keys=("ssh-ed25519 AAAA me@here",),
    user_data=b"#cloud-config\n\xff",
    metadata=(("role", "web"),),
)
NETWORKS = {"lan-uuid": LAN, "static-uuid": STATIC}


def read(volume: bytes, path: str) -> bytes:
    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.open_fp(io.BytesIO(volume))
    iso.get_file_from_iso_fp(out, rr_path=f"/{path}")
    iso.close()
    return out.getvalue()


def test_a_guest_finds_name_keys_user_data_and_label(tmp_path: Path) -> None:
    volume = config_drive.iso(config_drive.files(SPEC, NETWORKS))
    assert volume[32808:32816] == b"config-2"
    meta = json.loads(read(volume, "openstack/latest/meta_data.json"))
    assert (meta["uuid"], meta["hostname"], meta["meta"]) == (SPEC.uuid, "web", {"role": "web"})
    assert list(meta["public_keys"].values()) == ["ssh-ed25519 AAAA me@here"]
    assert read(volume, "openstack/latest/user_data") == SPEC.user_data
    if shutil.which("isoinfo"):
        (tmp_path / "i").write_bytes(volume)
        listed = subprocess.run(
            ["isoinfo", "-J", "-f", "-i", tmp_path / "i"], capture_output=True, text=True
        ).stdout
        assert "/openstack/latest/network_data.json" in listed


def test_addresses_are_dhcp_where_it_is_on_and_static_elsewhere_with_mac_and_mtu_always() -> None:
    data = config_drive.network_data(SPEC, NETWORKS)
    assert [(link["ethernet_mac_address"], link["mtu"]) for link in data["links"]] == [
        ("02:00:00:00:00:01", 1400),
        ("02:00:00:00:00:02", 1450),
    ]
    static, dhcp = data["networks"]
    assert dhcp["type"] == "ipv4_dhcp" and "ip_address" not in dhcp
    assert (static["type"], static["ip_address"], static["netmask"]) == ("ipv4", "10.43.0.9", "255.255.252.0")
    assert static["routes"][0]["gateway"] == "10.43.0.1"
    assert data["services"] == [{"type": "dns", "address": "10.43.0.1"}]


def test_only_the_first_interface_brings_a_default_route() -> None:
    both = InstanceSpec(
        SPEC.uuid, "web", "system", 1, 64, (),
        (SPEC.interfaces[0], InterfaceSpec("if-3", "static-uuid", "02:00:00:00:00:03", "10.43.0.10")),
    )  # fmt: skip
    first, second = config_drive.network_data(both, NETWORKS)["networks"]
    assert first["routes"] and not second["routes"]


def test_where_there_is_ipv6_the_address_is_told_and_its_router_only_where_nothing_advertises_it() -> None:
    six = {
        "lan-uuid": replace(LAN, netblock6=IPv6Network("fd42::/64")),
        "static-uuid": replace(STATIC, netblock6=IPv6Network("2001:db8::/64")),
    }
    told = config_drive.network_data(SPEC, six)["networks"]
    assert [(t["link"], t["type"]) for t in told] == [
        ("link0", "ipv4"),
        ("link0", "ipv6"),
        ("link1", "ipv4_dhcp"),
        ("link1", "ipv6"),
    ]
    assert told[1]["ip_address"] == "2001:db8::9" and told[1]["netmask"] == "ffff:ffff:ffff:ffff::"
    assert told[1]["routes"] == [{"network": "::", "netmask": "::", "gateway": "2001:db8::1"}]
    assert told[3]["ip_address"] == "fd42::9" and told[3]["routes"] == []
    assert [t.get("dns_search") for t in told] == [["sf.internal"], ["sf.internal"], None, ["sf.internal"]]


@pytest.mark.parametrize("dhcp", [True, False])
def test_on_a_network_of_ipv6_alone_nothing_of_ipv4_is_told_and_its_server_of_names_is(dhcp: bool) -> None:
    spec = replace(SPEC, interfaces=(InterfaceSpec("if-9", "six", "02:00:00:00:00:09", "0.0.0.9"),))
    network = replace(LAN, uuid="six", netblock=ipam.UNKNOWN, gateway=ipam.UNKNOWN[1], provide_dhcp=dhcp)
    network = replace(network, netblock6=IPv6Network("fd42::/64"))
    data = config_drive.network_data(spec, {"six": network})
    (told,) = data["networks"]
    assert (told["type"], told["ip_address"], bool(told["routes"])) == ("ipv6", "fd42::9", not dhcp)
    assert told["dns_search"] == ["sf.internal"]
    assert data["services"] == [{"type": "dns", "address": "fd42::1"}]
    assert "0.0.0" not in str(data)


def test_a_network_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        config_drive.network_data(SPEC, {})


def test_the_default_route_is_the_first_that_leads_out() -> None:
    """G4: a guest whose first network is without NAT and DHCP had a default route to nowhere."""
    inner = replace(STATIC, uuid="inner", provide_nat=False)
    spec = replace(
        SPEC, interfaces=(InterfaceSpec("if-0", "inner", "02:00:00:00:00:03", "10.43.0.10"), *SPEC.interfaces)
    )
    first, second, _ = config_drive.network_data(spec, {"inner": inner, **NETWORKS})["networks"]
    assert second["routes"] and not first["routes"]
    assert second["dns_search"] == ["sf.internal"]
    port = Port(
        "if-0", "02:00:00:00:00:03", IPv4Address("10.43.0.10"), "web", floating=IPv4Address("192.0.2.9")
    )
    reached = replace(inner, ports=(port,))
    first, second, _ = config_drive.network_data(spec, {"inner": reached, **NETWORKS})["networks"]
    assert first["routes"] and not second["routes"]


def test_the_same_is_said_in_words_for_a_shell() -> None:
    own6 = replace(LAN, netblock6=IPv6Network("fd00:1::/64"), provide_dhcp=False)
    lan = replace(LAN, bridge="br0", provide_dns=False)
    said = config_drive.lines(SPEC, NETWORKS).splitlines()
    assert said == [
        f"uuid {SPEC.uuid}",
        "name web",
        "key ssh-ed25519 AAAA me@here",
        "interface 1400 02:00:00:00:00:01 10.43.0.9/22 10.43.0.1 -",
        "resolver 10.43.0.1 sf.internal",
        "interface 1450 02:00:00:00:00:02 10.42.0.9/24 - dhcp",
        "resolver 10.42.0.1 sf.internal",
        "user-data",
    ]
    both = config_drive.lines(replace(SPEC, interfaces=SPEC.interfaces[1:]), {"lan-uuid": own6}).splitlines()
    assert both[3:5] == [
        "interface 1450 02:00:00:00:00:02 10.42.0.9/24 10.42.0.1 -",
        "interface 1450 02:00:00:00:00:02 fd00:1::9/64 fd00:1::1 -",
    ]
    assert "interface 1450 02:00:00:00:00:02 - - dhcp" in config_drive.lines(
        SPEC, NETWORKS | {"lan-uuid": lan}
    )
