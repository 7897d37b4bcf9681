"""/artifacts: the names of the image stores, and what namespaces keep, as artifacts of type image."""

import time
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
from compute.cluster.images.snapshots import remove
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.snapshots import Backup, Snapshot, snapshots_of, take
from compute.cluster.records.transaction import Transaction
from compute.errors import Invalid, NotFound
from compute.wire.codec import to_plain
from imagestore import NotFound as NoName

router = APIRouter(tags=["artifacts"], route_class=StoreRoute)


class ListBody(NamespaceBody):
    node: str | None = None


class ImageBody(Body):
    image: str


class RuleBody(Body):
    every: float = Field(ge=300, le=366 * 86400)
    daily: int = Field(default=0, ge=0, le=3660)
    weekly: int = Field(default=0, ge=0, le=520)
    monthly: int = Field(default=0, ge=0, le=120)
    store: str = Field(default="", max_length=1000)


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
    ctx.act(lambda txn: txn.purge(known))
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


@router.post("/instances/{ref}/restore")
def restore(ctx: Ctx, ref: str, body: ImageBody) -> Response:
    """Give an instance the disks of a snapshot of it, or its first disk an image; what it has is kept first."""
    instance = ctx.find(Instance, ref)
    found = ctx.images(instance.namespace).resolve(body.image, ctx.services.config.architecture)
    whole, first = dict[str, tuple[str, str]](), instance.disks[0].device
    for one in snapshots_of(ctx.read(), instance.uuid):
        if str(found.digest) in one.order.digests.values() and not whole:
            whole = {d: (digest, one.namespace) for d, digest in one.order.digests.items()}
    whole = whole or {first: (str(found.digest), found.namespace)}

    def change(txn: Transaction, uuid: str) -> Snapshot:
        disks = [
            (disk, *whole.get(disk.device, (disk.image, disk.store)))
            for disk in txn.get(Instance, uuid).disks
        ]
        if disks[0][0].size_bytes < found.size_bytes:
            raise Invalid(
                f"{body.image} has {found.size_bytes} bytes, the disk less", hint="sf instance set --disk"
            )
        then = tuple(
            replace(d, image=i, store=s, image_name=body.image if d.image != i else d.image_name)
            for d, i, s in disks
        )
        return take(txn, uuid, then)

    return JSONResponse(views.snapshot(ctx.change(instance, change)))


@router.get("/backups")
def list_rules(ctx: Ctx) -> Response:
    """Which instances are backed up by themselves, and how that goes."""
    names = {instance.uuid: instance.name for instance in ctx.read().list(Instance)}
    return JSONResponse([to_plain(r) | {"name": names.get(r.uuid, "")} for r in ctx.listed(Backup, None)])


@router.put("/instances/{ref}/backup")
def set_rule(ctx: Ctx, ref: str, body: RuleBody) -> Response:
    """The first is due at once. Another store is opened with the server's keys, so the administrator names it."""
    instance = ctx.find(Instance, ref)
    if body.store:
        ctx.admin()
    new = Backup(uuid=instance.uuid, namespace=instance.namespace, every_s=0, due_s=0)
    keep = body.model_dump(include={"daily", "weekly", "monthly"})
    rule = ctx.read().find(Backup, instance.uuid) or new
    rule = replace(rule, every_s=body.every, due_s=time.time(), keep=keep, store=body.store)
    ctx.act(lambda txn: txn.update(rule))
    return JSONResponse(to_plain(rule) | {"name": instance.name})


@router.delete("/instances/{ref}/backup")
def unset_rule(ctx: Ctx, ref: str) -> Response:
    ctx.change(ctx.find(Instance, ref), lambda txn, uuid: txn.delete(Backup, uuid))
    return JSONResponse(None)


@router.post("/instances/{ref}/backup")
def run_backup(ctx: Ctx, ref: str) -> Response:
    made = ctx.change(ctx.find(Instance, ref), lambda txn, uuid: take(txn, uuid, backup=True))
    return JSONResponse(views.snapshot(made))


@router.delete("/instances/{ref}/snapshot/{tag}")
def delete_snapshot(ctx: Ctx, ref: str, tag: str) -> Response:
    read, instance = ctx.read(), ctx.find(Instance, ref)
    one = next((one for one in snapshots_of(read, instance.uuid) if one.tag == tag), None)
    if one is None:
        raise NotFound(f"no snapshot {tag[:80]}", hint=f"see: sf instance snapshots {instance.name}")
    rule = read.find(Backup, instance.uuid)
    remove(ctx.store, ctx.services.namespaces, one, rule.store if rule and one.backup else "")
    return JSONResponse(None)
