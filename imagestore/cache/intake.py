"""What enters an incomplete image: asked of its origins in order, verified chunk by chunk, kept.

Runs in the threads of the process's one `Fetcher`; nobody sees a chunk before its bytes are hashed here.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from imagestore.cache.partial import PartialImage
from imagestore.errors import DISK_FULL, Corrupt, StoreError, Unavailable
from imagestore.formats.digest import Buffer
from imagestore.store.frames import Batch, Origin

DOWN_S = 5.0  # for so long an origin that failed is asked last
_KEEPING = threading.Lock()
"""One thread at a time verifies and writes, at 1.5 GB/s. Two would let the interpreter go to each other after every
chunk, for longer than they hash, and the event loop, which answers the guests, would wait for both."""


@dataclass(slots=True)
class Brought:
    """What one job came to."""

    kept: list[int] = field(default_factory=list)
    loose: dict[int, Buffer] = field(default_factory=dict)  # verified chunks that the disk had no room for
    received: Counter[str] = field(default_factory=Counter)  # bytes by kind of origin
    error: StoreError | None = None  # why some chunks are in neither
    notes: list[str] = field(default_factory=list)
    """What people should know of: failing origins, a failing disk."""


def bring(
    partial: PartialImage,
    chunks: Sequence[int],
    origins: Sequence[Origin],
    down: dict[Origin, float],
    brought: Brought,
) -> None:
    """Fetch, verify and keep; goes on to the next origin where one fails. Never raises StoreError or OSError.

    down: origins that failed, and until when (monotonic clock) they are asked last.
    """
    came = {*brought.kept, *brought.loose}
    missing = dict.fromkeys(c for c in chunks if c not in came)
    now = time.monotonic()
    for origin in sorted(origins, key=lambda o: down.get(o, 0.0) > now):
        if not missing:
            break
        try:
            for batch in origin.fetch(list(missing)):
                brought.received[origin.kind] += batch.received_bytes
                with _KEEPING:
                    _keep(partial, batch, brought, missing)
                if any(chunk in missing for chunk in batch.chunks):
                    wrong = Corrupt(f"{origin.name} answered with wrong bytes")
                    if origin.kind != "local":
                        raise wrong
                    # A bit of one image here: the others, and the rest of that one, are as good as before.
                    brought.notes.append(f"{wrong}: `sf cache verify` says which image is damaged")
        except (StoreError, OSError) as error:
            brought.error = error if isinstance(error, StoreError) else Unavailable(str(error))
            down[origin] = time.monotonic() + DOWN_S
            brought.notes.append(f"{origin.name}: {error}")
    if not missing:
        brought.error = None
    elif not brought.error:
        brought.error = Unavailable("no store or peer has the missing chunks")


def _keep(partial: PartialImage, batch: Batch, brought: Brought, missing: dict[int, None]) -> None:
    """Write the chunks of a batch that are what they should be; those that are not stay missing."""
    good = {
        chunk: piece
        for chunk, piece in zip(batch.chunks, batch.pieces, strict=True)
        if chunk in missing and partial.check(chunk, piece)
    }
    chunks = list(good)
    try:
        cloned = False
        if batch.clone and chunks:
            with contextlib.suppress(OSError):
                partial.clone(chunks[0], *batch.clone)
                cloned = partial.check(chunks[0], partial.read_chunk(chunks[0]))
        if not cloned:
            partial.write(chunks, list(good.values()))
        brought.kept += chunks
    except OSError as error:
        if error.errno not in DISK_FULL:
            brought.notes.append(f"{partial.path}: {error}")
        brought.loose.update(good)
    for chunk in chunks:
        del missing[chunk]
