"""What enters an incomplete image: asked of its origins in order, verified chunk by chunk, kept.

Runs in the threads of the process's one `Fetcher`; nobody sees a chunk before its bytes are hashed
here. What is wanted is said by `filling`, which publishes what came on the event loop's thread.
"""

import contextlib
import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from imagestore.cache.partial import PartialImage
from imagestore.errors import Corrupt, StoreError, Unavailable
from imagestore.formats.digest import Buffer
from imagestore.store.frames import Batch, Origin

DOWN_S = 5.0
"""For so long an origin that failed is asked last."""
_KEEPING = threading.Lock()
"""One thread at a time verifies and writes, at 1.5 GB/s. Two would let the interpreter go to each other after every
chunk, for longer than they hash, and the event loop, which answers the guests, would wait for both."""


@dataclass(slots=True)
class Brought:
    """What one job came to."""

    kept: list[int] = field(default_factory=list)
    loose: dict[int, Buffer] = field(default_factory=dict)
    """Verified chunks that the disk had no room for."""
    received: Counter[str] = field(default_factory=Counter)
    """Bytes by kind of origin."""
    requests: int = 0
    error: StoreError | None = None
    """Why some chunks are in neither."""


class Intake:
    """One incomplete image and its origins in order. `tell` is told of failing ones, from any thread."""

    def __init__(self, partial: PartialImage, origins: Sequence[Origin], tell: Callable[[str], None]) -> None:
        self.origins = list(origins)
        self.down: dict[Origin, float] = {}
        """Those that failed, and until when they are asked last (monotonic clock)."""
        self._partial, self._tell = partial, tell

    def bring(self, chunks: Sequence[int], origins: Sequence[Origin], brought: Brought) -> None:
        """Fetch, verify and keep; goes on to the next origin where one fails. Never raises StoreError or OSError."""
        came = {*brought.kept, *brought.loose}
        missing = dict.fromkeys(c for c in chunks if c not in came)
        now = time.monotonic()
        for origin in sorted(origins, key=lambda o: self.down.get(o, 0.0) > now):
            if not missing:
                break
            try:
                for batch in origin.fetch(list(missing)):
                    brought.requests += batch.clone is None
                    brought.received[origin.kind] += batch.received_bytes
                    with _KEEPING:
                        self._keep(batch, origin, brought, missing)
            except (StoreError, OSError) as error:
                brought.error = error if isinstance(error, StoreError) else Unavailable(str(error))
                self.down[origin] = time.monotonic() + DOWN_S
                self._tell(f"{origin.name}: {error}")
        if not missing:
            brought.error = None
        elif not brought.error:
            brought.error = Unavailable("no store or peer has the missing chunks")

    def _keep(self, batch: Batch, origin: Origin, brought: Brought, missing: dict[int, None]) -> None:
        good = [
            (chunk, piece)
            for chunk, piece in zip(batch.chunks, batch.pieces, strict=True)
            if chunk in missing and self._partial.check(chunk, piece)
        ]
        chunks, pieces = [chunk for chunk, _ in good], [piece for _, piece in good]
        try:
            cloned = False
            if batch.clone and chunks:
                with contextlib.suppress(OSError):
                    self._partial.clone(chunks[0], *batch.clone)
                    cloned = self._partial.check(chunks[0], self._partial.read_chunk(chunks[0]))
            if not cloned:
                self._partial.write(chunks, pieces)
            brought.kept += chunks
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._tell(f"{self._partial.path}: {error}")
            brought.loose.update(good)
        for chunk in chunks:
            del missing[chunk]
        if any(chunk in missing for chunk in batch.chunks):
            raise Corrupt(f"{origin.name} answered with wrong bytes")
