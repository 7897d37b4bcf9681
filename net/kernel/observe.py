"""What the kernel of this node holds that is ours: read, never changed."""

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from net.errors import Failed
from net.kernel import dnsmasq, netns
from net.kernel.netns import Netns
from net.plan import names, nft, ruleset
from net.plan.facts import HOST, Admission, Dnsmasq, Entry, Facts, Hook, Kind, Link, Observed
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
    table = names.table(installation)
    tables = {}
    for family, name in ruleset.parse(host.nft("list tables", json=True)):
        if name == table:
            tables[family] = host.tables(f"list table {family} {table}")[family, table]
    floating = tables["inet"].elements.get(nft.FLOATING) if "inet" in tables else None
    answered = {address for address, _ in floating.items} if floating else set()
    own = {e for e in entries if e.key == FORWARD or (e.dev in links and e.kind in _OURS_ON_HOST)}
    own |= {e for e in entries if e.kind is Kind.PROXY and e.key in answered}
    foreign, admissions = _foreign(installation, host)
    found[HOST] = Facts(links, frozenset(own), tables, admissions)
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


def _foreign(installation: str, host: Netns) -> tuple[dict[tuple[str, str, str], Hook], frozenset[Admission]]:
    """Others' base chains that drop by policy and lie in the way of forwarded or mesh packets, with our rules in
    them. (Chains that drop by a rule are the doctor's business.)"""
    own = names.table(installation)
    chains, admissions = dict[tuple[str, str, str], Hook](), set[Admission]()
    for (family, table), listed in ruleset.parse(host.nft("list chains", json=True)).items():
        if table.startswith("sf-") or family not in ("ip", "ip6", "inet"):
            continue  # ours, or another installation's, which knows its own uplinks only
        for name, hook in ((chain.name, chain.hook) for chain in listed.chains.values()):
            if hook is None or hook.hook not in ("forward", "input"):
                continue
            chains[family, table, name] = hook
            with suppress(Failed):  # it was removed since
                text = host.nft(f"list chain {family} {table} {name}", json=True)
                rules = ruleset.parse(text)[family, table].chains[name].rules
                ours = (rule for rule in rules if rule.mark.startswith(f"{own}:"))
                admissions |= {Admission(family, table, name, rule) for rule in ours}
    return chains, frozenset(admissions)
