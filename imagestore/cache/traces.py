"""The boot traces that a node has and finds."""

import contextlib
from pathlib import Path

from imagestore import durable
from imagestore.cache.node_stores import Stores
from imagestore.errors import Corrupt, StoreError, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TRACES
from imagestore.formats.manifest import Manifest
from imagestore.formats.trace import Recorder, Trace
from imagestore.store.store import Store

_RELATED = 0.5  # share of another image's trace that must be chunks of this one before it is used


class Traces:
    """A directory of traces by manifest, and the stores that may have others. Runs in threads."""

    def __init__(self, directory: Path, stores: Stores) -> None:
        self._directory, self._stores = directory, stores

    def best(self, digest: Digest, manifest: Manifest) -> Trace | None:
        """This image's trace from here or a store, else the one here that shares most with it."""
        own = _read(self._directory / digest.hex())
        if own:
            return own

        def stored(key: str) -> bytes:
            return self._stores.first(lambda store: store.backend.get(key).data)

        for wanted in (digest, *([manifest.parent] if manifest.parent else [])):
            with contextlib.suppress(StoreError):
                return Trace.decode(stored(TRACES.key(wanted)))
        others = [trace for path in self._directory.iterdir() if (trace := _read(path)) and len(trace.keys)]
        shares = [len(trace.chunks(manifest.ids)) / len(trace.keys) for trace in others]
        share, best = max(zip(shares, others, strict=True), key=lambda one: one[0], default=(0.0, None))
        return best if share >= _RELATED else None

    def keep(self, digest: Digest, manifest: Manifest, recorder: Recorder) -> None:
        """Merge what a boot touched into the image's trace."""
        path = self._directory / digest.hex()
        trace, old = Trace.of(manifest.ids, recorder.order), _read(path)
        durable.write(path, (old.merged(trace) if old else trace).encode(), 0o666)
        if old is None:
            # The first boot here: others may have none yet. A store that we may not write to keeps what it has.
            with contextlib.suppress(StoreError):
                self._stores.first(lambda store: _publish(store, digest, path.read_bytes()))


def _read(path: Path) -> Trace | None:
    with contextlib.suppress(OSError, Corrupt):
        return Trace.decode(path.read_bytes())
    return None


def _publish(store: Store, digest: Digest, data: bytes) -> None:
    if store.backend.read_only or not store.has_manifest(digest):
        raise Unsupported("not ours to write to")
    store.backend.put(TRACES.key(digest), data)
