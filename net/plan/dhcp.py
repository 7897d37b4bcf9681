"""DHCP and DNS of one network as text: the files that its dnsmasq reads (dnsmasq(8)).

Leases are no state: every guest has a fixed entry, and `dhcp-authoritative` confirms an address to a guest that had it
before a restart.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address

from net.plan import names
from net.plan.facts import Dnsmasq
from net.plan.model import Network

_LEASE = "24h"


def settings(network: Network, upstream: Sequence[IPv4Address], *, uplink: bool) -> Dnsmasq:
    """The three files as text. `uplink`: whether the router leads anywhere else."""
    bridge, domain = names.bridge(network.vni), network.domain
    lines = [
        "no-hosts",
        "no-resolv",
        "no-poll",
        f"interface={bridge}",
        "except-interface=lo",
        "bind-interfaces",
        f"domain={domain}",
    ]
    if network.provide_dns:
        lines += [f"local=/{domain}/", "expand-hosts", "domain-needed", "bogus-priv"]
        lines += [f"server={address}" for address in upstream]
    else:
        lines.append("port=0")
    hosts = []
    if network.provide_dhcp:
        lines += [
            f"dhcp-range={network.netblock.network_address},static,{network.netblock.netmask},{_LEASE}",
            "dhcp-authoritative",
            "leasefile-ro",
            "dhcp-ignore=tag:!known",
            # Unicast answers would be made possible by an ARP entry of dnsmasq's own, in place of ours.
            "dhcp-broadcast",
            "no-ping",
            f"dhcp-option=option:mtu,{network.mtu_bytes}",
            f"dhcp-option=option:domain-search,{domain}",
        ]
        routed = [f"{address}/32,{network.gateway}" for address, _ in sorted(network.routed)]
        if uplink:
            lines.append(f"dhcp-option=option:router,{network.gateway}")
        else:
            lines.append("dhcp-option=option:router")
        if routed:
            ways = [f"0.0.0.0/0,{network.gateway}", *routed] if uplink else routed
            lines.append(f"dhcp-option=option:classless-static-route,{','.join(ways)}")
        if network.provide_dns:
            lines.append(f"dhcp-option=option:dns-server,{network.gateway}")
        hosts = sorted(f"{port.mac},{port.address},{port.hostname}" for port in network.ports)
    entries = [(port.hostname, port.address) for port in network.ports if port.hostname]
    entries += network.dns_entries
    answers = sorted(f"{address} {name}" for name, address in entries) if network.provide_dns else []
    return Dnsmasq(*("".join(f"{line}\n" for line in text) for text in (lines, hosts, answers)))
