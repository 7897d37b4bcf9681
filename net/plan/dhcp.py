"""DHCP and DNS of one network as text: the files that its dnsmasq reads (dnsmasq(8)).

In an entry for a host a name can be syntax: `ignore`, `infinite` and `5m` mean something there. So a guest's name
stands there with the network's domain behind it, which no keyword and no time has, or not at all.

Leases are no state: every guest has a fixed entry, and `dhcp-authoritative` confirms an address to a guest that had it
before a restart.
"""

import re
from collections.abc import Sequence
from ipaddress import IPv4Address

from net.plan import names
from net.plan.facts import Dnsmasq
from net.plan.model import Network

_LEASE = "24h"
_OUT = "out"  # the tag of guests whose packets the router takes elsewhere
_NAME = re.compile(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,126}\.?")


def settings(network: Network, upstream: Sequence[IPv4Address], *, uplink: bool, six: bool) -> Dnsmasq:
    """The three files as text. `uplink`: whether the router leads anywhere else, `six`: by IPv6."""
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
    if uplink and network.provide_dns:  # the host may ask for names, too
        outer = names.uplink(network.vni)
        lines += [f"interface={outer}", f"no-dhcp-interface={outer}"]
    if network.provide_dns:
        lines += [f"local=/{domain}/", "expand-hosts", "domain-needed", "bogus-priv"]
        lines += [f"server={address}" for address in upstream]
        # What is said here of a name of the world's is all there is of it, in both families; names below it stay.
        for name in (name.rstrip(".") for name, _ in network.dns_entries if _NAME.fullmatch(name)):
            if "." in name and not f".{name}".lower().endswith(f".{domain}".lower()):
                lines += [f"local=/{name}/", f"server=/*.{name}/#"]
    else:
        lines.append("port=0")
    hosts = []
    if network.provide_dhcp:
        block = network.netblock
        lines += [
            *([f"dhcp-range={block[0]},static,{block.netmask},{_LEASE}"] if network.four else ()),
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
        some = uplink and not network.provide_nat
        told = [(f"tag:{_OUT},", True), (f"tag:!{_OUT},", False)] if some else [("", uplink)]
        for tag, leads_out in told if network.four else ():
            lines.append(f"dhcp-option={tag}option:router" + (f",{network.gateway}" if leads_out else ""))
            if routed:
                ways = [f"0.0.0.0/0,{network.gateway}", *routed] if leads_out else routed
                lines.append(f"dhcp-option={tag}option:classless-static-route,{','.join(ways)}")
        if some:
            # Not in the file of hosts: dnsmasq 2.90 dies when it reads a tag there for a second time.
            out = filter(network.leads_out, network.ports)
            lines += sorted(f"dhcp-mac=set:{_OUT},{port.mac}" for port in out)
        if network.provide_dns and network.four:
            lines.append(f"dhcp-option=option:dns-server,{network.gateway}")
        if network.netblock6:
            # Addresses by DHCPv6 alone; without an uplink its router is no way out (lifetime 0).
            mode = "static,slaac" if network.slaac else "static"
            lines += ["enable-ra", f"dhcp-range={network.netblock6[0]},{mode},64,{_LEASE}"]
            lines += [
                f"dhcp-option=option6:domain-search,{domain}",
                *([] if six else [f"ra-param={bridge},0,0"]),
            ]
            if network.provide_dns:
                lines.append(f"dhcp-option=option6:dns-server,[{network.address6(network.gateway)}]")
        for port in network.ports:
            called = [f"{port.hostname}.{domain}"] if _NAME.fullmatch(port.hostname) else []
            own, own6 = ([str(port.address)] if network.four else []), network.address6(port.address)
            hosts.append(",".join([port.mac, *own, *([f"[{own6}]"] if own6 else []), *called]))
    if network.netblock6 and network.provide_dns and not six:
        lines.append("filter-AAAA")  # of other servers' answers: nobody waits for what cannot be reached
    four = network.ports if network.four else ()
    entries: list[tuple[str, object]] = [(port.hostname, port.address) for port in four]
    entries += [(p.hostname, own6) for p in network.ports if (own6 := network.address6(p.address))]
    entries += network.dns_entries
    entries = [(name, address) for name, address in entries if _NAME.fullmatch(name)]
    answers = sorted(f"{address} {name}" for name, address in entries) if network.provide_dns else []
    return Dnsmasq(*("".join(f"{line}\n" for line in text) for text in (lines, sorted(hosts), answers)))
