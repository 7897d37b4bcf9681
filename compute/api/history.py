"""Metadata and events: the same routes under every kind of object, and the events of all that somebody sees."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from compute.api import views
from compute.api.context import Body, Context, Ctx
from compute.api.edge import Route
from compute.cluster.images.artifacts import Artifact
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.stored import Stored
from compute.cluster.records.transaction import Event, Transaction
from compute.cluster.state.protocol import Change, Record
from compute.errors import Compacted, Invalid, NotFound, Unauthenticated
from imagestore import decimal

router = APIRouter(tags=["events"], route_class=Route)

METADATA_BYTES = 2**16
_KEEPALIVE_S = 15.0

Lookup = Callable[[Context, str], Stored]


class Item(Body):
    key: str = Field(min_length=1, max_length=128)
    value: Any = None


class Value(Body):
    value: Any = None


class EventQuery(Body):
    event_type: str | None = None
    limit: int = Field(default=100, ge=1, le=Event.LIMIT + Event.TRIM)


def add_metadata(router: APIRouter, path: str, find: Lookup) -> None:
    """`GET, POST path/metadata`, `PUT, DELETE path/metadata/K`. `find` checks what the caller may see."""

    def change(ctx: Context, ref: str, key: str, edit: Callable[[dict[str, Any]], None]) -> Response:
        known = find(ctx, ref)

        def action(txn: Transaction) -> dict[str, Any]:
            item = txn.find(type(known), known.id) or known
            ctx.check_match(item)
            metadata = dict(item.metadata)  # type: ignore[attr-defined]
            edit(metadata)
            if len(json.dumps(metadata)) > METADATA_BYTES:
                raise Invalid(f"an object has at most {METADATA_BYTES} bytes of metadata")
            txn.update(replace(item, metadata=metadata))  # type: ignore[call-arg]
            txn.event(item.KIND, item.id, f"metadata {key} changed", type="audit")
            return metadata

        return JSONResponse(ctx.act(action))

    @router.get(f"{path}/metadata")
    def get_metadata(ctx: Ctx, ref: str) -> Response:
        item = find(ctx, ref)
        return ctx.show(item, item.metadata)  # type: ignore[attr-defined]

    @router.post(f"{path}/metadata")
    def add(ctx: Ctx, ref: str, body: Item) -> Response:
        return change(ctx, ref, body.key, lambda m: m.update({body.key: body.value}))

    @router.put(path + "/metadata/{key}")
    def put(ctx: Ctx, ref: str, key: str, body: Value) -> Response:
        return change(ctx, ref, key, lambda m: m.update({key: body.value}))

    @router.delete(path + "/metadata/{key}")
    def delete(ctx: Ctx, ref: str, key: str) -> Response:
        def edit(metadata: dict[str, Any]) -> None:
            if metadata.pop(key, edit) is edit:
                raise NotFound(f"there is no metadata key {key[:80]}")

        return change(ctx, ref, key, edit)


def add_events(router: APIRouter, path: str, find: Lookup) -> None:
    """`GET path/events`, newest first; `?follow=true`: server-sent events, oldest first, then those to come."""

    @router.get(f"{path}/events")
    def events(ctx: Ctx, ref: str, body: EventQuery | None = None, follow: bool = False) -> Response:
        item = find(ctx, ref)
        query = body or EventQuery()
        if follow:  # an artifact is everybody's: its store need not be asked again
            again = (lambda: item) if isinstance(item, Artifact) else partial(find, ctx, item.id)
            return _streamed(_stream(ctx, again, query))
        found = _read(ctx, item, query)
        return JSONResponse([views.event(e) for e in found])


def _streamed(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _read(ctx: Context, item: Stored, query: EventQuery, after: str = "") -> list[Event]:
    """Newest first. after: only those whose name sorts behind it."""
    found = Transaction(ctx.store).list(Event, f"{item.key}/")
    chosen = [e for e in found if query.event_type in (None, "", e.type) and e.name > after]
    return chosen[::-1][: query.limit]


async def _stream(ctx: Context, find: Callable[[], Stored], query: EventQuery) -> AsyncIterator[str]:
    """A reader that comes back says where it was by Last-Event-ID (the event's name).

    It ends with the caller's key, with the trust by which it was seen, and with the object.
    """
    feed = ctx.services.controller.feed
    after = ctx.request.headers.get("last-event-id", "")

    def read() -> list[Event]:
        ctx.look_again()
        return _read(ctx, find(), query, after)

    while not await ctx.request.is_disconnected():
        seen = feed.revision
        try:
            found = await run_in_threadpool(read)  # not the loop's own threads: leases are renewed there
        except (Unauthenticated, NotFound):
            return
        for event in reversed(found):
            after = event.name
            yield f"id: {event.name}\ndata: {json.dumps(views.event(event))}\n\n"
        if not await feed.moved((Event.KIND, Namespace.KIND), seen, _KEEPALIVE_S):
            yield ": still here\n\n"


_KINDS: dict[str, type[Stored]] = {kind.KIND: kind for kind in (Artifact, Instance, Network, Node)}
"""What has a history. A node's is everybody's, here as under /nodes."""


@router.get("/events")
def all_events(ctx: Ctx, body: EventQuery | None = None, follow: bool = False) -> Response:
    """Of all that the caller sees, newest first; `?follow=true`: server-sent events, those to come."""
    if follow:
        return _streamed(_follow(ctx))
    query, found = body or EventQuery(), list[dict[str, Any]]()
    newest = sorted(ctx.store.list(f"{Event.KIND}/"), key=lambda r: r.key.rpartition("/")[2], reverse=True)
    for view in _seen(ctx, newest):
        if len(found) == query.limit:
            break
        found += [view] if query.event_type in (None, "", view["type"]) else []
    return JSONResponse(found)


def _seen(ctx: Context, records: Iterable[Record | Change]) -> Iterator[dict[str, Any]]:
    """The events among them that the caller sees, with what each is about."""
    read = ctx.read()
    for record in records:
        _, kind, identity, _ = record.key.split("/")
        about: Any = read.find(_KINDS[kind], identity) if kind in _KINDS else None
        if (
            about
            and record.value
            and (kind == Node.KIND or getattr(about, "shared", False) or ctx.sees(about))
        ):
            what = {"object": kind, "uuid": about.uuid, "name": about.name}
            yield views.event(Event.decode(record.value, 0)) | what | {"revision": record.revision}


async def _follow(ctx: Context) -> AsyncIterator[str]:
    """A reader that comes back says where it was by Last-Event-ID (a revision); what is forgotten is passed over."""
    feed = ctx.services.controller.feed
    after = decimal(ctx.request.headers.get("last-event-id", "")) or feed.revision

    def read() -> list[dict[str, Any]]:
        ctx.look_again()
        try:
            return list(_seen(ctx, ctx.store.watch(f"{Event.KIND}/", after, 0)))
        except Compacted:
            return []

    while not await ctx.request.is_disconnected():
        seen = feed.revision
        try:
            found = await run_in_threadpool(read)
        except Unauthenticated:
            return
        for event in found:
            yield f"id: {event['revision']}\ndata: {json.dumps(event)}\n\n"
        after = max(seen, *(event["revision"] for event in found), 0)
        if not await feed.moved((Event.KIND, Namespace.KIND), seen, _KEEPALIVE_S):
            yield ": still here\n\n"
