"""The state store that outlives its machine: etcd, through the gateway of any of its members.

    /sf/state/KEY   a record     /sf/lease/ID   there while that lease is, for changes that prove it
    /sf/nonce/SLOT  what one of our threads committed last, so that a lost answer is recognised
    /sf/reserve/N   room that is given back when etcd is full, so that guests can be deleted then

A commit compares its slot's revision, and writes its nonce there. When no answer comes, a second transaction writes
"void" over that same revision of the slot: either it succeeds, and the first can never happen any more; or the slot
holds the nonce, and the first has happened, at the slot's revision. Slots of the dead go after a day.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from compute.cluster.state.gateway import Gateway, Lost, decode, encode, prefix
from compute.cluster.state.protocol import ABSENT, Change, Keys, Record, Seen, Writes, bounded, kept
from compute.errors import Compacted, LeaseLost, NoSpace, Stale, Unavailable

log = logging.getLogger(__name__)
HISTORY = 4096  # revisions that a watch can look back on

_ATTEMPTS, _KEPT_S, _LEAST_S = 20, 86400.0, 0.2
_PIECES, _PIECE = 4, bytes(256 << 10)


class EtcdStore:
    """`StateStore` in etcd. A lease lives at least two seconds, whatever was asked for: etcd has none shorter."""

    def __init__(self, url: str, *access: str, history: int = HISTORY) -> None:
        self.gateway, self._history = Gateway(url, *access), history
        self._listed: dict[str, tuple[int, dict[str, Record]]] = {}  # prefix → what it had at a revision
        self._ask = self.gateway.ask
        self._full, self._mine, self._trimmed = threading.Lock(), threading.local(), self.revision()
        for kv in self._ask("kv/range", prefix(self._name("nonce/"))).get("kvs", []):
            if int(decode(kv["value"]).partition(b"-")[0]) < time.time() - _KEPT_S:
                self._ask("kv/deleterange", {"key": kv["key"]})
        with suppress(NoSpace):
            for name in ({"key": encode(self._name(f"reserve/{n}"))} for n in range(_PIECES)):
                if not self._ask("kv/range", name | {"count_only": True}).get("count"):
                    self._ask("kv/put", name | {"value": encode(_PIECE)})

    def _name(self, key: str) -> str:
        return f"{self.gateway.place}{key}"

    # Reading: a member asks the others before it answers

    def _record(self, kv: dict[str, Any]) -> Record:
        key = decode(kv["key"]).decode().removeprefix(self._name("state/"))
        return Record(key, decode(kv.get("value", "")), int(kv["mod_revision"]))

    def get(self, key: str) -> Record | None:
        found = self._ask("kv/range", {"key": encode(self._name(f"state/{key}"))}).get("kvs")
        return self._record(found[0]) if found else None

    def list(self, prefix_: str) -> Sequence[Record]:
        after, known = self._listed.get(prefix_, (ABSENT, {}))
        asked = prefix(self._name(f"state/{prefix_}"))
        found = self._ask("kv/range", asked | {"min_mod_revision": str(after + 1)})
        there = known | {r.key: r for r in map(self._record, found.get("kvs", []))}
        # It counts all of them. What is there is known or newer, so that as many are the same.
        if len(there) != int(found.get("count", 0)) or (revision := _revision(found)) < after:
            found = self._ask("kv/range", asked)
            there = {r.key: r for r in map(self._record, found.get("kvs", []))}
            revision = _revision(found)
        if kept(prefix_, there):
            self._listed[prefix_] = revision, there
        return sorted(there.values(), key=lambda record: record.key)

    def revision(self) -> int:
        found = self._ask("kv/range", {"key": encode(self._name("")), "count_only": True})
        return int(found["header"]["revision"])

    # Writing

    def commit(self, writes: Writes, *, expect: Seen, lease: int | None = None, ephemeral: Keys = ()) -> int:
        bounded(writes, expect)
        compare = [_is(self._name(f"state/{key}"), revision) for key, revision in expect.items()]
        doing, looking = list[dict[str, Any]](), list[dict[str, Any]]()
        for key, value in writes.items():
            name = {"key": encode(self._name(f"state/{key}"))}
            bound = {"lease": str(lease)} if key in ephemeral else {}
            put = {"request_put": name | bound | {"value": encode(value or b"")}}
            doing.append({"request_delete_range": name} if value is None else put)
        if lease is not None:
            name = {"key": encode(self._name(f"lease/{lease}"))}
            compare.append(name | {"target": "VERSION", "result": "GREATER", "version": "0"})
            looking.append({"request_range": name})
        asked = {"compare": compare, "success": doing, "failure": looking}
        while True:
            try:
                revision = self._commit(asked)
                break
            except NoSpace:
                if not self._make_room():
                    raise
        if revision - self._trimmed > self._history // 2:
            self._trimmed = revision
            with suppress(Compacted, Unavailable):  # another server did, or will
                self._ask("kv/compaction", {"revision": str(max(1, revision - self._history))})
        return revision

    def _commit(self, asked: dict[str, Any]) -> int:
        """Raises Stale, LeaseLost, NoSpace, Unavailable."""
        for _ in range(_ATTEMPTS):
            # Out of its place until it is known again what it holds.
            fresh = self._name(f"nonce/{secrets.token_hex(8)}"), ABSENT
            slot, revision = self._mine.__dict__.pop("slot", fresh)
            key, nonce = {"key": encode(slot)}, f"{time.time():.0f}-{secrets.token_hex(12)}"
            put = [{"request_put": key | {"value": encode(nonce)}}] if asked["success"] else []
            whole = {
                "compare": [*asked["compare"], _is(slot, revision)],
                "success": [*asked["success"], *put],
                "failure": [*asked["failure"], {"request_range": key}],
            }
            try:
                found = self._ask("kv/txn", whole, again=not put)
            except Lost:
                done, revision = self._settle(slot, revision, nonce)
                self._mine.slot = slot, revision
                if done:
                    return revision
                continue
            if found.get("succeeded"):
                self._mine.slot = slot, _revision(found) if put else revision
                return _revision(found)
            if _revision(found, -1) == revision:  # else it was taken for one of the dead
                self._mine.slot = slot, revision
                break
        else:
            raise Unavailable("etcd's answers are lost again and again", hint="sf doctor")
        if asked["failure"] and not _revision(found, 0):
            raise LeaseLost("the lease has expired")
        raise Stale("something changed meanwhile")

    def _settle(self, slot: str, revision: int, nonce: str) -> tuple[bool, int]:
        """Whether what had no answer was committed, or never will be; the slot's revision. Raises Unavailable."""
        key, void = {"key": encode(slot)}, f"{nonce}-void"
        success, failure = {"request_put": key | {"value": encode(void)}}, {"request_range": key}
        asked = {"compare": [_is(slot, revision)], "success": [success], "failure": [failure]}
        found = self._ask("kv/txn", asked)
        if found.get("succeeded"):
            return False, _revision(found)
        (kv,) = found["responses"][0]["response_range"].get("kvs") or [{"value": ""}]
        if (said := decode(kv["value"]).decode()) not in (nonce, void):
            raise Unavailable("whether a change was made cannot be told any more")
        return said == nonce, _revision(found, 0)

    def _make_room(self) -> bool:
        """Give a piece of the reserve away, and all history; False if there is no reserve left.

        Files of etcd shrink when they are written anew, and it is full until told otherwise.
        """
        with self._full:
            kept = self._ask("kv/range", prefix(self._name("reserve/")) | {"limit": "1", "keys_only": True})
            if kept.get("kvs"):
                log.error("etcd is full: history and a piece of the reserve are given back")
                self._ask("kv/deleterange", {"key": kept["kvs"][0]["key"]})
                with suppress(Compacted):
                    self._ask("kv/compaction", {"revision": str(self.revision()), "physical": True})
                for member in self.gateway.members:
                    with suppress(Lost):  # it goes on without us
                        self.gateway.ask_one(member, "maintenance/defragment", {})
                for alarm in self._ask("maintenance/alarm", {}).get("alarms", []):
                    self._ask("maintenance/alarm", alarm | {"action": "DEACTIVATE"})
            return bool(kept.get("kvs"))

    # Leases

    def grant(self, ttl_s: float) -> int:
        lease = secrets.randbits(62) + 1
        with suppress(LeaseLost):  # it exists: the first answer was lost
            self._ask("lease/grant", {"TTL": str(math.ceil(ttl_s)), "ID": str(lease)})
        self._ask("kv/put", {"key": encode(self._name(f"lease/{lease}")), "lease": str(lease)})
        return lease

    def refresh(self, lease: int) -> None:
        found = self._ask("lease/keepalive", {"ID": str(lease)})
        if not int(found.get("result", {}).get("TTL", 0)) > 0:
            raise LeaseLost(f"lease {lease} has expired")

    def watch(self, prefix_: str, after_revision: int, timeout_s: float) -> Sequence[Change]:
        deadline = time.monotonic() + timeout_s
        while True:
            self.revision()  # a member that is cut off has no answer to this, and would watch in silence
            left_s = max(_LEAST_S, deadline - time.monotonic())
            for events in self.gateway.follow(prefix(self._name("state/")), after_revision, left_s):
                told = ((self._record(e["kv"]), e.get("type") == "DELETE") for e in events)
                found = [Change(r.key, None if gone else r.value, r.revision) for r, gone in told]
                if found := [change for change in found if change.key.startswith(prefix_)]:
                    return found
                if events and time.monotonic() > deadline:
                    return []
            if time.monotonic() > deadline or self.gateway.closed:
                return []

    def close(self) -> None:
        """A second call does nothing."""
        self.gateway.close()


def _is(key: str, revision: int) -> dict[str, Any]:
    return {"key": encode(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def _revision(found: dict[str, Any], place: int | None = None) -> int:
    """Of a transaction, or of the key that its answer has at this place; ABSENT if there is none."""
    if place is None:
        return int(found["header"]["revision"])
    kvs = found["responses"][place]["response_range"].get("kvs")
    return int(kvs[0]["mod_revision"]) if kvs else ABSENT
