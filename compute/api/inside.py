"""/instances/R/agent: what the agent in a guest is asked to do. /agentoperations: how that went.

The server that took an operation carries it out, and remembers a guest's newest until it ends. `complete` are those
that failed, too: clients wait for that word alone, then look at code and texts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api.context import Body, Context, Ctx, ListBody, ask_stores
from compute.api.edge import Route
from compute.cluster.records.instances import Instance, created
from compute.cluster.records.stored import new_uuid
from compute.errors import ComputeError, Conflict, NotFound, NotReady, Unavailable
from imagestore import StoreError, read_json, whole

router = APIRouter(tags=["instances"], route_class=Route)

_MOST_S, _MOST, _MOST_OF_ALL, _TEXT_BYTES = 3600, 16, 1024, 1 << 14
Json = dict[str, Any]
Given = Iterator[bytes] | None
_operations: dict[str, Json] = {}
_tasks: dict[str, asyncio.Task[None]] = {}


async def _told(
    ctx: Context,
    known: Instance,
    kind: str,
    options: Json,
    take: Callable[[bytes], object],
    given: Given = None,
) -> Json:
    """What a stream into a guest says at its end; its bytes are for `take`. Raises Conflict, Unavailable."""
    far = await ctx.services.controller.stream(known.node, kind, known.uuid, options)
    try:
        with suppress(Unavailable):  # why nobody takes it is said below
            while given and (piece := await ask_stores(next, given, b"")):
                await far.send(piece)
            await far.send('{"eof": true}')
        while isinstance(message := await far.receive(), bytes):
            take(message)
        said: Json = {**read_json((message or "null").encode(), most_bytes=1 << 13)}
        if "error" in said:
            raise Conflict(str(said["error"]), hint=str(said.get("hint")))
        return said
    except (ValueError, TypeError, LookupError) as err:
        raise Unavailable(f"node {known.node} broke off what {known.name} was asked") from err
    finally:
        await far.aclose()


async def _run(ctx: Context, argv: list[str], known: Instance, given: Given = None) -> Json:
    """A command in the guest: its code, and the beginnings of its texts."""
    seen = {1: bytearray(), 2: bytearray()}

    def take(message: bytes) -> None:
        text = seen[message[0]]
        text += message[1 : 2 + _TEXT_BYTES - len(text)]

    said = await _told(ctx, known, "exec", {"argv": argv, "input": given is not None}, take, given)
    out, errors = (text[:_TEXT_BYTES].decode(errors="replace") for text in seen.values())
    errors += "\nsf: the rest is cut" if max(map(len, seen.values())) > _TEXT_BYTES else ""
    return {"return-code": whole(said.get("exit"), 0, 2**32), "stdout": out, "stderr": errors}


def _of(known: Instance) -> list[Json]:
    return [one for one in _operations.values() if one["instance_uuid"] == known.uuid]


async def _begin(ctx: Context, ref: str, do: Callable[[Instance], Awaitable[Json]], **asked: Any) -> Response:
    """Have `do` done, and answer with the operation. Raises NotReady."""
    known = created(ctx.read(), ctx.find(Instance, ref).uuid)
    if not known.agent_state.startswith("ready"):
        raise NotReady("no agent answers in the guest", hint="is qemu-guest-agent installed, and up?")
    for old in (_of(known)[: 1 - _MOST] or [*_operations.values()][: 1 - _MOST_OF_ALL])[:1]:
        if old["uuid"] in _tasks:
            raise NotReady("too many operations wait", hint="again when one has ended")
        del _operations[old["uuid"]]
    made: Json = {"uuid": new_uuid(), "instance_uuid": known.uuid, "namespace": known.namespace, "version": 1}
    made |= {"state": "executing", "commands": [asked], "results": {}, "metadata": {}}

    async def carry_out() -> None:
        try:
            async with asyncio.timeout(_MOST_S):
                result = await do(known)
        except (ComputeError, StoreError, OSError, ValueError) as err:
            why = str(err) or f"it did not end within {_MOST_S} s"
            result = {"return-code": -1, "stdout": "", "stderr": why, "error": why}
        made.update(state="complete", results={"0": result})

    _operations[made["uuid"]], _tasks[made["uuid"]] = made, asyncio.create_task(carry_out())
    _tasks[made["uuid"]].add_done_callback(lambda _: _tasks.pop(made["uuid"]))
    return JSONResponse(made)


class ExecuteBody(Body):
    command_line: str = Field(min_length=1, max_length=1 << 16)


@router.post("/instances/{ref}/agent/execute")
async def execute(ctx: Ctx, ref: str, body: ExecuteBody) -> Response:
    """Have the guest's shell run a command. Poll the operation until it is `complete`; 16 KiB of each text are kept."""
    do = partial(_run, ctx, ["/bin/sh", "-c", body.command_line])
    return await _begin(ctx, ref, do, command="execute", commandline=body.command_line)


@router.get("/instances/{ref}/agentoperations")
async def list_operations(ctx: Ctx, ref: str, body: ListBody | None = None) -> Response:
    """Those that have not ended, or all that are remembered."""
    found = _of(ctx.find(Instance, ref))
    return JSONResponse([one for one in found if (body and body.all) or not one["results"]])


@router.get("/agentoperations/{uuid}")
@router.delete("/agentoperations/{uuid}")
async def show_operation(ctx: Ctx, uuid: str) -> Response:
    """How it went. Deleted, it is given up."""
    if not (found := _operations.get(uuid)):
        raise NotFound(
            f"agent operation {uuid[:80]} not found", hint="they end with the server that took them"
        )
    ctx.find(Instance, found["instance_uuid"])
    if ctx.request.method == "DELETE":
        del _operations[uuid]
        if uuid in _tasks:
            _tasks[uuid].cancel()
    return JSONResponse(found)
