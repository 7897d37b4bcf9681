"""Each namespace's own image store, for what it keeps itself: snapshots, backups, uploads.

One store is one trust domain, so it is complete and private: a directory beside the server's own, or another prefix of
its bucket, made on first use at a place that no other namespace ever gets, not even one that is called the same later.
Images in it are `my/name:tag`, and `namespace/name:tag` for whoever is trusted there; a bare name never means them.
"""

import asyncio
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.protocol import StateStore
from imagestore import Store, StoreError, collect, open_store

MINE = "my"  # before the slash: the current namespace


def beside(url: str, name: str, otherwise: Path) -> str:
    """The URL of the store `name` beside the server's own; below `otherwise` if that one takes no writes."""
    parts = urlsplit(url if "://" in url else Path(url).absolute().as_uri())
    if parts.scheme not in ("file", "s3"):
        parts = urlsplit((otherwise / "store").as_uri())
    path = parts.path.rstrip("/")
    return parts._replace(path=f"{path}-namespaces/{name}" if path else f"/namespaces/{name}").geturl()


class NamespaceStores:
    """Opens them, and keeps them open. own: the URL of the server's own store, as it is now. Any thread may ask."""

    def __init__(self, records: StateStore, own: Callable[[], str], state_dir: Path) -> None:
        self._records, self._own, self._state_dir = records, own, state_dir
        self._open: dict[str, Store] = {}
        self._lock = threading.Lock()

    def of(self, namespace: str) -> Store:
        """The store of a namespace, made if it has none. Raises NotFound (no such namespace), StoreError."""
        found = self.find(namespace, make=True)
        assert found
        return found

    def find(self, namespace: str, *, make: bool = False) -> Store | None:
        """The same, or None where nothing was kept yet and none is to be made."""

        def place(txn: Transaction) -> str:
            found = txn.get(Namespace, namespace)
            if make and not found.store:
                name = f"{namespace}-{secrets.token_hex(16)}"
                found = txn.update(replace(found, store=beside(self._own(), name, self._state_dir)))
            return found.store

        url = transact(self._records, place)
        return self._opened(url) if url else None

    def made(self) -> dict[str, Store]:
        """By namespace, those that are there and can be opened now."""
        found = {}
        for one in Transaction(self._records).list(Namespace):
            with suppress(StoreError):
                if one.store:
                    found[one.name] = self._opened(one.store)
        return found

    async def keep(self) -> None:
        """For ever: each hour the collector, in all of them."""
        while True:
            await asyncio.sleep(3600)
            for store in (await asyncio.to_thread(self.made)).values():
                with suppress(StoreError):  # next hour
                    await asyncio.to_thread(collect, store)

    def close(self) -> None:
        for store in self._open.values():
            store.backend.close()

    def _opened(self, url: str) -> Store:
        with self._lock:
            if url not in self._open:
                if (parts := urlsplit(url)).scheme == "file":
                    # The image service, which is not root, reads what it is told of; who lists this finds nothing.
                    Path(unquote(parts.path)).parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                self._open[url] = open_store(url, create=True, private=True)
            return self._open[url]
