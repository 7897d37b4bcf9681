"""Whether a history of concurrent calls has an order that explains every answer (Wing and Gong, with Lowe's memory).

Each key is a register of its own with two calls: `read`, and `swap` from what was read to a new value, which never
is another's. A call without an answer may have happened at any time after it began, or never.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Call:
    key: str
    kind: str
    """read or swap"""
    expect: str = ""
    value: str = ""
    result: str | None = None
    """What was read; "done"; "refused" for a swap from what is not there any more; None without an answer."""
    began: float = 0.0
    ended: float = math.inf


@dataclass
class History:
    """What several threads did."""

    calls: list[Call] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def _call(self, call: Call) -> Iterator[Call]:
        call.began = time.monotonic()
        with self._lock:
            self.calls.append(call)
        try:
            yield call
        except Exception as err:
            if type(err).__name__ == "Stale":
                call.result = "refused"
            raise
        finally:
            if call.result is not None:
                call.ended = time.monotonic()

    def read(self, key: str):  # type: ignore[no-untyped-def]
        return self._call(Call(key, "read"))

    def swap(self, key: str, expect: str, value: str):  # type: ignore[no-untyped-def]
        return self._call(Call(key, "swap", expect, value))


def linearizable(calls: Iterable[Call]) -> bool:
    """Of each key by itself: linearizability is local."""
    by_key = defaultdict(list)
    for call in calls:
        if call.result is not None or call.kind != "read":
            by_key[call.key].append(call)
    return all(_explained(sorted(found, key=lambda call: call.began)) for found in by_key.values())


def _explained(calls: list[Call]) -> bool:
    seen = set[tuple[int, str]]()
    stack = [(0, "")]  # which calls have happened, as bits, and the value then
    while stack:
        done, value = stack.pop()
        if (done, value) in seen:
            continue
        seen.add((done, value))
        left = [n for n in range(len(calls)) if not done >> n & 1]
        if all(calls[n].result is None for n in left):
            return True
        first_end = min(calls[n].ended for n in left)
        for n in left:
            call = calls[n]
            if call.began > first_end:
                break
            if call.kind == "read" or call.result == "refused":
                fits, after = (call.result == value) if call.kind == "read" else (call.expect != value), value
            else:
                fits, after = call.expect == value, call.value
            if fits:
                stack.append((done | 1 << n, after))
    return False
