"""The state store's changes for coroutines."""

import asyncio
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress

from compute.cluster.state.protocol import StateStore
from compute.errors import Compacted, Unavailable

_WATCH_S = 1.0


class Feed:
    """The store's changes for coroutines: one thread watches, any number of tasks wait."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._newest: dict[str, int] = {}
        self._moved = asyncio.Event()
        self._stop = threading.Event()
        self.revision = store.revision()

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop,), name="state-watch", daemon=True).start()

    def stop(self) -> None:
        """The thread ends by itself, at the latest when the store is closed."""
        self._stop.set()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        revision = self.revision
        while not self._stop.is_set():
            try:
                changes = self._store.watch("", revision, _WATCH_S)
                kinds = {change.key.partition("/")[0] for change in changes}
                revision = changes[-1].revision if changes else revision
            except Compacted:
                kinds, revision = {"*"}, self._store.revision()
            except Unavailable:  # said by whoever needs the store
                kinds = set()
                self._stop.wait(_WATCH_S)
            if kinds and not self._stop.is_set():
                with suppress(RuntimeError):  # the loop was closed at this moment
                    loop.call_soon_threadsafe(self._note, kinds, revision)

    def _note(self, kinds: Iterable[str], revision: int) -> None:
        self._newest |= dict.fromkeys(kinds, revision)
        self.revision = revision
        self._moved.set()
        self._moved = asyncio.Event()

    async def moved(self, kinds: Collection[str], after_revision: int, timeout_s: float) -> bool:
        """Wait until something of these kinds is newer than `after_revision`; False at the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while max((self._newest.get(kind, 0) for kind in (*kinds, "*")), default=0) <= after_revision:
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True
