"""/artifacts: the names of the image stores, as artifacts of type image."""

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from compute.api import views
from compute.api.context import Body, Context, Ctx, DeleteAllBody, StoreRoute
from compute.api.history import add_events, add_metadata
from compute.cluster.images.artifacts import Artifact, NamedImage, find_image, named_images
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, facts_of

router = APIRouter(tags=["artifacts"], route_class=StoreRoute)


class ListBody(Body):
    node: str | None = None
    namespace: str | None = None


def _find(ctx: Context, ref: str) -> Artifact:
    if ctx.request.method != "GET":
        ctx.admin()
    uuid = find_image(ctx.services.resolver.stores.values(), ref).uuid
    return ctx.read().find(Artifact, uuid) or Artifact(uuid=uuid)


def _viewer(ctx: Context) -> Callable[[NamedImage], dict[str, object]]:
    read = ctx.read()
    instances = [i for i in read.list(Instance) if ctx.sees(i)]
    metadata = {a.uuid: a.metadata for a in read.list(Artifact)}
    return lambda image: views.artifact(image, metadata.get(image.uuid, {}), instances)


@router.get("/artifacts")
def list_artifacts(ctx: Ctx, body: ListBody | None = None) -> Response:
    """Of one node: those that its cache holds. They are the namespace system's, whatever their store."""
    view, query, held = _viewer(ctx), body or ListBody(), set[str]()
    if query.namespace not in (None, "system"):
        return JSONResponse([])
    if query.node:
        facts = facts_of(ctx.read().get(Node, query.node))
        held = set(facts.images if facts else ())
    found = named_images(ctx.services.resolver.stores.values())
    return JSONResponse([view(i) for i in found if not query.node or held & set(i.digests)])


@router.delete("/artifacts")
def delete_artifacts(ctx: Ctx, body: DeleteAllBody) -> Response:
    """Every artifact of a namespace: it has none of its own, names belong to their store (`sf image rm`)."""
    ctx.emptied(body)
    return JSONResponse([])


@router.get("/artifacts/{ref}")
def get_artifact(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(_viewer(ctx)(find_image(ctx.services.resolver.stores.values(), ref)))


@router.get("/artifacts/{ref}/versions")
def get_versions(ctx: Ctx, ref: str) -> Response:
    blobs = _viewer(ctx)(find_image(ctx.services.resolver.stores.values(), ref))["blobs"]
    return JSONResponse(blobs)


add_metadata(router, "/artifacts/{ref}", _find)
add_events(router, "/artifacts/{ref}", _find)
