"""From what is observed to what is desired: a list of actions. Pure; run on its own result, it gives none.

Order, so that nothing is ever open that should be shut, and whoever is killed at any point leaves only what the next
plan can see: servers stop and addresses go; links and namespaces go; filters change; links come, then what hangs on
them; servers start last.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from net import nft
from net.facts import (
    HOST,
    Address,
    Admission,
    Dnsmasq,
    Facts,
    Fdb,
    Link,
    Neighbour,
    Observed,
    Proxy,
    Route,
    Sysctl,
    Table,
)
from net.model import NodeNetworks
from net.target import target


class Verb(enum.StrEnum):
    CREATE = "create"
    REMOVE = "remove"
    ADD = "add"
    CHANGE = "change"
    DELETE = "delete"
    ADOPT = "adopt"


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace itself, as the thing that an action is about."""

    name: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """Commands for nft that hold all together or not at all."""

    family: str
    commands: str


Item = Space | Link | Address | Route | Fdb | Neighbour | Proxy | Sysctl | Transaction | Admission | Dnsmasq


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `had` is what was there before, where something was."""

    verb: Verb
    namespace: str
    item: Item
    had: Item | None = None


def plan(desired: NodeNetworks, observed: Observed) -> list[Action]:
    """What makes this node what it must be."""
    return diff(target(desired, observed), observed)


def diff(wanted: Mapping[str, Facts], observed: Observed) -> list[Action]:
    """The actions that lead from observed to wanted. A namespace that is not wanted is removed."""
    actions: list[Action] = []
    for name in sorted({*wanted, *observed.namespaces}):
        want, have = wanted.get(name), observed.namespaces.get(name)
        if want is None or (have is not None and have.broken):
            assert have is not None  # the name is from one of the two
            actions += _removal(name, have)
            have = None
        if want is not None:
            if have is None:
                actions.append(Action(Verb.CREATE, name, Space(name)))
            actions += _changes(name, want, have or Facts(), observed.namespaces[HOST])
    # A tap waits in the host between its making and its adoption. It is dead when no namespace wants it.
    waiting = {n: link for n, link in observed.namespaces[HOST].links.items() if link.kind == "tun"}
    expected = {n for facts in wanted.values() for n in facts.links}
    actions += [Action(Verb.DELETE, HOST, link) for n, link in waiting.items() if n not in expected]
    return sorted(actions, key=lambda action: (_phase(action), action.namespace == HOST))


def _removal(name: str, have: Facts) -> list[Action]:
    stops = [Action(Verb.DELETE, name, have.dnsmasq)] if have.dnsmasq else []
    links = [Action(Verb.DELETE, name, link) for link in have.links.values()]
    return [*stops, *links, Action(Verb.REMOVE, name, Space(name))]


def _changes(name: str, want: Facts, have: Facts, host: Facts) -> list[Action]:
    actions: list[Action] = []
    replaced: set[str] = set()
    for link_name, link in want.links.items():
        held = have.links.get(link_name)
        if held is not None and _must_be_new(link, held, host):
            actions.append(Action(Verb.DELETE, name, held))
            replaced.add(link_name)
            held = None
        if held is not None:
            if _settled(link, held) != held:
                actions.append(Action(Verb.CHANGE, name, link, held))
        elif link.kind != "tun":
            actions.append(Action(Verb.ADD, name, link))
        elif link_name in host.links and host.links[link_name].carrier:
            # A tap that its guest holds already, but that nobody moved here yet.
            actions.append(Action(Verb.ADOPT, name, link))
    gone = {n: link for n, link in have.links.items() if n not in want.links}
    if name == HOST:
        gone = {n: link for n, link in gone.items() if link.kind != "tun"}  # see diff
    actions += [Action(Verb.DELETE, name, link) for link in gone.values()]
    lost = replaced | set(gone)
    absent = {n for n, link in want.links.items() if link.kind == "tun" and n not in have.links}
    for wanted, held_items in (
        (want.addresses, have.addresses),
        (want.routes, have.routes),
        (want.fdb, have.fdb),
        (want.neighbours, have.neighbours),
        (want.proxies, have.proxies),
    ):
        actions += _set_changes(name, wanted, held_items, lost, absent)
    held_sysctls = {sysctl.key: sysctl for sysctl in have.sysctls}
    for sysctl in want.sysctls:
        if have.sysctls and sysctl.key not in held_sysctls:
            continue  # this kernel does not have it
        if held_sysctls.get(sysctl.key) != sysctl:
            actions.append(Action(Verb.CHANGE, name, sysctl, held_sysctls.get(sysctl.key)))
    for family in sorted({*want.tables, *have.tables}):
        actions += _table_changes(name, family, want.tables.get(family), have.tables.get(family))
    actions += [Action(Verb.DELETE, name, a) for a in have.admissions - want.admissions]
    actions += [Action(Verb.ADD, name, a) for a in want.admissions - have.admissions]
    if want.dnsmasq != have.dnsmasq:
        if want.dnsmasq is None:
            assert have.dnsmasq is not None  # they differ
            actions.append(Action(Verb.DELETE, name, have.dnsmasq))
        else:
            verb = Verb.ADD if have.dnsmasq is None else Verb.CHANGE
            actions.append(Action(verb, name, want.dnsmasq, have.dnsmasq))
    return actions


def _set_changes(
    name: str,
    want: Iterable[Address | Route | Fdb | Neighbour | Proxy],
    have: Iterable[Address | Route | Fdb | Neighbour | Proxy],
    lost: set[str],
    absent: set[str],
) -> list[Action]:
    """Entries of a device that goes are gone with it; those of a tap that is not there yet come with it."""
    wanted, held = set(want), {item for item in have if item.dev not in lost}
    actions = [Action(Verb.DELETE, name, item) for item in sorted(set(have) - wanted) if item.dev not in lost]
    return actions + [
        Action(Verb.ADD, name, item) for item in sorted(wanted - held) if item.dev not in absent
    ]


def _table_changes(name: str, family: str, want: Table | None, have: Table | None) -> list[Action]:
    if want == have:
        return []
    verb = Verb.ADD if have is None else Verb.DELETE if want is None else Verb.CHANGE
    return [Action(verb, name, Transaction(family, nft.script(want, have)))]


def _must_be_new(want: Link, have: Link, host: Facts) -> bool:
    """Whether a change of attributes would not do."""
    if want.kind != have.kind:
        return True
    if want.kind == "vxlan":
        return (want.vni, want.local) != (have.vni, have.local)
    return want.kind == "veth" and bool(want.peer) and want.peer not in host.links


def _settled(want: Link, have: Link) -> Link:
    """The wanted link with what it leaves open taken from the observed one."""
    return replace(want, mac=want.mac or have.mac, peer=have.peer, carrier=have.carrier)


def _phase(action: Action) -> int:
    match action.item:
        case Dnsmasq():
            return 0 if action.verb is Verb.DELETE else 9
        case Proxy():
            return 1 if action.verb is Verb.DELETE else 8
        case Address() | Route() | Fdb() | Neighbour():
            early = 1 if action.verb is Verb.DELETE else 6
            return early + (early == 6 and not isinstance(action.item, Address))
        case Link():
            return 2 if action.verb is Verb.DELETE else 5
        case Space():
            return 3
        case Sysctl() | Transaction() | Admission():
            return 4
