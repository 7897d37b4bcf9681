"""Rules: named lists of who may begin to speak to a guest, attached to interfaces."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from compute.cluster.records.interfaces import Interface
from compute.cluster.records.networks import find_network
from compute.cluster.records.taken import Taken, take_name
from compute.cluster.records.transaction import Stored, Transaction, check_name
from compute.errors import Conflict, Invalid
from net import Allow, ipam

_FORM = re.compile(r"(tcp|udp|icmp|any)(?::([0-9,-]{1,512}))?(?:@(.{1,64}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules(Stored):
    KIND: ClassVar[str] = "rules"
    uuid: str
    name: str
    namespace: str
    allow: tuple[Allow, ...] = ()


def parse(text: str, networks: Mapping[str, str]) -> Allow:
    """`tcp:80,8000-8010`, `udp:53@10.0.0.0/8`, `icmp`, `any@lan`. `networks`: netblocks by name. Raises Invalid."""
    found = _FORM.fullmatch(text)
    try:
        if found is None or (found[2] and found[1] in ("icmp", "any")):
            raise ValueError
        ports, least = [], 1
        pairs = (word.partition("-") for word in (found[2] or "").split(",") if found[2])
        for first, last in sorted((int(first), int(last or first)) for first, _, last in pairs):
            if not least <= first <= last <= 65535:
                raise ValueError
            ports.append((first, last))
            least = last + 1
        block = ipam.block_of(networks.get(found[3], found[3] or str(ipam.ANY)))
        return Allow(found[1], tuple(ports), block)
    except ValueError as err:
        hint = "PROTOCOL[:PORTS][@BLOCK or @NETWORK], for example tcp:80,443 or tcp:22@192.0.2.0/24 or icmp"
        raise Invalid(f"not a rule: {text[:80]!r}", hint=hint) from err


def create_rules(txn: Transaction, rules: Rules) -> Rules:
    """Raises Conflict, Invalid."""
    check_name(rules.name, "name of rules")
    take_name(txn, Rules.KIND, rules.namespace, rules.name, rules.uuid)
    return txn.create(rules)


def delete_rules(txn: Transaction, uuid: str) -> Rules:
    """Raises Conflict while they are attached; whoever attaches them writes them, too."""
    found = txn.get(Rules, uuid)
    if used := [i for i in txn.list(Interface) if uuid in i.rules]:
        raise Conflict(f"rules {found.name} are attached to {len(used)} interfaces", hint="sf rules detach")
    txn.delete(Taken, f"{Rules.KIND}/{found.namespace}/{found.name}")
    txn.delete(Rules, uuid)
    return found


def attach_rules(txn: Transaction, uuid: str, rules_uuid: str, *, on: bool) -> Interface:
    """Attach to an interface, or take away; twice is once. Raises Invalid."""
    found, rules = txn.get(Interface, uuid), txn.get(Rules, rules_uuid)
    find_network(txn, found.network_uuid)
    kept = [each for each in found.rules if each != rules_uuid]
    found = replace(found, rules=(*kept, rules_uuid) if on else tuple(kept))
    if len(found.rules) > 8:
        raise Invalid("an interface has at most 8 rules")
    txn.update(rules)
    return txn.update(found)


def allowed(
    isolated: bool, attached: tuple[str, ...], known: Mapping[str, Rules]
) -> tuple[Allow, ...] | None:
    """Of an interface; None where everybody may speak to it."""
    every = (allow for name in attached if name in known for allow in known[name].allow)
    return tuple(every) if attached or isolated else None
