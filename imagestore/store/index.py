"""What a writer knows of the chunks that a store holds: never needed to read, never trusted without a look.

Every push publishes an index part and adds it to `hooks/all` (imagestore/formats/index.py). What was read or written
once is kept in files under SF_CACHE_DIR. A miss costs a duplicate, never correctness.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from imagestore.backends.wrappers import innermost
from imagestore.errors import Conflict, Corrupt, NotFound
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.keys import HOOKS_KEY, INDEX
from imagestore.formats.pack import Footer
from imagestore.outside import read_json
from imagestore.settings import Settings
from imagestore.store.store import Store

_CACHE_BYTES = 256 << 20
_ATTEMPTS = 5


def read_hooks(store: Store) -> tuple[Hooks, str | None]:
    """The published hooks and their etag; none when there are none, or none that can be read."""
    hooks, etag = Hooks(), None
    with contextlib.suppress(NotFound, Corrupt):
        found = store.backend.get(HOOKS_KEY)
        etag = found.stat.etag
        hooks = Hooks.decode(found.data)
    return hooks, etag


def read_part(store: Store, name: Digest) -> IndexPart | None:
    """A published part; None when it is not there, or is not what its name says: a hint."""
    with contextlib.suppress(NotFound, Corrupt):
        data = store.backend.get(INDEX.key(name)).data
        return IndexPart.decode(data) if Digest.of(data) == name else None
    return None


def publish_part(store: Store, part: IndexPart, seen: tuple[Hooks, str | None] | None = None) -> Digest:
    """Write an index part and add it to the hooks, `seen` before. A lost race is repeated, then let be: a hint."""
    data = part.encode()
    name = Digest.of(data)
    store.backend.put(INDEX.key(name), data)
    if not getattr(innermost(store.backend), "keeps_hooks", False):
        change_hooks(store, lambda hooks: hooks.with_part(name, part, len(data)), seen)
    return name


def change_hooks(
    store: Store, change: Callable[[Hooks], Hooks], seen: tuple[Hooks, str | None] | None = None
) -> bool:
    """Replace the hooks by what `change` makes of them, if that is other ones. False when others were always faster."""
    for again in range(_ATTEMPTS):  # what was seen is believed where a condition says when it is no longer so
        hooks, etag = seen if seen and not again and store.backend.conditional else read_hooks(store)
        new = change(hooks)
        if new is hooks:
            return True
        with contextlib.suppress(Conflict):
            store.backend.put(HOOKS_KEY, new.encode(), if_match=etag, if_none_match=etag is None)
            return True
    return False


class LocalIndex:
    """Index parts of one store on this machine: copies of published ones, and packs of pushes that did not end."""

    def __init__(self, store_id: str, directory: Path | None = None) -> None:
        home = directory or Settings().cache_dir
        self._directory = home / "index" / Digest.of(store_id.encode()).hex()[:32]

    def get(self, name: Digest) -> IndexPart | None:
        """A copy of a published part."""
        with contextlib.suppress(OSError, Corrupt):
            data = (self._directory / f"{name.hex()}.part").read_bytes()
            return IndexPart.decode(data) if Digest.of(data) == name else None
        return None

    def keep(self, name: Digest, part: IndexPart) -> None:
        """Remember a published part."""
        self._write(f"{name.hex()}.part", part.encode())

    def keep_pack(self, pack: Digest, footer: Footer) -> None:
        """Remember a pack that arrived before its index part was published."""
        self._write(f"{pack.hex()}.pack", footer.encode())

    def unfinished(self) -> list[tuple[Digest, Footer]]:
        """Packs that arrived in pushes that were cut off."""
        found = []
        for path in sorted(self._directory.glob("*.pack")):
            with contextlib.suppress(OSError, Corrupt):
                data = path.read_bytes()
                found.append((Digest.of(data), Footer.decode(data)))
        return found

    def forget_packs(self, packs: Iterable[Digest]) -> None:
        """These are published, or gone."""
        for pack in packs:
            with contextlib.suppress(OSError):
                (self._directory / f"{pack.hex()}.pack").unlink(missing_ok=True)

    def recall(self, what: str) -> dict[str, Any]:
        """What `remember` kept last of it."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(found := read_json((self._directory / f"{what}.json").read_bytes()), dict):
                return found
        return {}

    def remember(self, what: str, facts: Mapping[str, Any]) -> None:
        """Keep facts that spare requests to a store that is far away."""
        self._write(f"{what}.json", json.dumps(facts).encode())

    def _write(self, name: str, data: bytes) -> None:
        """A hint that cannot be written, or is lost in a crash, is no error."""
        beside = self._directory / f".{secrets.token_hex(8)}"
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            self._directory.mkdir(parents=True, exist_ok=True)
            undo.callback(beside.unlink, missing_ok=True)
            beside.write_bytes(data)
            beside.rename(self._directory / name)
            self._shrink()

    def _shrink(self) -> None:
        """Drop the oldest parts past a total of 256 MiB."""
        found = [(path, path.stat()) for path in self._directory.iterdir()]
        total = 0
        for path, stat in sorted(found, key=lambda one: -one[1].st_mtime):
            total += stat.st_size
            if total > _CACHE_BYTES:
                path.unlink(missing_ok=True)
