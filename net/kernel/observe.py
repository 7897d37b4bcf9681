"""What the kernel of this node holds that is ours: read, never changed."""

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from net.errors import Failed
from net.kernel import dnsmasq, netns
from net.kernel.netns import Netns
from net.plan import names, nft, ruleset
from net.plan.facts import HOST, Admission, Dnsmasq, Entry, Facts, Kind, Link, Observed
from net.plan.target import BRIDGED, FORWARD, FORWARD6, SYSCTLS, sysctls6

_OURS_ON_HOST = (Kind.ADDRESS, Kind.ROUTE, Kind.SYSCTL)


def observe(
    installation: str, directory: Path, underlay: IPv4Address, processes: Iterable[dnsmasq.Running]
) -> Observed:
    """Everything of `installation` on this node. `directory` holds the files of its dnsmasq processes."""
    found: dict[str, Facts] = {}
    served = {(running.namespace, running.netns) for running in processes}
    for name in netns.list_namespaces(names.namespace_prefix(installation)):
        inode = (netns.DIRECTORY / name).stat().st_ino
        settings = dnsmasq.Daemon(directory, name).settings() if (name, inode) in served else None
        if not netns.is_namespace(name):
            found[name] = Facts(broken=True)
            continue
        with Netns(name) as space:
            found[name] = _facts(installation, space, settings)
    with Netns(HOST) as host:
        return _host(installation, host, found, underlay)


def _ours(installation: str, links: Iterable[Link], more: Iterable[str] = ()) -> dict[str, Link]:
    mark, known = f"{names.table(installation)} ", set(more)
    return {link.name: link for link in links if link.alias.startswith(mark) or link.name in known}


def _facts(installation: str, space: Netns, settings: Dnsmasq | None) -> Facts:
    vni = int(space.name.rsplit("-", 1)[1], 16)
    deterministic = (names.bridge(vni), names.vxlan(vni), names.uplink(vni))
    links = _ours(installation, space.links().values(), deterministic)
    own = names.table(installation)
    return Facts(
        links=links,
        entries=frozenset(e for e in space.entries(_sysctls(links)) if e.dev in links or not e.dev),
        tables={
            family: table for (family, name), table in space.tables("list ruleset").items() if name == own
        },
        dnsmasq=settings,
    )


def _sysctls(links: dict[str, Link], also: Iterable[str] = SYSCTLS) -> list[str]:
    ends = (link.name for link in links.values() if link.kind in ("bridge", "veth"))
    return [*also, *(entry.key for dev in ends for entry in sysctls6(dev, on=False))]


def _host(installation: str, host: Netns, found: dict[str, Facts], underlay: IPv4Address) -> Observed:
    every = host.links()
    prefix = names.host_uplink_prefix(installation)
    links = _ours(installation, every.values(), (name for name in every if name.startswith(prefix)))
    entries = list(host.entries(_sysctls(links, (FORWARD, BRIDGED, FORWARD6))))
    table, listed = names.table(installation), ruleset.parse(host.nft("list chains", json=True))
    ours = (family for family, name in listed if name == table)
    tables = {family: host.tables(f"list table {family} {table}")[family, table] for family in ours}
    floating = tables["inet"].elements.get(nft.FLOATING) if "inet" in tables else None
    answered = {address for address, _ in floating.items} if floating else set()
    own = {e for e in entries if e.key == FORWARD or (e.dev in links and e.kind in _OURS_ON_HOST)}
    own |= {e for e in entries if e.kind is Kind.PROXY and e.key in answered}
    # Base chains that may drop by policy; not another installation's, which knows its own uplinks only. (What drops by
    # a rule is the doctor's business.)
    others = (at for at in listed if not at[1].startswith("sf-") and at[0] in ("ip", "ip6", "inet"))
    chains = ((at, chain) for at in others for chain in listed[at].chains.values())
    foreign = {(*at, c.name): c.hook for at, c in chains if c.hook and c.hook.hook in ("forward", "input")}
    found[HOST] = Facts(links, frozenset(own), tables, _admissions(table, host, foreign))
    own4 = (e for e in entries if e.kind is Kind.ADDRESS and ":" not in e.key)
    addresses = {IPv4Interface(e.key).ip: e.dev for e in own4}
    carrier = every.get(addresses.get(underlay, ""))
    defaults = [e.dev for e in entries if e.kind is Kind.ROUTE and e.key == "0.0.0.0/0"]
    default6 = any(e.kind is Kind.ROUTE and e.key == "::/0" for e in entries)
    forwards6 = Entry(Kind.SYSCTL, "", FORWARD6, "1") in entries
    return Observed(
        namespaces=found,
        host_addresses=frozenset(addresses),
        uplink=defaults[0] if defaults else "",
        uplink6=default6 and forwards6,
        idle6=default6 and not forwards6,
        mtu_bytes=carrier.mtu_bytes if carrier else 0,
        resolvers=dnsmasq.upstream(),
        foreign=foreign,
        bridges={link.name: link.mtu_bytes for link in every.values() if link.kind == "bridge"},
        bridged_meets_firewall=Entry(Kind.SYSCTL, "", BRIDGED, "1") in entries,
    )


def _admissions(own: str, host: Netns, foreign: Iterable[tuple[str, str, str]]) -> frozenset[Admission]:
    """Our rules in others' chains."""
    found = set[Admission]()
    for family, table, name in foreign:
        with suppress(Failed):  # it was removed since
            text = host.nft(f"list chain {family} {table} {name}", json=True)
            rules = ruleset.parse(text)[family, table].chains[name].rules
            ours = (rule for rule in rules if rule.mark.startswith(f"{own}:"))
            found |= {Admission(family, table, name, rule) for rule in ours}
    return frozenset(found)
