"""From a URL to an open store: the only place that builds backends."""

import logging
from pathlib import Path
from urllib.parse import urlsplit

from imagestore.backend import Backend
from imagestore.directory import Directory
from imagestore.errors import Invalid, NotFound
from imagestore.store import Store

_FORMS = "use /path, file:///path, s3://bucket/prefix?endpoint_url=…&region=… or https://host/path"
log = logging.getLogger(__name__)


def open_store(url: str, *, create: bool = False, single_writer: bool = False) -> Store:
    """Open the store at `url`; with `create` make it where there is none. Close it by `store.backend.close()`.

    single_writer: nobody else writes to it meanwhile (needed where there are no conditional writes).
    Raises Invalid, NotFound, Denied, Unavailable.
    """
    backend = open_backend(url)
    try:
        return Store.open(backend, single_writer=single_writer)
    except NotFound:
        if not create:
            raise
    return Store.init(backend, single_writer=single_writer)


def open_backend(url: str) -> Backend:
    """The backend alone, without asking whether there is a store. Raises Invalid for a URL of no known form."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        if parts.netloc or not parts.path or (parts.scheme and not parts.path.startswith("/")):
            raise Invalid(f"not a store's URL: {url[:200]!r}", hint=_FORMS)
        return Directory(Path(url if not parts.scheme else parts.path))
    raise Invalid(f"not a store's URL: {url[:200]!r}", hint=_FORMS)
