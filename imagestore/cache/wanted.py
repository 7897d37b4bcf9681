"""What is wanted of one incomplete image and what of it comes next: a value of its own, without threads, loop or clock.

`imagestore.cache.fetcher` asks it for jobs, and says what became of them and what time it is.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np

from imagestore.cache.partial import PartialImage
from imagestore.formats.layout import Layout, places
from imagestore.store.frames import REQUEST_BYTES, plan_requests

_BLIND = 8  # chunks that are fetched together where no layout is known yet
_NEIGHBOURS = 16  # so many groups before and behind one are looked at for its request
_NEAR_BYTES = 192 << 10


class Fill(StrEnum):
    """When what nobody asked for is fetched, the soonest first."""

    NOW = "now"
    IDLE = "idle"  # only while no guest of the image has waited for a second
    NEVER = "never"


class Kind(IntEnum):
    """Why a frame is fetched; the lower the earlier."""

    DEMAND = 0
    PREFETCH = 1
    FILL = 2


@dataclass(slots=True, eq=False)
class Job:
    """Groups of chunks that one request brings."""

    kind: Kind
    chunks: list[int]
    owner: str  # the other node that fetches them for the whole site; "" for ourselves


class Wanted:
    """The groups (frames) of an image: present, under way, wanted or not. Times are of any one clock, in seconds.

    owner: which other node fetches the group with this first chunk for the site; "" where we do.
    """

    def __init__(
        self, partial: PartialImage, layout: Layout | None, read_ahead: int, owner: Callable[[int], str]
    ) -> None:
        self.fill = Fill.NEVER
        self._read_ahead, self._owner_of = read_ahead, owner
        self._present, self._ends = partial.present, partial.ends
        count = len(partial.starts)
        if layout:
            at = places(layout.frames)
            order = np.argsort(at, kind="stable")
            self._group_of: list[int] = np.argsort(order)[layout.chunk_frames[:count]].tolist()
            self._starts, self._stops = at[order], (at + layout.frames["size"])[order]
        else:
            self._group_of = [chunk // _BLIND for chunk in range(count)]
            self._starts = np.arange(-(-count // _BLIND)) * REQUEST_BYTES
            self._stops = self._starts + REQUEST_BYTES
        self._groups: list[list[int]] = [[] for _ in self._starts]
        for chunk, group in enumerate(self._group_of):
            self._groups[group].append(chunk)
        self._busy: dict[int, Job] = {}
        self._demand: collections.deque[Job] = collections.deque()
        self._prefetch: dict[int, None] = {}
        self.ahead: set[int] = set()
        """Groups that were fetched ahead of a reader who has not come to them yet."""
        self._cursor = self._prefetching = 0
        self._demanded_s = self.paused_until_s = 0.0  # until then nothing but demand is fetched
        self._settled = bytearray(len(self._groups))  # 1 where a group is present or under way
        self.settle()

    # -- wanting

    def demand(self, missing: Sequence[int], now_s: float, *, for_peer: bool = False) -> set[Job]:
        """The jobs that bring these chunks: those under way, and new ones for the others."""
        self._demanded_s = now_s
        jobs = {self._busy[c] for c in missing if c in self._busy}
        wanted = dict.fromkeys(self._group_of[c] for c in missing if c not in self._busy)
        while wanted:
            job = self._job(Kind.DEMAND, self._request(next(iter(wanted)), wanted))
            job.owner = "" if for_peer else job.owner
            self._demand.append(job)
            jobs.add(job)
        self._look_ahead(missing)
        self._cursor = self._group_of[missing[-1]] + 1
        return jobs

    def prefetch(self, chunks: Iterable[int]) -> None:
        """These will be wanted, in this order."""
        for chunk in chunks:
            if not self._present[chunk]:
                self._prefetch.setdefault(self._group_of[chunk])

    def touched(self, chunks: range) -> bool:
        """A reader found these present. If they are here because they were ahead of it, it goes on being so: True."""
        if self.ahead.isdisjoint(self._group_of[chunk] for chunk in chunks):
            return False
        self._look_ahead(chunks)
        return True

    def _look_ahead(self, chunks: Sequence[int]) -> None:
        """Want what somebody who reads these reads next, where nothing else fills.

        That is as many frames as are there before it already; one if it is near its frame's end, as files go on; none
        behind a lonely read, where every second one would come for nothing.
        """
        self.ahead.difference_update(self._group_of[chunk] for chunk in chunks)
        if not self._read_ahead or self.fill is Fill.NOW:
            return
        first, last = self._group_of[chunks[0]], self._group_of[chunks[-1]]
        run = first - 1 - self._settled.rfind(0, max(0, first - self._read_ahead), first)
        near = self._ends[self._groups[last][-1]] - self._ends[chunks[-1]] < _NEAR_BYTES
        end = last + 1 + max(min(run, self._read_ahead), near)
        ahead = [group for group in range(last + 1, min(end, len(self._groups))) if not self._settled[group]]
        self.ahead.update(ahead)
        # In front of what a trace says: the guest is here now.
        self._prefetch = {**dict.fromkeys(ahead), **self._prefetch}

    # -- fetching

    def take(self, kind: Kind, now_s: float) -> Job | None:
        """The next job of this kind, or None."""
        if kind is Kind.DEMAND:
            return self._demand.popleft() if self._demand else None
        if now_s < self.paused_until_s:
            return None
        if kind is Kind.PREFETCH:
            while self._prefetch:
                group = next(iter(self._prefetch))
                if not self._settled[group]:
                    self._prefetching += 1
                    return self._job(kind, self._request(group, self._prefetch))
                del self._prefetch[group]
            return None
        idle = self.fill is Fill.NOW or (self.fill is Fill.IDLE and now_s - self._demanded_s >= 1)
        if self._prefetching or not idle:
            return None
        group = self._settled.find(0, self._cursor)
        if group < 0 and (group := self._settled.find(0)) < 0:
            return None
        end = self._settled.find(1, group, group + _NEIGHBOURS)
        end = end if end > 0 else min(group + _NEIGHBOURS, len(self._groups))
        run = self._request(group, dict.fromkeys(range(group, end)))
        self._cursor = run[-1] + 1
        return self._job(kind, run)

    def done(self, job: Job) -> None:
        """The job is over; what it brought is marked as present, the rest is missing again."""
        for chunk in job.chunks:
            del self._busy[chunk]
        self._prefetching -= job.kind is Kind.PREFETCH
        self.settle({self._group_of[chunk] for chunk in job.chunks})

    def settle(self, groups: Iterable[int] | None = None) -> None:
        """Look at what is present again, of some groups or of all."""
        for group in range(len(self._groups)) if groups is None else groups:
            self._settled[group] = all(self._present[c] or c in self._busy for c in self._groups[group])

    def owner(self, chunk: int) -> str:
        """The other node that fetches the chunk for the site; "" for ourselves."""
        # Of a whole group, so that no two nodes can hold a half each and wait for the other's.
        return self._owner_of(self._groups[self._group_of[chunk]][0])

    def _request(self, first: int, wanted: dict[int, None]) -> list[int]:
        """Take out of `wanted` the group `first` and its neighbours on both sides that fit into the same request."""
        owner = self._owner(first)
        near = range(max(0, first - _NEIGHBOURS), min(first + _NEIGHBOURS, len(self._groups)))
        groups = [group for group in near if group in wanted and self._owner(group) == owner]
        requests = plan_requests(self._starts[groups], self._stops[groups], REQUEST_BYTES)
        run = next(run for request in requests if first in (run := groups[request]))
        for group in run:
            del wanted[group]
        return run

    def _owner(self, group: int) -> str:
        return self._owner_of(self._groups[group][0]) if self._groups[group] else ""

    def _job(self, kind: Kind, groups: list[int]) -> Job:
        members = itertools.chain.from_iterable(self._groups[group] for group in groups)
        chunks = sorted(c for c in members if not self._present[c] and c not in self._busy)
        job = Job(kind, chunks, self._owner(groups[0]))
        self._busy.update(dict.fromkeys(chunks, job))
        for group in groups:
            self._settled[group] = 1
        return job
