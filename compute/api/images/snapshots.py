"""Snapshots of instances: given back, deleted, and taken by a rule as backups. One is asked for in `instances`."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Admin, Body, Ctx, Guest, StoreRoute
from compute.cluster.images.snapshots import remove
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.snapshots import Backup, Snapshot, snapshots_of, take
from compute.cluster.records.transaction import Transaction
from compute.cluster.scheduler import destination, unreadable
from compute.errors import Invalid, NotFound, Unavailable
from compute.wire.codec import to_plain
from compute.wire.spec import Power

router = APIRouter(tags=["snapshots"], route_class=StoreRoute)


class ImageBody(Body):
    image: str


class MoveBody(Body):
    placed_on: str = ""
    timeout_s: int = Field(default=60, ge=0, le=86400)
    """How long the guest is asked to end before its power is taken, where it does not move while it runs."""
    live: bool = True


class RuleBody(Body):
    every: float = Field(ge=300, le=366 * 86400)
    daily: int = Field(default=0, ge=0, le=3660)
    weekly: int = Field(default=0, ge=0, le=520)
    monthly: int = Field(default=0, ge=0, le=120)
    store: str = Field(default="", max_length=1000)


@router.post("/instances/{ref}/restore")
def restore(ctx: Ctx, instance: Guest, body: ImageBody) -> Response:
    """Give an instance the disks of a snapshot of it, or its first disk an image; what it has is kept first."""
    found = ctx.images(instance.namespace).resolve(body.image, ctx.services.config.architecture)
    whole, first = dict[str, tuple[str, str]](), instance.disks[0].device
    for one in snapshots_of(ctx.read(), instance.uuid):
        if str(found.digest) in one.order.digests.values() and not whole:
            whole = {d: (digest, one.namespace) for d, digest in one.order.digests.items()}
    whole = whole or {first: (str(found.digest), found.namespace)}

    def change(txn: Transaction, uuid: str) -> Snapshot:
        disks = txn.get(Instance, uuid).disks
        if disks[0].size_bytes < found.size_bytes:
            why = f"{body.image} has {found.size_bytes} bytes, the disk less"
            raise Invalid(why, hint="sf instance set --disk")
        now = ((disk, *whole.get(disk.device, (disk.image, disk.store))) for disk in disks)
        then = tuple(
            replace(d, image=i, store=s, image_name=body.image if d.image != i else d.image_name)
            for d, i, s in now
        )
        return take(txn, uuid, then)

    return JSONResponse(views.snapshot(ctx.change(instance, change)))


@router.post("/instances/{ref}/migrate")
def migrate(ctx: Admin, ref: str, body: MoveBody) -> Response:
    """Move an instance to the node named, or to the best other; the administrator's: while it runs, where it can be.

    Else (`live` false, it is off, the nodes are unlike: its events say why) it is asked to end, its disks are stored as
    a snapshot, the other node starts it with these. This one is gone from the list of snapshots once the instance is
    the other node's, and stays in state error where it was not moved.
    """
    instance, controller, config = ctx.find(Instance, ref), ctx.services.controller, ctx.services.config
    if why := controller.nodes.usable().get(instance.node):
        raise Unavailable(f"node {instance.node} {why}", hint="it is to store the disks")
    images = {disk.image for disk in instance.disks if disk.cdrom and not disk.store}
    closed = unreadable(ctx.services.resolver.stores, ctx.read().list(Node), images, controller.server)
    seen: dict[str, Any] = {"limits": config, "used": controller.usage.of}

    def change(txn: Transaction, uuid: str) -> Snapshot:
        to = destination(txn, uuid, body.placed_on, usable=lambda: controller.nodes.usable() | closed, **seen)
        if (found := txn.get(Instance, uuid)).power != Power.OFF:
            txn.update(replace(found, grace_s=body.timeout_s))
        facts = [facts_of(txn.get(Node, name)) for name in (found.node, to)]
        live = body.live and found.power_state in ("on", "paused") and all(one and one.live for one in facts)
        return take(txn, uuid, to=to, running=live)

    return JSONResponse(views.snapshot(ctx.change(instance, change)))


@router.get("/backups")
def list_rules(ctx: Ctx) -> Response:
    """Which instances are backed up by themselves, and how that goes."""
    names = {instance.uuid: instance.name for instance in ctx.read().list(Instance)}
    return JSONResponse([to_plain(r) | {"name": names.get(r.uuid, "")} for r in ctx.listed(Backup, None)])


@router.put("/instances/{ref}/backup")
def set_rule(ctx: Ctx, instance: Guest, body: RuleBody) -> Response:
    """The first is due at once. Another store is opened with the server's keys, so the administrator names it."""
    if body.store:
        ctx.admin()
    keep = body.model_dump(include={"daily", "weekly", "monthly"})
    said: Any = {"every_s": body.every, "due_s": time.time(), "keep": keep, "store": body.store}

    def change(txn: Transaction, uuid: str) -> Backup:
        known = txn.find(Backup, uuid) or Backup(uuid=uuid, namespace=instance.namespace, **said)
        return txn.update(replace(known, **said))

    return JSONResponse(to_plain(ctx.change(instance, change)) | {"name": instance.name})


@router.delete("/instances/{ref}/backup")
def unset_rule(ctx: Ctx, instance: Guest) -> Response:
    return JSONResponse(ctx.change(instance, lambda txn, uuid: txn.delete(Backup, uuid)))


@router.post("/instances/{ref}/backup")
def run_backup(ctx: Ctx, instance: Guest) -> Response:
    return JSONResponse(views.snapshot(ctx.change(instance, partial(take, backup=True))))


@router.delete("/instances/{ref}/snapshot/{tag}")
def delete_snapshot(ctx: Ctx, instance: Guest, tag: str) -> Response:
    one = next((one for one in snapshots_of(ctx.read(), instance.uuid) if one.tag == tag), None)
    if one is None:
        raise NotFound(f"no snapshot {tag[:80]}", hint=f"see: sf instance snapshots {instance.name}")
    rule = ctx.read().find(Backup, instance.uuid)
    remove(ctx.store, ctx.services.namespaces, one, rule.store if rule and one.backup else "")
    return JSONResponse(None)
