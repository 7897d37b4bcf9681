"""Firewall rules as text: the transaction that leads from what is there to what must be, and what nft lists, read.

Pure; net/kernel/libnft.py runs the text.
"""

import json
from typing import Any

from net.plan.facts import Admission, Chain, Elements, Hook, Rule, Table
from net.plan.nft import braces


def admission(a: Admission, *, add: bool) -> str:
    where = f"rule {a.family} {a.table} {a.chain}"
    if add:
        return f'add {where} {a.rule.text} comment "{a.rule.mark}"'
    return f"delete {where} handle {a.rule.handle}"


def script(want: Table | None, have: Table | None) -> str:
    """The one transaction that makes `have` into `want`. What is equal is left alone, with its counters."""
    if want is None:
        return f"delete table {have.family} {have.name}\n" if have else ""
    have = have or Table(want.family, want.name, {})
    had, held, counters = have.chains, have.elements, have.counters
    if any(chain.hook != had[n].hook for n, chain in want.chains.items() if n in had):
        return script(None, have) + script(want, None)
    at = f"{want.family} {want.name}"
    changed = {name: chain for name, chain in want.chains.items() if had.get(name) != chain}
    stale = [name for name in had if name not in want.chains]
    lines = [f"add table {at}"]
    lines += [f"add counter {at} {name}" for name in sorted(want.counters - counters)]
    for name, chain in changed.items():
        lines.append(f"add chain {at} {name}{_hook(chain.hook)}")
        if name in had:
            lines.append(f"flush chain {at} {name}")
    lines += [f"flush chain {at} {name}" for name in stale]
    for name, elements in want.elements.items():
        if name not in held:
            lines.append(f"add {elements.declaration}")
        gone = (held[name].items if name in held else frozenset()) - elements.items
        if gone:
            lines.append(f"delete element {at} {name} {braces(sorted(key for key, _ in gone))}")
    lines += [f"delete chain {at} {name}" for name in stale]
    lines += [f"delete {e.declaration} {at} {n}" for n, e in held.items() if n not in want.elements]
    lines += [f"delete counter {at} {name}" for name in sorted(counters - want.counters)]
    for name, chain in changed.items():
        lines += [f'add rule {at} {name} {rule.text} comment "{rule.mark}"' for rule in chain.rules]
    for name, elements in want.elements.items():
        if new := elements.items - (held[name].items if name in held else frozenset()):
            pairs = sorted(f"{key} : {value}" if value else key for key, value in new)
            lines.append(f"add element {at} {name} {braces(pairs)}")
    return "\n".join(lines) + "\n"


def _hook(hook: Hook | None) -> str:
    if hook is None:
        return ""
    return f" {{ type {hook.type} hook {hook.hook} priority {hook.priority} ; policy {hook.policy} ; }}"


def parse(text: str) -> dict[tuple[str, str], Table]:
    """nft's JSON listing (libnftables-json(5)) as tables by family and name; sets and maps without what is in them."""
    found: dict[tuple[str, str], tuple[dict[str, Hook | None], dict[str, Elements], set[str]]] = {}
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    objects = json.loads(text)["nftables"] if text.strip() else []
    for kind, item in ((k, item) for entry in objects for k, item in entry.items() if k != "metainfo"):
        at = item["family"], item.get("table") or item["name"]
        hooks, elements, counters = found.setdefault(at, ({}, {}, set()))
        if kind == "rule":
            rule = Rule(item.get("comment", ""), handle=item["handle"])
            rules.setdefault((*at, item["chain"]), []).append(rule)
        elif kind == "chain":
            hook = Hook(item["type"], item["hook"], item["prio"], item["policy"]) if "hook" in item else None
            hooks[item["name"]] = hook
        elif kind in ("set", "map"):
            elements[item["name"]] = Elements(kind, moving="timeout" in item.get("flags", []))
        elif kind == "counter":
            counters.add(item["name"])
    tables = {}
    for at, (hooks, elements, counters) in found.items():
        chains = {n: Chain(n, hook, tuple(rules.get((*at, n), ()))) for n, hook in hooks.items()}
        tables[at] = Table(*at, chains, elements, frozenset(counters))
    return tables


def _item(element: Any) -> tuple[str, str]:
    if isinstance(element, list):
        key, verdict = element
        key = " . ".join(map(str, key["concat"])) if isinstance(key, dict) else key
        word, target = next(iter(verdict.items())) if isinstance(verdict, dict) else (str(verdict), None)
        return str(key), f"{word} {target['target']}" if target else word
    return str(element), ""


def items(text: str) -> frozenset[tuple[str, str]]:
    """What is in a set or map, from nft's JSON listing of it."""
    found = (held for entry in json.loads(text)["nftables"] for held in entry.values())
    return frozenset(_item(each) for held in found for each in held.get("elem", ()))
