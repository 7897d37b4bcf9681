"""One incomplete image: what is wanted of it, in which order, and what is under way.

All of it on the event loop's thread; `imagestore.cache.intake` brings it in the threads of `imagestore.cache.fetcher`.
"""

import asyncio
import collections
import errno
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from imagestore.cache.intake import DOWN_S, Brought, Intake
from imagestore.cache.partial import PartialImage
from imagestore.cache.peers import Peers
from imagestore.formats.digest import Buffer
from imagestore.formats.layout import Layout
from imagestore.store.frames import REQUEST_BYTES, Origin

if TYPE_CHECKING:
    from imagestore.cache.fetcher import Fetcher

log = logging.getLogger(__name__)
_BLIND_GROUP = 8
"""Chunks that are fetched together where no layout is known yet."""
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_NEAR_BYTES = 192 << 10
_FULL_S = 5.0


class Fill(StrEnum):
    """When what nobody asked for is fetched."""

    NOW = "now"
    IDLE = "idle"
    """Only while no guest of the image has waited for a second."""
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
    owner: str
    """The other node that fetches them for the whole site; "" for ourselves."""
    done: asyncio.Future[Brought]


class Filling:
    """What is wanted of one incomplete image."""

    def __init__(
        self,
        partial: PartialImage,
        origins: Sequence[Origin],
        layout: Layout | None,
        fetcher: "Fetcher",
        *,
        peers: Peers | None = None,
        fill: Fill = Fill.NEVER,
        read_ahead: int = 2,
        event: Callable[[str], None] = log.info,
        complete: Callable[[], object] = bool,
    ) -> None:
        self.partial = partial
        self.intake = Intake(partial, origins, self._tell)
        self.peers = peers
        self.fill = fill
        self.read_ahead = read_ahead
        self.event = event
        """Told in one line what people should know of: a failing origin, a full disk."""
        self._complete = complete
        self.received: collections.Counter[str] = collections.Counter()
        self.requests = 0
        self.last_error = ""
        self._fetcher = fetcher
        self._groups, self._group_of, self._bytes, self._adjoins = _group(layout, len(partial.starts))
        self._busy: dict[int, Job] = {}
        self._demand: collections.deque[Job] = collections.deque()
        self._prefetch: dict[int, None] = {}
        self.ahead: set[int] = set()
        """Groups that were fetched ahead of a reader who has not come to them yet."""
        self._cursor = 0
        self._settled = bytearray(len(self._groups))
        """1 where a group is present or under way."""
        self.running = 0
        self._prefetching = 0
        self.failing = False
        self._last_demand_s = 0.0
        self._full_until_s = 0.0
        self._told: dict[str, float] = {}
        self._settle(range(len(self._groups)))

    # -- asking (event loop)

    async def obtain(
        self, chunks: Sequence[int], patience_s: float, *, for_peer: bool = False
    ) -> dict[int, Buffer]:
        """Wait until every one of these chunks is present, except those returned, which could not be kept.

        Raises OSError (EIO) when that took longer than `patience_s`. for_peer: no other peer is asked or waited for,
        and the first failure ends it.
        """
        loose: dict[int, Buffer] = {}
        deadline, failures = time.monotonic() + patience_s, 0
        while missing := [c for c in chunks if not self.partial.present[c] and c not in loose]:
            self._last_demand_s = time.monotonic()
            jobs = self._demanded(missing, for_peer=for_peer)
            if for_peer and any(job.owner for job in jobs):
                raise OSError(errno.EIO, "another peer is being asked for it")
            self._fetcher.pump()
            left = deadline - time.monotonic()
            if left > 0:
                await asyncio.wait([job.done for job in jobs], timeout=left)
            failed = False
            for job in jobs:
                if job.done.done():
                    brought = job.done.result()
                    loose.update((c, brought.loose[c]) for c in missing if c in brought.loose)
                    failed = failed or brought.error is not None
            if time.monotonic() >= deadline:
                self._tell(f"gave up a read after {patience_s:.0f} s: {self.last_error or 'no answer'}")
                raise OSError(errno.EIO, self.last_error)
            if failed and for_peer:
                raise OSError(errno.EIO, self.last_error)
            if failed:
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        return loose

    def prefetch(self, chunks: Iterable[int]) -> None:
        """These will be wanted, in this order."""
        for chunk in chunks:
            if not self.partial.present[chunk]:
                self._prefetch.setdefault(self._group_of[chunk])
        self._fetcher.pump()

    def _demanded(self, missing: list[int], *, for_peer: bool) -> set[Job]:
        """The jobs that bring these chunks: those under way, and new ones for the others."""
        jobs = {self._busy[c] for c in missing if c in self._busy}
        wanted = dict.fromkeys(self._group_of[c] for c in missing if c not in self._busy)
        while wanted:
            job = self._job(Kind.DEMAND, self._run(next(iter(wanted)), wanted))
            job.owner = "" if for_peer else job.owner
            self._demand.append(job)
            jobs.add(job)
        self._look_ahead(missing)
        self._cursor = self._group_of[missing[-1]] + 1
        return jobs

    def touched(self, chunks: range) -> None:
        """A reader found these present. If they are here because they were ahead of it, it goes on being so."""
        if not self.ahead.isdisjoint(self._group_of[chunk] for chunk in chunks):
            self._look_ahead(chunks)
            self._fetcher.pump()

    def _look_ahead(self, chunks: Sequence[int]) -> None:
        """Want what somebody who reads these reads next, where nothing else fills.

        That is as many frames as are there before it already; one if it is near its frame's end, as files go on; none
        behind a lonely read, where every second one would come for nothing.
        """
        self.ahead.difference_update(self._group_of[chunk] for chunk in chunks)
        if not self.read_ahead or self.fill is Fill.NOW:
            return
        first, last = self._group_of[chunks[0]], self._group_of[chunks[-1]]
        run = first - 1 - self._settled.rfind(0, max(0, first - self.read_ahead), first)
        near = self.partial.ends[self._groups[last][-1]] - self.partial.ends[chunks[-1]] < _NEAR_BYTES
        end = last + 1 + max(min(run, self.read_ahead), near)
        ahead = [group for group in range(last + 1, min(end, len(self._groups))) if not self._settled[group]]
        self.ahead.update(ahead)
        # In front of what a trace says: the guest is here now.
        self._prefetch = {**dict.fromkeys(ahead), **self._prefetch}

    def _owner(self, group: int) -> str:
        # Of a whole group, so that no two nodes can hold a half each and wait for the other's.
        if not self.peers or not self._groups[group]:
            return ""
        now = time.monotonic()
        down, origins = self.intake.down, self.intake.origins
        helpless = all(down.get(o, 0.0) > now for o in origins if o.kind == "store")
        return self.peers.owner(self._groups[group][0], others=helpless)

    def _run(self, first: int, wanted: dict[int, None]) -> list[int]:
        """Take out of `wanted` the group `first` and its neighbours on both sides that fit into the same request."""
        run, size, owner = collections.deque([first]), self._bytes[first], self._owner(first)
        wanted.pop(first, None)
        for step, add in ((1, run.append), (-1, run.appendleft)):
            while (
                (next_ := first + step) in wanted
                and self._adjoins[max(first, next_)]
                and size + self._bytes[next_] <= REQUEST_BYTES
                and self._owner(next_) == owner
            ):
                wanted.pop(next_)
                add(next_)
                size += self._bytes[next_]
                first = next_
            first = run[0]
        return list(run)

    def _job(self, kind: Kind, groups: list[int]) -> Job:
        present, busy = self.partial.present, self._busy
        chunks = sorted(
            c for group in groups for c in self._groups[group] if not present[c] and c not in busy
        )
        job = Job(kind, chunks, self._owner(groups[0]), asyncio.get_running_loop().create_future())
        for chunk in chunks:
            busy[chunk] = job
        for group in groups:
            self._settled[group] = 1
        return job

    def _settle(self, groups: Iterable[int]) -> None:
        present, busy = self.partial.present, self._busy
        for group in groups:
            self._settled[group] = all(present[c] or c in busy for c in self._groups[group])

    def take(self, kind: Kind) -> Job | None:
        """The next job of this kind, or None."""
        if kind is Kind.DEMAND:
            return self._demand.popleft() if self._demand else None
        if time.monotonic() < self._full_until_s:
            return None
        if kind is Kind.PREFETCH:
            while self._prefetch:
                group = next(iter(self._prefetch))
                if not self._settled[group]:
                    self._prefetching += 1
                    return self._job(kind, self._run(group, self._prefetch))
                del self._prefetch[group]
            return None
        if (
            self._prefetching
            or self.fill is Fill.NEVER
            or (self.fill is Fill.IDLE and time.monotonic() - self._last_demand_s < 1)
        ):
            return None
        group = self._settled.find(0, self._cursor)
        if group < 0 and (group := self._settled.find(0)) < 0:
            return None
        end = self._settled.find(1, group, group + 64)
        run = self._run(
            group, dict.fromkeys(range(group, end if end > 0 else min(group + 64, len(self._groups))))
        )
        self._cursor = run[-1] + 1
        return self._job(kind, run)

    def finish(self, job: Job, brought: Brought) -> None:
        """Publish what a job brought."""
        self.partial.mark(brought.kept)
        for chunk in job.chunks:
            del self._busy[chunk]
        self._settle({self._group_of[chunk] for chunk in job.chunks})
        self.running -= 1
        self._prefetching -= job.kind is Kind.PREFETCH
        self.failing = brought.error is not None
        self.received.update(brought.received)
        self.requests += brought.requests
        if brought.loose and not brought.error:
            self._full_until_s = time.monotonic() + _FULL_S
            self._tell("the cache's disk is full: reads go on without being kept, filling waits for room")
        if brought.error:
            self.last_error = str(brought.error)
            if job.kind is not Kind.DEMAND and (job.owner or not self._owner(self._group_of[job.chunks[0]])):
                # Whoever needs it asks again; filling starts again after a while, unless a peer may know more.
                self._full_until_s = time.monotonic() + DOWN_S
        job.done.set_result(brought)
        if self.partial.complete:
            self._complete()

    def lost(self, error: OSError) -> None:
        """A flush failed: what it was to keep is missing again."""
        self._tell(f"the cache's disk: {error}")
        self._settle(range(len(self._groups)))

    @property
    def working(self) -> bool:
        """Whether a job is under way or wanted by a reader."""
        return bool(self._busy)

    def _tell(self, line: str) -> None:
        now = time.monotonic()
        if now - self._told.get(line, -60.0) >= 60:
            self._told[line] = now
            self.event(line)


def _group(layout: Layout | None, count: int) -> tuple[list[list[int]], list[int], list[int], list[bool]]:
    """Chunks by frame in pack order: groups, group of each chunk, stored bytes, whether it follows its predecessor."""
    if layout is None:
        blind = [list(range(at, min(at + _BLIND_GROUP, count))) for at in range(0, count, _BLIND_GROUP)]
        groups_of = [c // _BLIND_GROUP for c in range(count)]
        return blind, groups_of, [REQUEST_BYTES] * len(blind), [True] * len(blind)
    packs, offsets, sizes = (
        column.tolist() for column in (layout.frame_packs, layout.frame_offsets, layout.frame_sizes)
    )
    order = sorted(range(len(packs)), key=lambda f: (packs[f], offsets[f]))
    rank = {frame: at for at, frame in enumerate(order)}
    group_of = [rank[frame] for frame in layout.chunk_frames.tolist()]
    groups: list[list[int]] = [[] for _ in order]
    for chunk, group in enumerate(group_of):
        groups[group].append(chunk)
    adjoins = [False] + [
        packs[a] == packs[b] and offsets[a] + sizes[a] == offsets[b] for a, b in itertools.pairwise(order)
    ]
    return groups, group_of, [sizes[f] for f in order], adjoins
