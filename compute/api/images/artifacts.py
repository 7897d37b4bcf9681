"""/artifacts: names of the image stores, and what namespaces keep; /blobs: their versions, byte for byte; /label: names
that point to one; /upload: files that come in pieces, to be kept."""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from compute.api import views
from compute.api.context import Admin, Body, Ctx, DeleteAllBody, NamespaceBody, StoreRoute, ask_stores
from compute.api.edge import SLASH
from compute.api.history import add_events, add_metadata
from compute.api.images.stores import received, reserve
from compute.cluster.images import artifacts as acts
from compute.cluster.images.artifacts import BLOB, Artifact, Blob, blob_of, want
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.transaction import check_name, new_uuid, pieces
from compute.errors import Invalid, NoCapacity, NotFound
from imagestore import Digest, decimal, push
from imagestore import NotFound as NoName
from imagestore.mirror import Content, GroupCache

router = APIRouter(tags=["artifacts"], route_class=StoreRoute)

_MOST, _COUNTING, _READERS = 16, threading.Lock(), ThreadPoolExecutor(4, "sf-blobs")
_GROUPS = GroupCache(32 << 20)
Place = Annotated[int, Query(ge=0, le=1 << 60)]


class ListBody(NamespaceBody):
    node: str | None = None


class UrlBody(NamespaceBody):
    url: str
    shared: bool = False


class BlobBody(Body):
    blob_uuid: str


class KeepBody(NamespaceBody):
    upload_uuid: str | None = None
    blob_uuid: str | None = None
    source_url: str | None = Field(default=None, pattern="^https?://", max_length=2000)
    shared: bool = False
    artifact_type: Literal["image", "other"] = "image"


class VersionsBody(Body):
    max_versions: int = Field(ge=1, le=100)


def _find(ctx: Ctx, ref: str) -> Artifact:
    return acts.find(ctx.artifacts(), ref, ctx.caller.namespace)


def _record(ctx: Ctx, ref: str) -> Artifact:
    """To be changed by whose it is; of a store's name, by the administrator, what users have added to it."""
    found = _find(ctx, ref)
    if ctx.request.method != "GET" and (found.store_url or not ctx.caller.may(found.namespace)):
        ctx.admin()
    return ctx.read().find(Artifact, found.uuid) or Artifact(uuid=found.uuid)


def show(ctx: Ctx, *found: Artifact) -> list[dict[str, Any]]:
    instances, nodes = [i for i in ctx.read().list(Instance) if ctx.sees(i)], ctx.read().list(Node)
    metadata = {a.uuid: a.metadata for a in ctx.read().list(Artifact)}
    return [views.artifact(one, metadata.get(one.uuid, {}), instances, nodes) for one in found]


@router.get("/artifacts")
def list_artifacts(ctx: Ctx, body: ListBody | None = None) -> Response:
    """Of one node: those that its cache holds. The stores' names are the namespace system's."""
    query = body or ListBody()
    facts = facts_of(ctx.read().get(Node, query.node)) if query.node else None
    held = set(facts.images if facts else ())
    found = [a for a in ctx.artifacts() if query.namespace in (None, a.namespace)]
    return JSONResponse(show(ctx, *(a for a in found if not query.node or held & set(a.digests))))


@router.post("/artifacts")
def fetch_artifact(ctx: Ctx, body: UrlBody) -> Response:
    """Fetch a URL and keep its disk, again if its server has another file. Poll `state`."""
    namespace = ctx.namespace(body.namespace)
    if not body.url.startswith(acts.WEB):
        return JSONResponse(show(ctx, _find(ctx, body.url))[0])
    acts.check_url(ctx.images(namespace), body.url)
    if body.shared:  # everybody sees it in their lists
        ctx.admin()
    more: dict[str, Any] = {"shared": True} if body.shared else {}
    return JSONResponse(show(ctx, ctx.act(lambda txn: want(txn, namespace, body.url, **more)))[0])


def _place(ctx: Ctx, uuid: str) -> Path:
    """The file of an upload, whose name nobody else knows. Raises NotFound."""
    path = ctx.services.config.state_dir / "uploads" / ctx.caller.namespace / uuid
    if len(uuid) != 36 or "/" in uuid or not path.is_file():
        raise NotFound(f"upload {uuid[:80]} not found", hint="it ends a day after its last piece")
    return path


@router.post("/upload")
def begin(ctx: Ctx) -> Response:
    """Then send pieces to /upload/UUID, and make an artifact of them."""
    path = ctx.services.config.state_dir / "uploads" / ctx.caller.namespace / (uuid := new_uuid())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _COUNTING:
        if len(list(path.parent.iterdir())) >= _MOST:
            raise NoCapacity(f"{_MOST} uploads are under way", hint="each ends a day after its last piece")
        path.touch(0o600)
    return JSONResponse({"uuid": uuid, "node": ctx.services.config.node_name, "created_at": time.time()})


@router.post("/upload/{uuid}")
async def append(ctx: Ctx, uuid: str) -> Response:
    """Raw bytes after those that are there. Answers with the size then; after an error, truncate to what is known."""
    services, namespace = ctx.services, (await ask_stores(_place, ctx, uuid)).parent.name
    store = await ask_stores(services.namespaces.of, namespace)
    await reserve(services, namespace, store, decimal(ctx.request.headers.get("content-length", "")) or 0)
    async with received(ctx.request, services) as piece:
        return JSONResponse(await ask_stores(_append, ctx, uuid, piece))


def _append(ctx: Ctx, uuid: str, piece: IO[bytes]) -> int:
    with _place(ctx, uuid).open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _place(ctx, uuid)  # it is nobody's yet, and others wait
        shutil.copyfileobj(piece, file, 1 << 20)
        os.fsync(file.fileno())
        return file.tell()


@router.post("/upload/{uuid}/truncate/{size}")
def truncate(ctx: Ctx, uuid: str, size: int) -> Response:
    """Forget what came after the first `size` bytes."""
    if not (path := _place(ctx, uuid)).stat().st_size >= size >= 0:
        raise Invalid(f"the upload has {path.stat().st_size} bytes")
    os.truncate(path, size)
    return JSONResponse(size)


@router.post("/artifacts/upload/{name}")
def keep(ctx: Ctx, name: str, body: KeepBody) -> Response:
    """An upload, or a blob that is there, as an artifact or its next version. Poll `state`."""
    namespace, path = ctx.namespace(body.namespace), body.upload_uuid and _place(ctx, body.upload_uuid)
    if bool(path) == bool(body.blob_uuid) or (path and not path.stat().st_size):
        raise Invalid("an artifact is made of an upload_uuid with bytes, or of a blob_uuid")
    if body.shared:  # everybody sees it in their lists
        ctx.admin()
    if path:
        size, sent = path.stat().st_size, f"{path.parent.name}/{path.name}"
        blob = Blob(namespace, size_bytes=size, upload=sent, made_s=time.time())
    else:
        blob = blob_of(ctx.artifacts(), f"{BLOB}{body.blob_uuid}")[1]
    check_name(name, "name")
    url = body.source_url or f"sf://upload/{namespace}/{name}"
    more: dict[str, Any] = {"artifact_type": body.artifact_type, **({"shared": True} if body.shared else {})}
    return JSONResponse(show(ctx, ctx.act(lambda txn: want(txn, namespace, url, blob, name=name, **more)))[0])


async def keep_file(ctx: Ctx, of: Instance, file: IO[bytes]) -> str:
    """A file's bytes as a blob, of which the newest 16 of an instance are kept: its uuid."""
    home, name, size = of.namespace, f"from-{of.name}", file.tell()
    store = await ask_stores(ctx.services.namespaces.of, home)
    await reserve(ctx.services, home, store, size)
    file.flush()
    done = await ask_stores(push, store, Path(file.name), None, format_="raw")
    blob = Blob(home, data=str(done.digest), size_bytes=size, made_s=time.time())
    more: dict[str, Any] = {"name": name, "artifact_type": "other", "max_versions": 16, "blob": blob}
    made = await ask_stores(ctx.act, lambda txn: want(txn, home, f"sf://upload/{home}/{name}", **more))
    return str(made.blobs[str(made.last)].uuid)


@router.delete("/artifacts")
def delete_artifacts(ctx: Ctx, body: DeleteAllBody) -> Response:
    """Every artifact that a namespace keeps; names of stores stay (`sf image rm`)."""
    namespace = ctx.emptied(body)
    doomed = [a for a in ctx.read().list(Artifact) if a.namespace == namespace]
    for one in doomed:
        _delete(ctx, one)
    return JSONResponse([one.uuid for one in doomed])


def _delete(ctx: Ctx, known: Artifact) -> None:
    if store := ctx.services.namespaces.find(known.namespace):
        with suppress(NoName):
            store.names.remove(known.uuid, "latest")  # first, since the record leads there
    pieces(ctx.store, lambda txn: txn.purge(known))


@router.get("/artifacts/{ref}")
def get_artifact(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(show(ctx, _find(ctx, ref))[0])


def _change(ctx: Ctx, ref: str, change: Callable[[Artifact], Artifact]) -> Response:
    """Of one that a namespace keeps."""
    known = _record(ctx, ref)
    if not known.namespace:
        raise Invalid(f"{ref[:80]} is a name of an image store", hint="sf image tag, sf image rm")

    changed = ctx.change(known, lambda txn, uuid: txn.update(change(txn.get(Artifact, uuid))))
    return JSONResponse(show(ctx, changed)[0])


@router.delete("/artifacts/{ref}")
def delete_artifact(ctx: Ctx, ref: str, body: NamespaceBody | None = None) -> Response:
    gone = _change(ctx, ref, lambda one: replace(one, state="deleted"))
    _delete(ctx, _record(ctx, ref))
    return gone


@router.post("/artifacts/{ref}/versions")
def set_versions(ctx: Ctx, ref: str, body: VersionsBody) -> Response:
    return _change(ctx, ref, lambda one: replace(one, max_versions=body.max_versions))


@router.delete("/artifacts/{ref}/versions/{index}")
def delete_version(ctx: Ctx, ref: str, index: str) -> Response:
    def without(one: Artifact) -> Artifact:
        if index not in one.blobs:
            raise NotFound(f"{ref[:80]} has no version {index[:20]}")
        return replace(one, blobs={n: blob for n, blob in one.blobs.items() if n != index})

    return _change(ctx, ref, without)


@router.post("/artifacts/{ref}/share")
@router.post("/artifacts/{ref}/unshare")
def share(ctx: Admin, ref: str) -> Response:
    """With everybody, whose lists it is in from then on."""
    return _change(ctx, ref, lambda one: replace(one, shared=ctx.request.url.path.endswith("/share")))


@router.get("/artifacts/{ref}/versions")
def get_versions(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(list(show(ctx, _find(ctx, ref))[0]["blobs"].values()))


def _views(ctx: Ctx, *among: Artifact) -> dict[str, dict[str, Any]]:  # of their blobs, by uuid
    return {view["uuid"]: view for one in show(ctx, *among) for view in one["blobs"].values()}


@router.get("/blobs")
def list_blobs(ctx: Admin, body: ListBody | None = None) -> Response:
    """Of one node: those that its cache holds."""
    node, found = (body.node if body else None), _views(ctx, *ctx.artifacts()).values()
    return JSONResponse([view for view in found if node in (None, *view["locations"])])


@router.get("/blobs/{ref}")
def get_blob(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(_views(ctx, blob_of(ctx.artifacts(), BLOB + ref)[0])[ref])


@router.get("/blobs/{ref}/data")
def get_data(ctx: Ctx, ref: str, offset: Place = 0, limit: Place = 0) -> StreamingResponse:
    """The bytes from `offset` on, at most `limit`."""
    blob, services = blob_of(ctx.artifacts(), BLOB + ref)[1], ctx.services
    digest = Digest.parse(blob.data or blob.disk)
    own = {"": services.namespaces.of(blob.namespace)} if blob.namespace else services.resolver.stores
    if (store := next((store for store in own.values() if store.has_manifest(digest)), None)) is None:
        raise NotFound(f"blob {ref[:80]} is in no store")
    content = Content(store, digest, _GROUPS, _READERS)
    size = max(0, min(limit or 1 << 60, content.size_bytes("raw") - offset))
    pieces = content.read("raw", offset, size, 2)

    async def body() -> AsyncIterator[bytes]:
        while piece := await ask_stores(next, pieces, b""):
            yield bytes(piece)
            await ask_stores(ctx.look_again)

    return StreamingResponse(body(), 200, {"content-length": str(size)}, "application/octet-stream")


@router.get("/blob_checksums/{algorithm}/{checksum}")
def find_blob(ctx: Ctx, algorithm: Literal["sha256", "sha512"], checksum: str) -> Response:
    """One that was uploaded and that the caller sees, or null."""
    every = _views(ctx, *ctx.artifacts()).values()
    return JSONResponse(next((view for view in every if view.get(algorithm) == checksum.lower()), None))


@router.get("/label/{called:path}")
@router.post("/label/{called:path}")
@router.delete("/label/{called:path}")
def label(ctx: Ctx, called: str, body: BlobBody | None = None) -> Response:
    """[NAMESPACE/]NAME: point it to a blob, the former ones stay as versions; show it; delete it."""
    home, _, name = called.replace(SLASH, "/").rpartition("/")
    home = home or ctx.caller.namespace
    url = f"sf://label/{home}/{check_name(name, 'label')}"
    if ctx.request.method == "DELETE":
        return delete_artifact(ctx, url)
    if ctx.request.method == "POST" and body:
        space, blob = ctx.namespace(home), blob_of(ctx.artifacts(), BLOB + body.blob_uuid)[1]
        ctx.act(lambda txn: want(txn, space, url, blob, name=name, artifact_type="label"))
    return get_artifact(ctx, url)


add_metadata(router, "/artifacts/{ref}", _record)
add_events(router, "/artifacts/{ref}", _record)
add_events(router, "/blobs/{ref}", lambda ctx, ref: blob_of(ctx.artifacts(), BLOB + ref)[0])
