"""What agents on other machines call, on an HTTPS listener of its own: the verbs of `Controller`, as JSON.

    POST /agent/v1/join       {token, name}                  → {node, identity, installation}
    POST /agent/v1/register   {facts}                        → null
    GET  /agent/v1/desired    ?after=REVISION&wait=SECONDS   → NodeDesired, as codec.to_plain has it; waits for a change
    POST /agent/v1/report     {statuses, events}             → null, once it is kept
    POST /agent/v1/inventory  {seen}                         → null: what the node remembers, and has unasked
    POST /agent/v1/renew                                     → {fence_s, guests_s}: after which a node fences itself
    GET  /agent/v1/operations ?wait=SECONDS                  → [{id, verb, arguments}]: what the server asks of the node
    GET  /agent/v1/stores/NAME/KEY                           → an object of a store; `my%2FNAMESPACE`: see images/stores
    WebSocket /agent/v1/streams/TICKET                       a stream that the operation `stream` asked for
    POST /agent/v1/operations/ID {result} or {error, hint, retry} → null; `result` of `console` is base64

All but `join` carry `Authorization: Node NAME:IDENTITY`, those of stores the token of `NodeDesired` (Basic). Errors are
those of the API; 401 means: join again.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import fastapi
from fastapi import Depends, FastAPI, Query, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from compute.api import problems
from compute.api.context import Body, Services, ask_stores
from compute.api.edge import SLASH, Edge, Route
from compute.api.images.stores import OwnStores
from compute.api.streams import of_socket
from compute.cluster import desired
from compute.cluster.auth import basic
from compute.cluster.images.stores import MINE
from compute.cluster.records import nodes
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, transact
from compute.errors import NotFound, Unauthenticated, Unavailable
from compute.wire.codec import to_json
from compute.wire.operations import client
from compute.wire.spec import InstanceState, InstanceStatus, Inventory, NodeEvent, NodeFacts
from imagestore import Store
from imagestore.mirror import Tree

T = TypeVar("T")
_LEASES = ThreadPoolExecutor(8, "sf-leases")
"""For who a node is and that it lives: what tenants ask, or one node says at length, fills none of these threads."""
_ANSWER_S = 15.0
_USED_S = 10.0
_LONGEST_WAIT_S = 25.0  # first in min(): NaN is not less than it


Wait = Annotated[float, Query(ge=0)]  # seconds; no NaN, which would confuse the loop's timers
Said = fastapi.Body(embed=True)  # a key of the body; keys that a newer node has beside it are passed over
Many = Annotated[list[T], fastapi.Body(embed=True, default_factory=list, max_length=10_000)]


class AnswerBody(Body):
    result: Any = None
    error: str = ""
    hint: str = ""
    retry: bool = False


class Mailbox:
    """The orders for a node that fetches them: each waits for the node's answer."""

    def __init__(self, node: str) -> None:
        self.speaking = asyncio.Lock()  # a node says one long thing at a time
        self._node, self._numbers, self._given, self._told = node, itertools.count(1), asyncio.Event(), 0
        self._asked: dict[int, tuple[dict[str, Any], asyncio.Future[Any]]] = {}
        self.operations = client(self._ask)

    async def _ask(self, verb: str, arguments: Sequence[Any]) -> Any:
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = {"id": number, "verb": verb, "arguments": arguments}, answer
        self._given.set()
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError as err:
            raise Unavailable(f"node {self._node} did not answer within {_ANSWER_S:.0f} s") from err
        finally:
            del self._asked[number]

    async def fetch(self, wait_s: float) -> list[dict[str, Any]]:
        """Orders, each once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._given.wait()
        found = [order for number, (order, _) in self._asked.items() if number > self._told]
        self._told = max([self._told, *self._asked])
        self._given.clear()
        return found

    def answer(self, number: int, body: AnswerBody) -> None:
        _, waiting = self._asked.get(number, (None, None))
        if waiting is None or waiting.done():
            return
        if body.error:
            kind = Unavailable if body.retry else NotFound
            waiting.set_exception(kind(body.error, hint=body.hint))
        else:
            waiting.set_result(body.result)


def build(services: Services) -> FastAPI:
    """The ASGI application for the agents' listener."""
    app = FastAPI(title="sf agents", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.route_class = Route
    app.add_middleware(Edge, registry=CollectorRegistry())
    problems.install(app)
    controller, store = services.controller, services.store
    mailboxes: dict[str, Mailbox] = {}

    async def soon(call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(_LEASES, call, *arguments)

    async def caller(request: HTTPConnection) -> str:
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        name, _, identity = rest.partition(":")
        if scheme != "Node":
            raise Unauthenticated("no node identity")
        await soon(nodes.check_identity, Transaction(store), name, identity)
        if name not in mailboxes:
            controller.nodes.attach(name, mailboxes.setdefault(name, Mailbox(name)).operations)
        return name

    Caller = Annotated[str, Depends(caller)]

    @app.post("/agent/v1/join")
    def join(token: Annotated[str, Said], name: Annotated[str, Said]) -> Response:
        node, identity = transact(store, lambda txn: nodes.join(txn, token, name), name)
        answer = {"node": node.name, "identity": identity, "installation": controller.installation}
        return JSONResponse(answer)

    @app.post("/agent/v1/register")
    async def register(node: Caller, facts: Annotated[NodeFacts, Said]) -> Response:
        await controller.register(node, facts, mailboxes[node].operations)
        await soon(controller.nodes.renew, node)
        return JSONResponse(None)

    @app.get("/agent/v1/desired")
    async def desired(node: Caller, after: int = 0, wait: Wait = 0) -> Response:
        now = await controller.desired(node, after, min(_LONGEST_WAIT_S, wait))
        return Response(to_json(now), media_type="application/json")

    @app.post("/agent/v1/report")
    async def report(node: Caller, statuses: Many[InstanceStatus], events: Many[NodeEvent]) -> Response:
        async with mailboxes[node].speaking:
            await controller.report(node, statuses, events)
        return JSONResponse(None)

    @app.post("/agent/v1/inventory")
    async def inventory(node: Caller, seen: Annotated[Inventory, Said]) -> Response:
        async with mailboxes[node].speaking:
            await controller.inventory(node, seen)
        return JSONResponse(None)

    @app.post("/agent/v1/renew")
    async def renew(node: Caller) -> Response:
        return JSONResponse(await soon(controller.nodes.renew, node))

    @app.get("/agent/v1/operations")
    async def operations(node: Caller, wait: Wait = 0) -> Response:
        return JSONResponse(await mailboxes[node].fetch(min(_LONGEST_WAIT_S, wait)))

    @app.post("/agent/v1/operations/{number}")
    async def answer(node: Caller, number: int, body: AnswerBody) -> Response:
        mailboxes[node].answer(number, body)
        return JSONResponse(None)

    @app.websocket("/agent/v1/streams/{ticket}")
    async def stream(socket: WebSocket, node: Caller, ticket: str) -> None:
        await socket.accept()
        closed = asyncio.Event()
        controller.arrivals.arrive(node, ticket, of_socket(socket, closed))
        await closed.wait()

    app.mount("/agent/v1/stores", NodesStores(services))
    return app


class NodesStores:
    """The server's stores for joined nodes: what else only this machine could reach. Read-only but for guests' own."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._trees: dict[str, tuple[Store, Tree]] = {}
        self._used: dict[str, tuple[float, set[str]]] = {}
        self._own_stores = OwnStores(services, renames=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        node, token = basic(Request(scope).headers.get("authorization", ""))
        await asyncio.to_thread(nodes.check_reader, Transaction(self._services.store), node, token)
        name, _, key = scope["path"].removeprefix("/agent/v1/stores/").partition("/")
        if own := await ask_stores(self._own, node, name):
            await self._own_stores.serve(own, name.rpartition(SLASH)[2], key, scope, receive, send)
            return
        store = self._services.resolver.stores.get(name)
        if store is None:
            raise NotFound(f"no store is called {name[:80]}")
        if name not in self._trees or self._trees[name][0] is not store:
            self._trees[name] = store, Tree(store.backend)
        await self._trees[name][1]({**scope, "path": f"/{key}"}, receive, send)

    def _own(self, node: str, name: str) -> Store | None:
        """A namespace's own store, where the node has guests of it or made of its images."""
        mine, _, namespace = name.replace(SLASH, "/").partition("/")
        if mine != MINE:
            return None
        since, found = self._used.get(node, (0.0, set[str]()))
        if namespace not in found or time.monotonic() - since > _USED_S:
            here = (i for i in Transaction(self._services.store).list(Instance) if i.node == node)
            found = desired.namespaces(i for i in here if i.state != InstanceState.DELETED)
            self._used[node] = time.monotonic(), found
        return self._services.namespaces.find(namespace) if namespace in found else None
