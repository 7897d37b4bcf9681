"""What differs on a node from what is desired, in words, and what of the host's own firewall is in the way. Pure."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from net.plan import names
from net.plan.facts import HOST, Admission, Dnsmasq, Entry, Kind, Link, Observed
from net.plan.model import NodeNetworks
from net.plan.plan import Action, Space, Transaction, Verb, plan
from net.plan.target import has_uplink, is_meshed, published, tap_name, unfit

_Rules = dict[tuple[str, ...], list[dict[str, Any]]]  # by family, table and chain


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be; `fix` is what to do, "" where the next reconcile does it."""

    network: str  # its name, or "" for the host
    text: str
    fix: str = ""


def examine(desired: NodeNetworks, observed: Observed, ruleset: str) -> list[Finding]:
    """Everything wrong on this node. `ruleset` is nft's JSON listing of the host."""
    by_space = {names.namespace(desired.installation, n.vni): n.name for n in desired.networks}
    findings = [
        Finding(by_space.get(action.namespace, action.namespace or "host"), describe(action))
        for action in plan(desired, observed)
    ]
    for network in desired.networks:
        space = HOST if network.bridge else names.namespace(desired.installation, network.vni)
        facts = observed.namespaces.get(space)
        text, fix = unfit(desired, observed, network)
        findings += [Finding(network.name, text, fix)] if text else []
        for port in network.ports if facts else ():
            if facts and port.node == desired.node and tap_name(desired, port) not in facts.links:
                text = f"{port.hostname or port.uuid} has no tap here: its guest is off, or not started yet"
                findings.append(Finding(network.name, text))
    if observed.idle6 and any(n.netblock6 and has_uplink(desired, n) for n in desired.networks):
        text = "this node has IPv6, but does not forward it: guests of its routers do not get out"
        findings.append(Finding("", text, "sysctl -w net.ipv6.conf.all.forwarding=1 (and accept_ra=2)"))
    told = published(desired, observed)[1]
    findings += [Finding("", text, "stop that server, or publish another port") for text in told]
    return findings + list(_firewall(desired, observed, ruleset))


def describe(action: Action) -> str:
    """What is not as it should be where this action is needed."""
    states = {Verb.ADD: "is missing", Verb.CHANGE: "differs from what is desired"}
    states |= {Verb.DELETE: "should not be there", Verb.ADOPT: "is not in its network yet"}
    state = states[action.verb]
    match action.item:
        case Space(name=name):
            return f"the namespace {name} {state}"
        case Link(name=name, kind=kind):
            return f"the {'tap' if kind == 'tun' else kind} device {name} {state}{_difference(action)}"
        case Entry(kind=Kind.SYSCTL, key=key, value=value):
            return f"{key} is not {value}"
        case Entry(kind=kind, dev=dev, key=key, value=value):
            return f"the {kind} {key}{f' to {value}' if value else ''} of {dev} {state}"
        case Transaction(family=family):
            return f"the filter table of family {family} {state}"
        case Admission(table=table, chain=chain):
            return f"our rule in the host firewall's chain {table} {chain} {state}"
        case Dnsmasq():
            return f"the DHCP and DNS server {state if action.had or action.verb is Verb.DELETE else 'does not run'}"


def _difference(action: Action) -> str:
    want, had = action.item, action.had
    if not isinstance(want, Link) or not isinstance(had, Link):
        return ""
    about = ("mtu_bytes", "up", *(["mac"] if want.mac else ()), "master", "alias", "suppress", "learning")
    told = [f"{f} is {getattr(had, f)!r}" for f in about if getattr(want, f) != getattr(had, f)]
    return f": {', '.join(told)}" if told else ""


def _firewall(desired: NodeNetworks, observed: Observed, ruleset: str) -> Iterator[Finding]:
    """Rules of other tables that refuse what our uplinks forward, bridged packets, or VXLAN from a node."""
    own, prefix = names.table(desired.installation), names.host_uplink_prefix(desired.installation)
    objects = json.loads(ruleset)["nftables"] if ruleset.strip() else []
    rules: _Rules = {}
    for rule in (o["rule"] for o in objects if "rule" in o):
        rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule)
    uplinks = any(has_uplink(desired, network) for network in desired.networks)
    forwarded = [("packets from our uplinks", "iifname"), ("packets to our uplinks", "oifname")]
    for chain in (o["chain"] for o in objects if "chain" in o):
        at = (chain["family"], chain["table"], chain["name"])
        if at[0] not in ("ip", "inet") or at[1] == own:
            continue
        packets = []
        if chain.get("hook") == "forward":
            packets = [(what, {key: prefix}, f'{key} "{prefix}*"') for what, key in forwarded if uplinks]
            for bridge in sorted({n.bridge for n in desired.networks if n.bridge in observed.bridges}):
                if observed.bridged_meets_firewall:
                    both = {"iifname": bridge, "oifname": bridge}
                    match = f'iifname "{bridge}" oifname "{bridge}"'
                    packets.append((f"packets between ports of {bridge}", both, match))
        elif chain.get("hook") == "input" and is_meshed(desired):
            packets = [("the mesh's packets", {"dport": "4789"}, "udp dport 4789")]
        for what, packet, match in packets:
            why = _verdict(rules, at, packet, own)
            if why is None and chain["policy"] == "drop":
                why = f"the policy of chain {' '.join(at)} is to drop"
            if why:
                fix = f"nft insert rule {' '.join(at)} {match} accept"
                yield Finding("", f"the host's firewall refuses {what}: {why}", fix)


def _verdict(rules: _Rules, at: tuple[str, ...], packet: Mapping[str, str], own: str) -> str | None:
    """What a packet of which we know a device or a port meets in a chain, and in those that this leads to.

    None: no rule decides; "": accepted; else the rule that surely refuses. The kernel allows no loops.
    """
    for rule in rules.get(at, []):
        # An accept of ours also asks for the sender's address, which we do not know.
        ours = rule.get("comment", "").startswith(f"{own}:")
        matches = [e["match"] for e in rule["expr"] if "match" in e]
        extensions = [e["xt"] or {} for e in rule["expr"] if "xt" in e]  # of iptables, in a word each
        if any(x.get("type") == "match" and x.get("name") != "comment" for x in extensions):
            continue
        if not all(_holds(match, packet, unknown=ours) for match in matches):
            continue
        for expression in rule["expr"]:
            target = (expression.get("xt") or {}).get("name")
            if "drop" in expression or "reject" in expression or target in ("DROP", "REJECT"):
                where = " ".join(at)
                return f"rule {rule['handle']} of chain {where} (nft -a list chain {where})"
            if "accept" in expression:
                return ""
            if "return" in expression:
                return None
            if called := expression.get("jump") or expression.get("goto"):
                inner = _verdict(rules, (*at[:2], called["target"]), packet, own)
                if inner is not None:
                    return inner
    return None


def _holds(match: dict[str, Any], packet: Mapping[str, str], *, unknown: bool) -> bool:
    """Whether a match holds for such a packet; `unknown` where that cannot be said."""
    left, right = match["left"], match["right"]
    key = ""
    if isinstance(left, dict):
        key = str(left.get("meta", {}).get("key") or left.get("payload", {}).get("field"))
    if key not in packet or not isinstance(right, str | int):
        return unknown
    known, text = packet[key], str(right)
    same = known.startswith(text[:-1]) or text.startswith(known) if text.endswith("*") else text == known
    return same if match["op"] == "==" else not same
