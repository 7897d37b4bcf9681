"""Metadata and events: the same routes under every kind of object, and the events of all that somebody sees."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
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
from compute.cluster.records.transaction import Event, Stored, Transaction, check_metadata
from compute.cluster.state.protocol import Change
from compute.errors import Compacted, NotFound, Unauthenticated, Unavailable
from imagestore import decimal

router = APIRouter(tags=["events"], route_class=Route)

_KEEPALIVE_S = 15.0
_MOST_OF_ONE, _MOST = 512, 2048
_USED = {("instance", "usage"), ("node", "resources")}
_followed: Counter[str] = Counter()  # streams of events, by namespace; each change has every one of them look
Lookup = Callable[[Context, str], Stored]
Json = views.Json
Tell = Callable[[Iterable[Change]], Iterable[tuple[str, Json]]]


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
            # What users add to a name of a store has no record at first; all else is there, or was deleted meanwhile.
            item = (
                txn.get(type(known), known.id) if known.revision else txn.find(type(known), known.id) or known
            )
            ctx.check_match(item)
            metadata = dict(item.metadata)  # type: ignore[attr-defined]
            edit(metadata)
            check_metadata(metadata)
            txn.update(replace(item, metadata=metadata))  # type: ignore[call-arg]
            txn.event(item.KIND, item.id, f"metadata {key} changed", type="audit")
            return metadata

        return JSONResponse(ctx.act(action))

    @router.get(f"{path}/metadata")
    def get_metadata(ctx: Ctx, ref: str) -> Response:
        return ctx.show(find(ctx, ref), lambda item: item.metadata)  # type: ignore[attr-defined]

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
        item, query = find(ctx, ref), body or EventQuery()
        if not follow:
            return JSONResponse([views.event(e) for e in _read(ctx, item, query)])

        def tell(records: Iterable[Change]) -> list[tuple[str, Json]]:
            _check(ctx, find, item)
            if (item.KIND, query.event_type) in _USED:
                return [("", views.event(event)) for event in _read(ctx, item, query)]
            told = [(str(r.revision), views.event(Event.decode(r.value, 0))) for r in records if r.value]
            return [one for one in told if query.event_type in (None, "", one[1]["type"])][-query.limit :]

        return _streamed(ctx, f"{item.key}/", tell)


def _check(ctx: Context, find: Lookup, item: Stored) -> None:
    """Raises NotFound once it is gone, or not the caller's to see. What a store has is everybody's: it is not asked."""
    if not isinstance(item, Artifact):
        find(ctx, item.id)
    elif item.namespace and not item.store_url and not ctx.sees(ctx.read().get(Artifact, item.uuid)):
        raise NotFound(f"artifact {item.uuid} not found")


def _read(ctx: Context, item: Stored, query: EventQuery) -> list[Event]:
    """Newest first. What is used has no history: it is made here."""
    if (item.KIND, query.event_type) in _USED:
        used: Any = ctx.services.controller.usage.of(item)  # type: ignore[arg-type]
        about: Any = {"type": query.event_type, "message": query.event_type, "extra": used}
        return [Event(name="", timestamp_s=time.time(), **about)] if used else []
    found = Transaction(ctx.store).list(Event, f"{item.key}/")
    return [e for e in found if query.event_type in (None, "", e.type)][::-1][: query.limit]


def _streamed(ctx: Context, under: str, tell: Tell, after: int = 0) -> Response:
    """Events of what is `under` there, as `tell` has them; revisions are where a reader was (`after`, if it is new).

    Raises Unavailable for the one too many.
    """
    if _followed[ctx.caller.namespace] >= _MOST_OF_ONE or _followed.total() >= _MOST:
        raise Unavailable("too many follow events at this moment", hint="end some")
    feed, prefix = ctx.services.controller.feed, f"{Event.KIND}/{under}"
    after = decimal(ctx.request.headers.get("last-event-id", "")) or after

    def read() -> list[tuple[str, Json]]:
        nonlocal after
        seen, changes, at, listed = feed.revision, list[Change](), after, bool(under)
        try:
            while not listed and (more := ctx.store.watch(prefix, at, 0)):
                changes, at = [*changes, *more], more[-1].revision  # there may be more than came at once
        except Compacted:  # also by a restart; the events themselves are there
            listed = True
        if listed:  # one object's are few, and etcd takes 0.2 s of a thread to say that nothing is new
            there = (r for r in ctx.store.list(prefix) if r.revision > after)
            changes = sorted(there, key=lambda r: r.revision)
        after = max(seen, changes[-1].revision if changes else 0)
        return list(tell(changes))

    head = {"Cache-Control": "no-store"}
    return StreamingResponse(_sent(ctx, read), media_type="text/event-stream", headers=head)


async def _sent(ctx: Context, read: Callable[[], list[tuple[str, Json]]]) -> AsyncIterator[str]:
    """What `read` finds anew, each after its mark (Last-Event-ID), until its key or trust ends."""
    feed, whose = ctx.services.controller.feed, ctx.caller.namespace
    _followed[whose] += 1
    try:
        while not await ctx.request.is_disconnected():
            seen = feed.revision
            await run_in_threadpool(ctx.look_again)  # not the loop's own threads: leases are renewed there
            for mark, view in await run_in_threadpool(read):
                yield f"id: {mark}\ndata: {json.dumps(view)}\n\n"
            if not await feed.moved((Event.KIND, Namespace.KIND), seen, _KEEPALIVE_S):
                yield ": still here\n\n"
    except (Unauthenticated, NotFound):
        return
    finally:
        _followed[whose] -= 1


_KINDS: dict[str, type[Stored]] = {kind.KIND: kind for kind in (Artifact, Instance, Network, Node)}
"""What has a history; a node's is everybody's."""


@router.get("/events")
def all_events(ctx: Ctx, body: EventQuery | None = None, follow: bool = False) -> Response:
    """Of all that the caller sees, newest first; `?follow=true`: server-sent events, those to come."""
    if follow:
        return _streamed(ctx, "", partial(_seen, ctx), ctx.services.controller.feed.revision)
    query, keys = body or EventQuery(), lambda record: record.key.rpartition("/")[2]
    own = [one for kind in _KINDS.values() for one in ctx.read().list(kind) if kind is Node or ctx.sees(one)]
    records = [record for one in own for record in ctx.store.list(f"{Event.KIND}/{one.key}/")]
    every = _seen(ctx, sorted(records, key=keys, reverse=True))
    wanted = (view for _, view in every if query.event_type in (None, "", view["type"]))
    return JSONResponse(list(islice(wanted, query.limit)))


def _seen(ctx: Context, records: Iterable[Change]) -> Iterator[tuple[str, Json]]:
    """The events among them that the caller sees, with what each is about."""
    read = ctx.read()
    for record in records:
        _, kind, identity, _ = record.key.split("/")
        about: Any = read.find(_KINDS[kind], identity) if kind in _KINDS else None
        if not about or not record.value:
            continue
        if kind == Node.KIND or ctx.sees(about):
            what = {"object": kind, "uuid": about.uuid, "name": about.name}
            yield str(record.revision), views.event(Event.decode(record.value, 0)) | what
