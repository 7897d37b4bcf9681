"""The stores of a node, in their order, opened when they are needed."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from imagestore.backends.wrappers import Retried
from imagestore.errors import NotFound, StoreError
from imagestore.store.open import open_store
from imagestore.store.store import Store

T = TypeVar("T")
_STORE_AGAIN_S = 5.0


class Stores:
    """Opens stores when they are needed; one that was away is tried again after some seconds."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._open: dict[str, Store] = {}
        self._failed: dict[str, tuple[float, StoreError]] = {}

    def get(self, url: str) -> Store:
        """The open store, without the wrapper that retries: the fetcher does that, and asks others meanwhile."""
        if url not in self._open:
            since, error = self._failed.get(url, (0.0, None))
            if error and time.monotonic() - since < _STORE_AGAIN_S:
                raise error
            try:
                store = open_store(url)
            except StoreError as failure:
                self._failed[url] = (time.monotonic(), failure)
                raise
            backend = store.backend.inner if isinstance(store.backend, Retried) else store.backend
            self._open[url] = Store(backend, store.info)
        return self._open[url]

    def first(self, ask: Callable[[Store], T]) -> T:
        """The first answer that is no StoreError, in order. Raises the first store's error."""
        failure: StoreError = NotFound("no store is configured")
        for at, url in enumerate(self.urls):
            try:
                return ask(self.get(url))
            except StoreError as error:
                failure = error if not at else failure
        raise failure

    def readable(self) -> dict[str, str]:
        """URL → identity of those that can be opened now."""
        found = {}
        for url in list(self.urls):
            with suppress(StoreError):
                found[url] = self.get(url).info.id
        return found

    def close(self) -> None:
        """Close all that were opened."""
        for store in self._open.values():
            store.backend.close()
