"""/instances/R/agent: what the agent in a guest is asked to do; /agentoperations: how that went. /screenshot.

The server that took an operation carries it out, and remembers a guest's newest until it ends. `complete` are those
that failed, too: clients wait for that word alone, then look at code and texts.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from functools import partial
from tempfile import NamedTemporaryFile
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api.context import Body, Context, Ctx, Guest, ListBody, ask_stores
from compute.api.edge import Route
from compute.api.images.artifacts import get_data, keep_file
from compute.cluster.images.artifacts import BLOB, blob_of
from compute.cluster.records.instances import Instance, created
from compute.cluster.records.transaction import new_uuid
from compute.errors import ComputeError, Conflict, Denied, NotFound, NotReady, Unavailable
from imagestore import StoreError, read_json, whole

router = APIRouter(tags=["instances"], route_class=Route)

_MOST_S, _TEXT_BYTES = 3600, 1 << 14
_MOST, _MOST_OF_ONE, _MOST_OF_ALL = 16, 128, 1024  # of a guest, a namespace, all
_PIECE_BYTES, _FILE_BYTES, _FETCH_S = 1 << 16, 1 << 26, 600
_PUT = """[ -d "$1" ] && exit 21; t=$(mktemp "$1.XXXXXX") && cat >"$t" && chmod "$2" "$t" && mv -f "$t" "$1" && exit
rm -f "$t"; exit 1"""
Json = dict[str, Any]
Take = Callable[[bytes], object]
Given = AsyncIterable[Any]
_fetching = asyncio.Semaphore(16)  # files on the server's disk at once
_operations: dict[str, tuple[Json, asyncio.Task[None]]] = {}


async def _told(ctx: Context, known: Instance, take: Take, given: Given | None = None, **more: Any) -> Json:
    """What a stream into a guest says at its end; its bytes are for `take`. Raises Conflict, Unavailable."""
    far = await ctx.services.controller.stream(known.node, more.pop("kind", "exec"), known.uuid, more)
    try:
        with suppress(Unavailable):  # why nobody takes it is said below
            if given:
                async for piece in given:
                    for at in range(0, len(piece), _PIECE_BYTES):
                        await far.send(bytes(piece[at : at + _PIECE_BYTES]))
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


async def _run(ctx: Context, known: Instance, argv: list[str], given: Given | None = None) -> Json:
    """A command in the guest: its code, and the beginnings of its texts."""
    seen = {1: bytearray(), 2: bytearray()}

    def take(message: bytes) -> None:
        text = seen[message[0]]
        text += message[1 : 2 + _TEXT_BYTES - len(text)]

    said = await _told(ctx, known, take, given, argv=argv, input=given is not None)
    out, errors = (text[:_TEXT_BYTES].decode(errors="replace") for text in seen.values())
    errors += "\nsf: the rest is cut" if max(map(len, seen.values())) > _TEXT_BYTES else ""
    return {"return-code": whole(said.get("exit"), 0, 2**32), "stdout": out, "stderr": errors}


async def _fetch(ctx: Context, known: Instance, **more: Any) -> Json:
    """What a guest hands out, kept as a blob of its namespace."""

    def take(message: bytes) -> None:
        if file.write(message[1:]) and file.tell() > _FILE_BYTES:
            raise Conflict(f"it has more than {_FILE_BYTES >> 20} MiB", hint="sf instance cp")

    async with _fetching, asyncio.timeout(_FETCH_S):
        with NamedTemporaryFile(dir=ctx.services.config.state_dir) as file:
            if (await _told(ctx, known, take, **more)).get("exit") != 0 or not file.tell():
                raise Conflict("nothing came: is it a file that is there, and not empty?")
            return {"return-code": 0, "content_blob": await keep_file(ctx, known, file)}


def _of(known: Instance) -> list[tuple[Json, asyncio.Task[None]]]:
    return [one for one in _operations.values() if one[0]["instance_uuid"] == known.uuid]


async def _begin(ctx: Context, known: Instance, do: Callable[[], Awaitable[Json]], **asked: Any) -> Response:
    """Have `do` done, and answer with the operation. Raises NotReady."""
    await asyncio.to_thread(created, ctx.read(), known.uuid)
    if not known.agent_state.startswith("ready"):
        raise NotReady("no agent answers in the guest", hint="is qemu-guest-agent installed, and up?")
    own = [one for one in _operations.values() if one[0]["namespace"] == known.namespace]
    for among, most in ((_of(known), _MOST), (own, _MOST_OF_ONE), ([*_operations.values()], _MOST_OF_ALL)):
        if len(among) >= most:
            oldest, task = next((one for one in among if one[1].done()), among[0])
            if not task.done():
                raise NotReady("too many operations wait", hint="again when one has ended")
            _operations.pop(oldest["uuid"], None)
    made: Json = {"uuid": new_uuid(), "instance_uuid": known.uuid, "namespace": known.namespace, "version": 1}
    made |= {"state": "executing", "commands": [asked], "results": {}, "metadata": {}}

    async def carry_out() -> None:
        try:
            async with asyncio.timeout(_MOST_S):
                result = await do()
        except (ComputeError, StoreError, OSError, ValueError) as err:
            why = str(err) or f"it did not end within {_MOST_S} s"
            result = {"return-code": -1, "stdout": "", "stderr": why, "error": why}
        made.update(state="complete", results={"0": result})

    _operations[made["uuid"]] = made, asyncio.create_task(carry_out())
    return JSONResponse(made)


class ExecuteBody(Body):
    command_line: str = Field(min_length=1, max_length=1 << 16)


@router.post("/instances/{ref}/agent/execute")
async def execute(ctx: Ctx, known: Guest, body: ExecuteBody) -> Response:
    """Have the guest's shell run a command. Poll the operation until it is `complete`; 16 KiB of each text are kept."""
    do = partial(_run, ctx, known, argv=["/bin/sh", "-c", body.command_line])
    return await _begin(ctx, known, do, command="execute", commandline=body.command_line)


class GetBody(Body):
    path: str = Field(min_length=1, max_length=4096)


class PutBody(GetBody):
    blob_uuid: str
    mode: int = Field(default=0o644, ge=0)


@router.post("/instances/{ref}/agent/put")
async def put(ctx: Ctx, known: Guest, body: PutBody) -> Response:
    """Write a blob to a file of the guest, in its place once all of it is there."""
    argv = ["/bin/sh", "-c", _PUT, "sh", body.path, f"{body.mode & 0o7777:o}"]

    def stored() -> bool:
        return not blob_of(ctx.artifacts(), BLOB + body.blob_uuid)[1].upload

    async def do() -> Json:
        while not await ask_stores(stored):
            await asyncio.sleep(0.2)
        return await _run(ctx, known, argv, (await ask_stores(get_data, ctx, body.blob_uuid)).body_iterator)

    await ask_stores(stored)
    return await _begin(ctx, known, do, command="put-blob", **body.model_dump())


@router.post("/instances/{ref}/agent/get")
async def get(ctx: Ctx, known: Guest, body: GetBody) -> Response:
    """Keep a file of the guest as a blob: `content_blob` of the result."""
    do = partial(_fetch, ctx, known, argv=["cat", "--", body.path])
    return await _begin(ctx, known, do, command="get-file", path=body.path)


@router.get("/instances/{ref}/agentoperations")
async def list_operations(known: Guest, body: ListBody | None = None) -> Response:
    """Those that have not ended, or all that are remembered."""
    found = [one for one, _ in _of(known)]
    return JSONResponse([one for one in found if (body and body.all) or not one["results"]])


@router.get("/agentoperations/{uuid}")
@router.delete("/agentoperations/{uuid}")
async def show_operation(ctx: Ctx, uuid: str) -> Response:
    """How it went. Deleted, it is given up."""
    if uuid not in _operations:
        hint = "they end with the server that took them"
        raise NotFound(f"agent operation {uuid[:80]} not found", hint=hint)
    found, task = _operations[uuid]
    await asyncio.to_thread(ctx.find, Instance, found["instance_uuid"])
    if ctx.request.method == "DELETE":
        task.cancel()
        _operations.pop(uuid, None)
    return JSONResponse(found)


@router.get("/instances/{ref}/screenshot")
async def screenshot(ctx: Ctx, known: Guest) -> Response:
    """What its screen shows, as a PNG: the blob's uuid."""
    if ctx.caller.read_only:
        raise Denied("a key that may only read keeps no pictures", hint="use another")
    return JSONResponse((await _fetch(ctx, known, kind="screen"))["content_blob"])
