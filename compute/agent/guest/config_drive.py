"""The config drive: what a guest learns of itself, as an ISO 9660 volume `config-2` in OpenStack's layout.

https://docs.openstack.org/nova/latest/user/metadata.html, as cloud-init's ConfigDrive source reads it. Built anew at
each power-on; `uuid` (cloud-init's instance-id) stays the same for the instance's life.
"""

import io
import json
from collections.abc import Mapping
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pycdlib

from compute.wire.spec import InstanceSpec, InterfaceSpec
from net import Network

Files = dict[str, bytes]


def meta_data(spec: InstanceSpec) -> dict[str, Any]:
    """meta_data.json."""
    keys = {f"key{number}": text.strip() for number, text in enumerate(spec.ssh_keys)}
    listed = [{"name": name, "type": "ssh", "data": data} for name, data in keys.items()]
    names = dict.fromkeys(("name", "hostname", "local-hostname"), spec.name)
    about = {"uuid": spec.uuid, "launch_index": 0, "project_id": spec.namespace, "meta": dict(spec.metadata)}
    return {**about, **names, "public_keys": keys, "keys": listed}


def _static(address: str, network: Network, *, six: bool, default_route: bool) -> dict[str, Any]:
    """Where the router advertises itself, it alone says whether it is a way out; networkd takes no domain from it."""
    both = IPv4Address(address), network.gateway
    own, gateway = map(network.address6, both) if six else both
    anywhere, mask = ("::", "ffff:ffff:ffff:ffff::") if six else ("0.0.0.0", network.netblock.netmask)  # noqa: S104
    route = {"network": anywhere, "netmask": anywhere, "gateway": str(gateway)}
    routes = [route] if default_route and not network.provide_dhcp else []
    told = {"dns_search": [network.domain]} if network.provide_dns else {}
    kind = "ipv6" if six else "ipv4"
    return {"type": kind, "ip_address": str(own), "netmask": str(mask), "routes": routes} | told


def _leads_out(interface: InterfaceSpec, network: Network) -> bool:
    own = (port for port in network.ports if port.uuid == interface.uuid)
    return network.provide_nat or any(map(network.leads_out, own))


def network_data(spec: InstanceSpec, networks: Mapping[str, Network]) -> dict[str, Any]:
    """network_data.json: MAC and MTU always, `ipv4_dhcp` where the network serves it, else the address itself."""
    links, plans, resolvers = [], [], []
    first = next((i for i in spec.interfaces if _leads_out(i, networks[i.network_uuid])), None)
    for number, interface in enumerate(spec.interfaces):
        network = networks[interface.network_uuid]
        card = {"ethernet_mac_address": interface.mac, "mtu": network.mtu_bytes}
        links.append({"id": f"link{number}", "vif_id": interface.uuid, "type": "phy", **card})
        same = {"link": f"link{number}", "network_id": network.uuid}
        static = partial(_static, interface.address, network, default_route=interface is first)
        # By the LAN's own server where the network is on a bridge.
        served = network.four and network.provide_dhcp
        if network.provide_dns and not served:
            at = network.gateway if network.four else network.address6(network.gateway)
            resolvers.append({"type": "dns", "address": str(at)})
        if network.four:
            how = {"type": "ipv4_dhcp"} if served else static(six=False)
            plans.append({"id": f"network{number}", **same, **how})
        if network.netblock6:
            plans.append({"id": f"network{number}-6", **same, **static(six=True)})
    return {"links": links, "networks": plans, "services": resolvers}


def lines(spec: InstanceSpec, networks: Mapping[str, Network]) -> str:
    """The same in words for a shell (docs/howto/guests.md): an interface's MTU, MAC, address, gateway or -."""
    said = [f"uuid {spec.uuid}", f"name {spec.name}", *(f"key {text.strip()}" for text in spec.ssh_keys)]
    first = next((i for i in spec.interfaces if _leads_out(i, networks[i.network_uuid])), None)
    for interface in spec.interfaces:
        network = networks[interface.network_uuid]
        own, card = IPv4Address(interface.address), f"interface {network.mtu_bytes} {interface.mac}"
        four, six = (network.gateway, network.address6(network.gateway)) if interface is first else "--"
        if network.bridge and network.provide_dhcp:
            said.append(f"{card} - - dhcp")
        elif network.four:
            served = "dhcp" if network.provide_dhcp else "-"
            said.append(f"{card} {own}/{network.netblock.prefixlen} {four} {served}")
        if network.netblock6:  # its router says by itself that it is one
            said.append(f"{card} {network.address6(own)}/64 {'-' if network.provide_dhcp else six} -")
        if network.provide_dns:
            at = network.gateway if network.four else network.address6(network.gateway)
            said.append(f"resolver {at} {network.domain}")
    return "".join(f"{line}\n" for line in (*said, *(["user-data"] if spec.user_data else [])))


def files(spec: InstanceSpec, networks: Mapping[str, Network]) -> Files:
    """Path on the drive to content."""
    told = {"meta_data": meta_data(spec), "network_data": network_data(spec, networks), "vendor_data": {}}
    found = {f"{name}.json": json.dumps(value, indent=1).encode() for name, value in told.items()}
    found |= {"user_data": spec.user_data} if spec.user_data else {}
    return {f"openstack/latest/{name}": content for name, content in found.items()}


def write(path: Path, spec: InstanceSpec, networks: Mapping[str, Network]) -> None:
    """The drive in a file, readable to nobody else, in place of what was there."""
    half = path.with_suffix(".new")
    half.touch(mode=0o600)
    # All are of one size, for a guest that resumes sees that of another.
    half.write_bytes(iso(files(spec, networks)).ljust(1 << 20, b"\0"))
    half.replace(path)


def iso(content: Files) -> bytes:
    """An ISO 9660 image of what is in openstack/latest, with Joliet and Rock Ridge names."""
    volume = pycdlib.PyCdlib()
    volume.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="config-2", sys_ident="LINUX")
    for name, path in (("/OPENSTAC", "/openstack"), ("/OPENSTAC/LATEST", "/openstack/latest")):
        volume.add_directory(name, rr_name=path.rpartition("/")[2], joliet_path=path)
    for number, (path, data) in enumerate(sorted(content.items())):
        name, called = f"/OPENSTAC/LATEST/F{number:03}.;1", path.rpartition("/")[2]
        volume.add_fp(io.BytesIO(data), len(data), name, rr_name=called, joliet_path=f"/{path}")
    out = io.BytesIO()
    volume.write_fp(out)
    volume.close()
    return out.getvalue()
