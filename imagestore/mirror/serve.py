"""`sf mirror serve`: the store's tree for sf, whole disks, simplestreams and pages for everybody else."""

import asyncio
import errno
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import Environment, PackageLoader
from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.types import Receive, Scope, Send

from imagestore.disks.qcow2.writer import WRITER, plan
from imagestore.errors import Conflict, Denied, Invalid, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.listening import raise_limits, settings
from imagestore.mirror.catalog import Catalog, Image, streams_images, streams_index
from imagestore.mirror.content import AHEAD, Content, GroupCache, simplestreams_archive
from imagestore.mirror.pull_through import PullThrough
from imagestore.mirror.sync import read_provenance
from imagestore.mirror.tree import Limits, Ranged, Tree, public
from imagestore.outside import decimal
from imagestore.store.open import open_backend, open_store
from imagestore.store.store import Store
from imagestore.units import size_text

log = logging.getLogger(__name__)
T = TypeVar("T")
_DISKS = {"disk.raw": "raw", "disk.qcow2": "qcow2"}
_ARCHIVES = ("incus.tar.xz", "lxd.tar.xz")
_OPEN_IMAGES = 16
_FIRST_BYTES, _BATCH_BYTES = 256 << 10, 1 << 20
_KERNEL_BYTES = 16 << 20
"""More than the kernel keeps for a client who does not read: who took so much gets large batches."""
_STREAMS_AHEAD = 12
"""While there are no more of them the cache of groups has room for what each will want next."""
_OPTIONS = "SF_MIRROR_OPTIONS"
_ROWS = 100  # images on one page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"
_SECURITY = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def make_app(store: Store, *, most_requests: int = 512, per_second: float = 0.0) -> Any:
    """The ASGI application."""
    app = FastAPI(title="sf mirror", docs_url=None, redoc_url=None, openapi_url=None)
    tree = Tree(store.backend)
    site = _Site(store)
    registry = CollectorRegistry()
    requests = Counter("sf_mirror_requests", "Requests by kind", ["kind"], registry=registry)

    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/livez")
    async def livez() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @get("/")
    async def index(request: Request, q: str = "", page: str = "1") -> HTMLResponse:
        return await site.index(str(request.base_url), q[:100], decimal(page) or 1)

    @get("/streams/v1/index.json")
    async def streams() -> JSONResponse:
        return JSONResponse(streams_index(await site.run(site.catalog.images)))

    @get("/streams/v1/images.json")
    async def streams_products() -> JSONResponse:
        known = site.catalog
        return JSONResponse(await site.run(lambda: streams_images(known.images(), known.manifest)))

    @get("/images/{name}/{tag}/{arch}/")
    async def page(request: Request, name: str, tag: str, arch: str) -> HTMLResponse:
        return await site.page(str(request.base_url), await site.find(name, tag, arch))

    @get("/images/{name}/{tag}/{arch}/{file}")
    async def file(name: str, tag: str, arch: str, file: str) -> Response:
        return await site.file(await site.find(name, tag, arch), file)

    @app.exception_handler(StoreError)
    async def failed(request: Request, error: Exception) -> PlainTextResponse:
        status = 404 if isinstance(error, NotFound) else 503
        if status == 503:
            log.error("%s: %s", request.url.path, error)
        return PlainTextResponse(f"{error if status == 404 else 'the store did not give it'}\n", status)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        """The tree without a framework in its way: it is what other machines ask for thousands of times."""
        is_tree = scope["type"] == "http" and public(scope["path"]) is not None
        if scope["type"] == "http":
            requests.labels("tree" if is_tree else "site").inc()
        await (tree(scope, receive, send) if is_tree else app(scope, receive, send))

    return Limits(dispatch, most=most_requests, per_second=per_second)


class _Site:
    """Pages and whole disks. The catalog is read by one thread at a time, images by a pool."""

    def __init__(self, store: Store) -> None:
        self.catalog = Catalog(store)
        self._store = store
        self._one = ThreadPoolExecutor(1, "sf-catalog")
        cache, pool = GroupCache(), ThreadPoolExecutor(4, "sf-content")
        self._content = lru_cache(_OPEN_IMAGES)(lambda digest: Content(store, digest, cache, pool))
        self._environment = Environment(loader=PackageLoader("imagestore.mirror"), autoescape=True)
        self._environment.filters["bytes"] = size_text
        self._environment.filters["date"] = lambda at_s: time.strftime("%Y-%m-%d %H:%M", time.gmtime(at_s))

    async def run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._one, function)

    async def find(self, name: str, tag: str, arch: str) -> Image:
        return await self.run(lambda: self.catalog.find(name, tag, arch))

    def _render(self, template: str, base: str, signer: Digest | None, **values: Any) -> HTMLResponse:
        values |= {"base": base, "root": "/", "nonce": (nonce := secrets.token_urlsafe(16))}
        values["signed"] = f"--fingerprint {signer}" if signer else "--unsigned"
        policy = f"{_POLICY}; script-src 'nonce-{nonce}'"
        headers = _SECURITY | {"cache-control": "no-cache", "content-security-policy": policy}
        return HTMLResponse(self._environment.get_template(template).render(values), headers=headers)

    async def index(self, base: str, query: str, number: int) -> HTMLResponse:
        images = await self.run(self.catalog.images)
        words = query.lower().split()

        def matches(image: Image) -> bool:
            about = f"{image.name}:{image.tag} {image.arch} {image.os} {image.digest}".lower()
            return all(word in about for word in words)

        found = list(filter(matches, images))
        signer = next((image.signer for image in images), None)
        pages = max(1, -(-len(found) // _ROWS))
        number = min(number, pages)
        shown = found[(number - 1) * _ROWS : number * _ROWS]
        values = {"total": len(images), "query": query, "pages": pages, "number_now": number}
        return self._render("index.html", base, signer, images=shown, **values)

    async def page(self, base: str, image: Image) -> HTMLResponse:
        def read() -> tuple[Any, ...]:
            manifest = self.catalog.manifest(image.digest)
            sums = image.sums
            files = [
                ("disk.qcow2", plan(manifest).size_bytes, sums.qcow2 if sums else ""),
                ("disk.raw", manifest.size_bytes, sums.raw if sums else ""),
            ]
            return files, self.catalog.history(image), read_provenance(self._store, image.digest)

        files, steps, provenance = await self.run(read)
        values = {"image": image, "files": files, "steps": steps, "provenance": provenance}
        return self._render("image.html", base, image.signer, **values)

    async def file(self, image: Image, file: str) -> Response:
        sums = image.sums
        if file == "SHA256SUMS" and sums:
            return PlainTextResponse(f"{sums.qcow2}  disk.qcow2\n{sums.raw}  disk.raw\n")
        if file in _ARCHIVES and sums:
            at_s = sums.created_s
            data = await self.run(lambda: simplestreams_archive(self.catalog.manifest(image.digest), at_s))
            return Response(data, media_type="application/x-xz")
        if file not in _DISKS:
            raise NotFound(f"no file {quote(file[:80])} of {image.name}:{image.tag}")
        content = await self.run(lambda: self._content(image.digest))
        etag = f"{image.digest.hex()}.{_DISKS[file]}.{WRITER}"
        modified_s = sums.created_s if sums else 0.0
        about = content.size_bytes(_DISKS[file]), etag, modified_s, "no-cache"
        read = partial(_read_disk, content, _DISKS[file])
        return _Disk(*about, read, lambda done: _BATCH_BYTES if done >= _KERNEL_BYTES else _FIRST_BYTES)


class _Disk(Ranged):
    """A whole disk: these are counted apart from packs, for whose clients nothing is read ahead."""

    running = 0


async def _read_disk(content: Content, format_: str, start: int, length: int, after: int) -> bytes:
    """In a thread, chunks together: a hop for each would cost more than the chunk. For slow clients none ahead."""
    ahead = AHEAD if _Disk.running <= _STREAMS_AHEAD and after else 0
    return await asyncio.to_thread(lambda: b"".join(content.read(format_, start, length, ahead)))


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. `upstream`: be a cache of that mirror, in `keep`, of `keep_bytes`; else `store` is served."""

    store: str
    upstream: str = ""
    keep: str = ""
    keep_bytes: int = 0
    most_requests: int = 512
    per_second: float = 0.0


def app_of(options: Options) -> Any:
    """Opens what is to be served. Raises StoreError, Denied for a private store."""
    if options.upstream:
        upstream = open_backend(options.upstream.partition("#")[0])
        store = Store.open(PullThrough(upstream, Path(options.keep), options.keep_bytes))
    else:
        store = open_store(options.store)
    store.check_public()
    return make_app(store, most_requests=options.most_requests, per_second=options.per_second)


def worker() -> Any:
    """The application of one worker process, which knows its options by the environment."""
    return app_of(Options(**json.loads(os.environ[_OPTIONS])))


def check_free(host: str, port: int) -> None:
    """Raises Conflict for a port that is taken, Invalid for an address that is not ours, Denied."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        kind_of_error = {errno.EADDRINUSE: Conflict, errno.EACCES: Denied}.get(error.errno or 0, Invalid)
        raise kind_of_error(f"cannot serve at {host} port {port}: {error.strerror}") from error


def serve(options: Options, host: str, port: int, workers: int) -> None:
    """Run until interrupted. A pull-through has one worker: only there is each frame fetched once."""
    import uvicorn

    raise_limits()
    app_of(options)  # what is wrong is said here, not by each worker
    check_free(host, port)
    os.environ[_OPTIONS] = json.dumps(asdict(options))
    uvicorn.run(
        "imagestore.mirror.serve:worker",
        factory=True,
        workers=1 if options.upstream else workers,
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=30,
        **settings(),
    )
