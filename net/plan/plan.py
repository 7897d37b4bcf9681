"""From what is observed to what is desired: a list of actions. Pure; run on its own result, it gives none.

Order, so that nothing is ever open that should be shut, and whoever is killed at any point leaves only what the next
plan can see: the host's filters come first and its ends of uplinks last; in each namespace servers stop and entries go;
links and the namespace go; filters change; links come, then what hangs on them; servers start last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from net.plan import ruleset
from net.plan.facts import HOST, Admission, Dnsmasq, Entry, Facts, Kind, Link, Observed
from net.plan.model import NodeNetworks
from net.plan.target import target


class Verb(StrEnum):
    ADD = "add"
    CHANGE = "change"
    DELETE = "delete"
    ADOPT = "adopt"  # of a tap: its guest holds it, but nobody moved it into its network yet


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace itself, as the thing that an action is about."""

    name: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """Commands for nft that hold all together or not at all."""

    family: str
    commands: str


Item = Space | Link | Entry | Transaction | Admission | Dnsmasq


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


def diff(wanted: Mapping[str, Facts], observed: Observed, *, guests_too: bool = False) -> list[Action]:
    """The actions that lead from observed to wanted. A namespace that is not wanted is removed, unless a guest holds
    its tap there (or `guests_too`): who made the tap takes it away, and what runs is not cut off because nobody
    knows it."""
    actions: list[Action] = []
    host = observed.namespaces[HOST]
    namespaces = {**observed.namespaces, HOST: _kept(wanted, observed)}
    for name in sorted({*wanted, *namespaces}):
        want, have = wanted.get(name), namespaces.get(name)
        if want is None and have is not None and not have.broken and _held(have) and not guests_too:
            continue
        if have is not None and (want is None or have.broken):
            actions += [
                Action(Verb.DELETE, name, item) for item in (have.dnsmasq, *have.links.values()) if item
            ]
            actions.append(Action(Verb.DELETE, name, Space(name)))
            have = None
        if want is not None:
            if have is None:
                actions.append(Action(Verb.ADD, name, Space(name)))
            actions += _changes(name, want, have or Facts(), host)
    # A tap waits in the host between its making and its adoption. It is dead when no namespace wants it.
    expected = {n for facts in wanted.values() for n in facts.links}
    taps = [link for link in host.links.values() if link.kind == "tun" and link.name not in expected]
    actions += [Action(Verb.DELETE, HOST, link) for link in taps if guests_too or not link.carrier]
    return sorted(actions, key=_order)


def _kept(wanted: Mapping[str, Facts], observed: Observed) -> Facts:
    """The host without its ends of uplinks that are about to be made: one of that name that is there now goes."""
    host, ends = observed.namespaces[HOST], set()
    for name, want in wanted.items():
        have = observed.namespaces.get(name, Facts()).links
        for n, link in want.links.items():
            if link.peer and (n not in have or _must_be_new(link, have[n], host)):
                ends.add(link.peer)
    links = {n: link for n, link in host.links.items() if n not in ends}
    return replace(host, links=links, entries=frozenset(e for e in host.entries if e.dev not in ends))


def _changes(name: str, want: Facts, have: Facts, host: Facts) -> list[Action]:
    actions: list[Action] = []
    kept = [n for n, link in have.links.items() if link.kind == "tun" and (link.carrier or name == HOST)]
    lost = have.links.keys() - want.links.keys() - set(kept)
    lost |= {
        n for n, link in want.links.items() if n in have.links and _must_be_new(link, have.links[n], host)
    }
    actions += [Action(Verb.DELETE, name, have.links[n]) for n in lost]
    strays = [link for n, link in _held(have).items() if n not in want.links and link.up]
    strays = [link for link in strays if name != HOST or link.master]
    actions += [Action(Verb.CHANGE, name, replace(link, up=False), link) for link in strays]
    absent, readdressed = set(), set()
    for n, link in want.links.items():
        held = have.links.get(n) if n not in lost else None
        if held is not None:
            open_fields = replace(link, mac=link.mac or held.mac, peer=held.peer, carrier=held.carrier)
            # A tap on the node's own bridge waits in the host's namespace until its guest holds it.
            waits = name == HOST and link.kind == "tun" and not (held.carrier or held.master)
            if open_fields != held and not waits:
                actions.append(Action(Verb.CHANGE, name, link, held))
            if open_fields.mac != held.mac:
                readdressed.add(n)
        elif link.kind != "tun":
            actions.append(Action(Verb.ADD, name, link))
        elif n in host.links and host.links[n].carrier:
            actions.append(Action(Verb.ADOPT, name, link))
        else:
            absent.add(n)
    # Entries of a device that goes are gone with it, and a new MAC flushes its neighbours; those of a tap that is
    # not there yet come with it.
    held_entries = {
        e
        for e in have.entries
        if e.dev not in lost and not (e.kind is Kind.NEIGHBOUR and e.dev in readdressed)
    }
    gone = [e for e in held_entries - want.entries if e.kind is not Kind.SYSCTL]
    actions += [Action(Verb.DELETE, name, e) for e in sorted(gone)]
    new = [e for e in want.entries - held_entries if e.dev not in absent]
    actions += [Action(Verb.ADD, name, e) for e in sorted(new)]
    for family in sorted({*want.tables, *have.tables}):
        wanted, held_table = want.tables.get(family), have.tables.get(family)
        if wanted != held_table:
            verb = Verb.ADD if held_table is None else Verb.CHANGE if wanted else Verb.DELETE
            actions.append(Action(verb, name, Transaction(family, ruleset.script(wanted, held_table))))
    actions += [Action(Verb.DELETE, name, a) for a in have.admissions - want.admissions]
    actions += [Action(Verb.ADD, name, a) for a in want.admissions - have.admissions]
    if want.dnsmasq and want.dnsmasq != have.dnsmasq:
        verb = Verb.CHANGE if have.dnsmasq else Verb.ADD
        actions.append(Action(verb, name, want.dnsmasq, have.dnsmasq))
    elif have.dnsmasq and not want.dnsmasq:
        actions.append(Action(Verb.DELETE, name, have.dnsmasq))
    return actions


def _held(facts: Facts) -> dict[str, Link]:
    """Taps that a guest holds open."""
    return {n: link for n, link in facts.links.items() if link.kind == "tun" and link.carrier}


def _must_be_new(want: Link, have: Link, host: Facts) -> bool:
    """Whether a change of attributes would not do."""
    if want.kind == "veth" and want.peer and want.peer not in host.links:
        return True
    return (want.kind, want.vni, want.local) != (have.kind, have.vni, have.local)


def _order(action: Action) -> tuple[int, str, int]:
    """The host's filters, then each namespace, then the host's links to them."""
    phase = _phase(action)
    stage = 1 if action.namespace != HOST else 0 if phase <= 4 else 2
    return stage, action.namespace, phase


def _phase(action: Action) -> int:
    goes = action.verb is Verb.DELETE
    match action.item:
        case Dnsmasq():
            return 0 if goes else 9
        case Entry(kind=Kind.SYSCTL, dev="") | Transaction() | Admission():
            return 4
        case Entry(kind=Kind.SYSCTL):
            return 5  # behind its device, which was planned before it
        case Entry(kind=kind):
            return 1 if goes else {Kind.ADDRESS: 6, Kind.PROXY: 8}.get(kind, 7)
        case Link():
            return 2 if goes else 5
        case Space():
            return 3
