"""/artifacts: the names of the image stores, and what namespaces keep, as artifacts of type image."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Body, Context, Ctx, DeleteAllBody, NamespaceBody, StoreRoute
from compute.api.history import add_events, add_metadata
from compute.cluster.images import artifacts as acts
from compute.cluster.images.artifacts import Artifact
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.transaction import Transaction, pieces
from compute.errors import Invalid, NotFound
from imagestore import NotFound as NoName

router = APIRouter(tags=["artifacts"], route_class=StoreRoute)


class ListBody(NamespaceBody):
    node: str | None = None


class UrlBody(NamespaceBody):
    url: str
    shared: bool = False


class VersionsBody(Body):
    max_versions: int = Field(ge=1, le=100)


def _find(ctx: Context, ref: str) -> Artifact:
    return acts.find(ctx.artifacts(), ref, ctx.caller.namespace)


def _record(ctx: Context, ref: str) -> Artifact:
    """To be changed by whose it is; of a store's name, by the administrator, what users have added to it."""
    found = _find(ctx, ref)
    if ctx.request.method != "GET" and (found.store_url or not ctx.sees(found)):
        ctx.admin()
    return ctx.read().find(Artifact, found.uuid) or Artifact(uuid=found.uuid)


def _show(ctx: Context, *found: Artifact) -> list[dict[str, Any]]:
    instances = [i for i in ctx.read().list(Instance) if ctx.sees(i)]
    metadata = {a.uuid: a.metadata for a in ctx.read().list(Artifact)}
    return [views.artifact(one, metadata.get(one.uuid, {}), instances) for one in found]


@router.get("/artifacts")
def list_artifacts(ctx: Ctx, body: ListBody | None = None) -> Response:
    """Of one node: those that its cache holds. The stores' names are the namespace system's."""
    query, held = body or ListBody(), set[str]()
    if query.node:
        facts = facts_of(ctx.read().get(Node, query.node))
        held = set(facts.images if facts else ())
    found = [a for a in ctx.artifacts() if query.namespace in (None, a.namespace)]
    return JSONResponse(_show(ctx, *(a for a in found if not query.node or held & set(a.digests))))


@router.post("/artifacts")
def fetch_artifact(ctx: Ctx, body: UrlBody) -> Response:
    """Fetch a URL and keep its disk, again if its server has another file. Poll `state`."""
    namespace = ctx.namespace(body.namespace)
    if not body.url.startswith(acts.WEB):
        return JSONResponse(_show(ctx, _find(ctx, body.url))[0])
    acts.check_url(ctx.images(namespace), body.url)
    if body.shared:  # everybody sees it in their lists
        ctx.admin()
    more = {"shared": True} if body.shared else {}
    made = ctx.act(lambda txn: acts.want(txn, namespace, body.url, **more))
    return JSONResponse(_show(ctx, made)[0])


@router.delete("/artifacts")
def delete_artifacts(ctx: Ctx, body: DeleteAllBody) -> Response:
    """Every artifact that a namespace keeps; names of stores stay (`sf image rm`)."""
    namespace = ctx.emptied(body)
    doomed = [a for a in ctx.read().list(Artifact) if a.namespace == namespace]
    for one in doomed:
        _delete(ctx, one)
    return JSONResponse([one.uuid for one in doomed])


def _delete(ctx: Context, known: Artifact) -> None:
    pieces(ctx.store, lambda txn: txn.purge(known))
    if store := ctx.services.namespaces.find(known.namespace):
        with suppress(NoName):
            store.names.remove(known.uuid, "latest")


@router.get("/artifacts/{ref}")
def get_artifact(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(_show(ctx, _find(ctx, ref))[0])


def _change(ctx: Context, ref: str, change: Callable[[Artifact], Artifact]) -> Response:
    """Of one that a namespace keeps."""
    known = _record(ctx, ref)
    if not known.namespace:
        raise Invalid(f"{ref[:80]} is a name of an image store", hint="sf image tag, sf image rm")

    def act(txn: Transaction, uuid: str) -> Artifact:
        txn.update(now := change(txn.get(Artifact, uuid)))
        return now

    return JSONResponse(_show(ctx, ctx.change(known, act))[0])


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
def share(ctx: Ctx, ref: str) -> Response:
    """With everybody, whose lists it is in from then on."""
    ctx.admin()
    return _change(ctx, ref, lambda one: replace(one, shared=ctx.request.url.path.endswith("/share")))


@router.get("/artifacts/{ref}/versions")
def get_versions(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(list(_show(ctx, _find(ctx, ref))[0]["blobs"].values()))


add_metadata(router, "/artifacts/{ref}", _record)
add_events(router, "/artifacts/{ref}", _record)
