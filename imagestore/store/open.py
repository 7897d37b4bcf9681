"""From a URL to an open store: the only place that builds backends."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend
from imagestore.backends.wrappers import Retried, innermost
from imagestore.errors import Conflict, Invalid, NotFound
from imagestore.formats.digest import Digest
from imagestore.store.store import Store

_PIN = re.compile(r"(?:sf\+)?(?:https?\?|https\?sha256=[0-9a-f]{64})")
_FORMS = "use /path, file:///path, s3://bucket/prefix?endpoint_url=…&region=…&profile=… or https://host/path"


def open_store(
    url: str, *, create: bool = False, single_writer: bool = False, private: bool = False, ca: str = ""
) -> Store:
    """Open the store at `url`; with `create` make it where there is none. Close it by `store.backend.close()`.

    A URL may end with `#b3:…`, a signer's fingerprint: then its names are those which that one signed.
    single_writer: nobody else writes to it meanwhile (needed where there are no conditional writes).
    private: a store that is made is never to be published. ca: who vouches for the server of a `sf+https` store (PEM).
    Raises Invalid, NotFound, Denied, Unavailable.
    """
    url, _, fingerprint = url.partition("#")
    backend = open_backend(url, ca)
    if fingerprint:
        from imagestore.store.trust import open_signed

        store = open_signed(backend, Digest.parse(fingerprint))
    else:
        try:
            store = Store.open(backend, single_writer=single_writer)
        except NotFound:
            if not create:
                raise
            with suppress(Conflict):  # somebody else is making it now: theirs is as good
                return Store.init(backend, single_writer=single_writer, private=private)
            store = Store.open(backend, single_writer=single_writer)
    if fingerprint or not isinstance(backend, Directory):
        from imagestore.store.index import LocalIndex

        # Not by its id alone: that is what any store says of itself, and names are believed where etags agree.
        store.names.local = LocalIndex(f"{store.info.id} {store.url}")
    if backend.url.startswith("s3://"):
        s3: Any = innermost(backend)
        s3.known, s3.memory = store.info.conditional.get(s3.address), store.names.local
    return store


def open_backend(url: str, ca: str = "") -> Backend:
    """The backend alone, without asking whether there is a store. Raises Invalid for a URL of no known form."""
    wrong = Invalid(f"not a store's URL: {url[:200]!r}", hint=_FORMS)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is read now
    except ValueError as error:
        raise wrong from error
    if parts.scheme in ("", "file"):
        if parts.netloc or not parts.path or (parts.scheme and (parts.query or parts.path[0] != "/")):
            raise wrong
        return Directory(Path(unquote(parts.path) if parts.scheme else url))
    if not parts.hostname:
        raise wrong
    if parts.scheme == "s3":
        options, bucket = dict(parse_qsl(parts.query, keep_blank_values=True)), parts.netloc
        if options.keys() - {"endpoint_url", "region", "profile"} or len(bucket) < 3 or "@" in bucket:
            raise wrong
        from imagestore.backends.s3 import S3  # boto3: half a second

        return Retried(S3(bucket, parts.path, **options))
    if _PIN.fullmatch(f"{parts.scheme}?{parts.query}"):
        from imagestore.backends.http import Http, Wire

        web, plain = parts.scheme.startswith("sf+"), url.removeprefix("sf+")
        return Retried(Wire(plain, ca=ca) if web else Http(plain))
    raise wrong
