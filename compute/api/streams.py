"""/instances/R/streams/KIND: a WebSocket into a guest: its console, commands, ports, screen.

A browser's has no header for a token. It offers the subprotocols `sf` and `ticket.T`: T is what a POST to the same path
gave, holds for a minute and opens that stream once, for the caller of the POST.
The client's first message is a text, JSON: what it wants of that kind (`compute.agent.operations`). What goes wrong is
a text `{"error", "hint", "kind"}` before the end. A stream ends with either side, its key, its guest, and the server.
"""

import asyncio
import secrets
from collections import Counter
from contextlib import suppress
from typing import Any, cast

from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect

from compute.api.context import Context, Ctx
from compute.cluster.records.instances import Instance, interfaces_of, living
from compute.cluster.records.networks import Network, routing
from compute.cluster.records.taken import Taken, take
from compute.cluster.records.transaction import Transaction
from compute.errors import ComputeError, Denied, Invalid, Unauthenticated, Unavailable
from compute.wire.streams import Message, Stream, carry, failure, first
from imagestore import read_json

Options = dict[str, Any]
router = APIRouter()

_ASKED_BYTES, _ASK_S = 1 << 18, 20.0
_AGAIN_S = 5.0
_MOST, _MOST_OF_ONE = 512, 128
_open: Counter[str] = Counter()  # by namespace; all servers of one process count together
_TICKET_S = 60
_KINDS = "console", "exec", "vnc", "screen"  # a node's others, by which guests move, are the server's


def of_socket(socket: WebSocket, closed: asyncio.Event | None = None) -> Stream:
    """A stream's end that is a WebSocket which somebody opened; `closed` is set when we close it."""

    async def send(message: Message) -> None:
        await (socket.send_text(message) if isinstance(message, str) else socket.send_bytes(message))

    async def receive() -> Message | None:
        found = await socket.receive()
        return cast(Message | None, found.get("text", found.get("bytes")))

    async def close() -> None:
        if closed:
            closed.set()
        await socket.close()

    return Stream(send, receive, close, WebSocketDisconnect, RuntimeError, OSError)


@router.post("/instances/{ref}/streams/{kind}", tags=["instances"])
def ticket(ctx: Ctx, ref: str, kind: str) -> Response:
    """For a browser: opens this stream once, within a minute, as the WebSocket's subprotocol `ticket.T` beside `sf`."""
    meant = f"{_find(ctx, ref).uuid}/{kind}/{secrets.token_hex(16)}"
    made = ctx.services.authority.token(_TICKET_S, **ctx.caller.claims | {"meant": meant})
    return JSONResponse({"ticket": made, "expires_in": _TICKET_S})


@router.websocket("/instances/{ref}/streams/{kind}")
async def stream(socket: WebSocket, ref: str, kind: str) -> None:
    await socket.accept("sf" if "sf" in socket.scope["subprotocols"] else None)
    ours, far, namespace = of_socket(socket), None, ""
    try:
        ctx = await asyncio.to_thread(_context, socket, ref, kind)
        if _open[ctx.caller.namespace] >= _MOST_OF_ONE or _open.total() >= _MOST:
            raise Unavailable("too many streams at this moment", hint="close some")
        namespace = ctx.caller.namespace
        _open[namespace] += 1
        async with asyncio.timeout(_ASK_S):
            options = _asked(await ours.receive())
        known, node, target, options = await asyncio.to_thread(_target, ctx, ref, kind, options)
        far = await ctx.services.controller.stream(node, kind, target, options)
        if kind in ("console", "vnc"):  # not what scripts open by the hundred
            event = Instance.KIND, known.uuid, f"{kind} opened"
            await asyncio.to_thread(ctx.act, lambda txn: txn.event(*event, type="audit"))

        def look() -> None:
            ctx.look_again()
            _find(ctx, known.uuid)

        async def watch() -> None:
            while True:
                await asyncio.sleep(_AGAIN_S)
                await run_in_threadpool(look)  # not the loop's own threads: leases are renewed there

        await first(carry(ours, far), carry(far, ours), watch())
    except (ComputeError, TimeoutError) as err:
        with suppress(ComputeError):
            await ours.send(failure(err))
    finally:
        if namespace:
            _open[namespace] -= 1
        if far:
            await far.aclose()
        await ours.aclose()


def _context(socket: WebSocket, ref: str, kind: str) -> Context:
    """Raises Unauthenticated, and Denied for a page of another server that has a browser open a stream."""
    origin = socket.headers.get("origin")
    if origin and origin.partition("://")[2] != socket.headers.get("host"):
        raise Denied("a page of another server may not open streams")
    heads, words = socket.scope["headers"], socket.scope["subprotocols"]
    if "authorization" not in socket.headers:
        shown = (word[7:].encode("latin-1", "replace") for word in words if word.startswith("ticket."))
        heads = [*heads, *((b"authorization", b"Ticket " + one) for one in shown)]
    ctx = Context(cast(Request, WebSocket({**socket.scope, "headers": heads}, socket.receive, socket.send)))

    def use(txn: Transaction) -> None:
        if not meant.startswith(f"{_find(ctx, ref).uuid}/{kind}/") or txn.find(Taken, f"ticket/{meant}"):
            raise Unauthenticated("a ticket opens one stream, once, within a minute", hint="ask for another")
        take(txn, f"ticket/{meant}", meant)

    if meant := ctx.caller.claims.get("meant", ""):
        ctx.act(use)
    return ctx


def _asked(message: Message | None) -> Options:
    try:
        return {**read_json(str(message).encode(), most_bytes=_ASKED_BYTES)}
    except (ValueError, TypeError) as err:
        raise Invalid(f"the first message says in JSON what is wanted: {err}") from err


def _find(ctx: Context, ref: str) -> Instance:
    return living(ctx.read(), ctx.find(Instance, ref).uuid)


def _target(ctx: Context, ref: str, kind: str, options: Options) -> tuple[Instance, str, str, Options]:
    """Which node is asked for a stream of what. A port is reached from the network's router, at the guest's address."""
    known = _find(ctx, ref)
    if kind in _KINDS:
        return known, known.node, known.uuid, options
    if kind != "connect":
        raise Invalid(f"there is no stream {kind[:80]}", hint=", ".join((*_KINDS, "connect")))
    port, links = options.get("port"), [i for i in interfaces_of(ctx.read(), known.uuid) if i.known]
    if not isinstance(port, int) or not 0 < port < 2**16:
        raise Invalid("a port is a number from 1 to 65535")
    if not links:
        raise Invalid(f"{known.name} has no address", hint=f"sf instance show {known.name}")
    network = ctx.read().get(Network, links[0].network_uuid)
    ends = {"address": links[0].known, "also": links[0].address6}
    return known, routing(network), network.uuid, {**ends, "port": port}
