"""What handlers share: the services, the caller, references to objects, entity tags and idempotency keys."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, wraps
from inspect import iscoroutinefunction
from ipaddress import ip_address
from itertools import chain
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from compute.api.edge import SLASH, Route
from compute.cluster.auth import Authority, Caller
from compute.cluster.controller import Controller
from compute.cluster.images.artifacts import Artifact, Sight, named_images
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.quotas import enforce
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.taken import Taken, take
from compute.cluster.records.transaction import Stored, Transaction, transact
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import Conflict, Denied, Invalid, NotFound, Precondition
from imagestore import ImageCache, listening

T = TypeVar("T")
O = TypeVar("O", bound=Stored)  # noqa: E741

_ASKING_STORES = ThreadPoolExecutor(16, "sf-stores")


@dataclass(frozen=True, slots=True)
class Services:
    """What one server is made of; built by `serve`, or by a test."""

    config: Config
    store: StateStore
    controller: Controller
    authority: Authority
    resolver: ImageCache
    namespaces: NamespaceStores  # their own image stores: `namespaces.of("shop")`


def apart(handler: Callable[..., Response]) -> Callable[..., Awaitable[Response]]:
    """For handlers that ask image stores: in threads of their own, so that a store that is away holds up no other."""

    @wraps(handler)
    async def run(**arguments: Any) -> Response:
        return await ask_stores(handler, **arguments)

    return run


async def ask_stores(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """`call`, in one of those threads."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_ASKING_STORES, partial(call, *arguments, **named))


class StoreRoute(Route):
    """A route whose handler runs `apart`, unless it does so itself."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint if iscoroutinefunction(endpoint) else apart(endpoint), **options)


def address_of(request: Request) -> str:
    """Who asks, for limits. Raises Denied where it came over plain HTTP from elsewhere: no key is taken there."""
    host = request.client.host if request.client else ""
    if request.url.scheme in ("http", "ws") and host and not ip_address(host).is_loopback:
        hint = "https; a proxy says X-Forwarded-Proto; after this the key is to be changed"
        raise Denied("keys and tokens are not taken over plain HTTP", hint=hint)
    return listening.origin(host)


class Body(BaseModel):
    """Arguments of a call: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class NamespaceBody(Body):
    namespace: str | None = None


class ListBody(NamespaceBody):
    all: bool = False


class DeleteAllBody(NamespaceBody):
    confirm: bool = False


class Context:
    """One authenticated request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.services: Services = request.app.state.services
        self.store = self.services.store
        self.caller: Caller = self._caller()

    def _caller(self, *, begun: bool = False) -> Caller:
        said = self.request.headers.get("authorization", "")
        method = self.request.scope.get("method", "")  # a WebSocket has none
        return self.services.authority.caller(said, address_of(self.request), method=method, begun=begun)

    def look_again(self) -> None:
        """For answers that take long: whom does the caller stand for now? Raises Unauthenticated."""
        self.caller = self._caller(begun=True)

    def read(self) -> Transaction:
        return Transaction(self.store)

    def act(self, action: Callable[[Transaction], T], *, queued: bool = False) -> T:
        def act(txn: Transaction) -> T:
            done = action(txn)
            enforce(txn)
            return done

        host, port = self.request.client or ("", 0)
        # Of what a proxy said (uvicorn believes this machine's) there is no port.
        where = f"{host[:64]}{'' if port else ', as a proxy says'}"
        by = f"{self.caller.namespace}/{self.caller.key_name}", where
        return transact(self.store, act, self.services.config.node_name, by, queued=queued)

    def change(self, known: Stored, action: Callable[[Transaction, str], T]) -> T:
        """`action` on an object that was found, by its id. Raises Precondition, and what `action` raises."""

        def act(txn: Transaction) -> T:
            self.check_match(txn.get(type(known), known.id))
            return action(txn, known.id)

        return self.act(act)

    def admin(self) -> None:
        """Raises Denied."""
        if not self.caller.admin:
            raise Denied("only the system namespace may do this")

    def namespace(self, wanted: str | None) -> str:
        """The namespace that a new object goes to. Raises Denied, NotFound."""
        name = wanted or self.caller.namespace
        if not self.caller.may(name):
            raise Denied(f"namespace {name[:80]} does not trust {self.caller.namespace}")
        self.read().get(Namespace, name)
        return name

    def images(self, namespace: str) -> Sight:
        """What image names mean in a request for objects of a namespace."""
        has, caller = self.services, self.caller
        return Sight(has.resolver, has.namespaces, namespace, caller.may, caller.admin, self.artifacts)

    def artifacts(self) -> Iterator[Artifact]:
        """What namespaces keep and the caller sees, and the stores' names."""
        seen = (a for a in self.read().list(Artifact) if a.namespace and self.sees(a))
        return chain(seen, named_images(self.services.resolver.stores.values()))

    def sees(self, item: Any) -> bool:
        return getattr(item, "shared", False) or self.caller.may(item.namespace)

    def listed(self, cls: type[O], query: ListBody | None) -> list[O]:
        """Of one's own namespace or the one asked for, the administrator's of all; the deleted if all are asked for."""
        query, found = query or ListBody(), filter(self.sees, self.read().list(cls))
        wanted = query.namespace or ("" if self.caller.admin else self.caller.namespace)
        there = (i for i in found if query.all or getattr(i, "state", "") != "deleted")
        return [i for i in there if wanted in ("", getattr(i, "namespace", ""))]

    def doomed(self, cls: type[O], body: DeleteAllBody) -> list[O]:
        """All of a namespace that is to be emptied. Raises Invalid without the word."""
        return self.listed(cls, ListBody(namespace=self.emptied(body)))

    def emptied(self, body: DeleteAllBody) -> str:
        """The namespace that is to be emptied. Raises Invalid without the word, Denied."""
        if not body.confirm:
            hint = '{"confirm": true} deletes all of the namespace'
            raise Invalid("confirm is not true", hint=hint)
        return self.namespace(body.namespace)

    def find(self, cls: type[O], reference: str, namespace: str | None = None) -> O:
        """By UUID (deleted ones too), or by name: of one's own namespace, or as `namespace/name`.

        Raises NotFound also for what the caller may not see.
        """
        txn = self.read()
        exact = txn.find(cls, reference)
        if exact is not None and self.sees(exact):
            return exact
        said, _, name = reference.replace(SLASH, "/").rpartition("/")
        home = said or namespace or self.caller.namespace
        taken = txn.find(Taken, f"{cls.KIND}/{home}/{name}") if self.caller.may(home) else None
        if taken is not None:
            return txn.get(cls, taken.owner)
        named = (t.name.split("/")[1] for t in txn.list(Taken, f"{cls.KIND}/") if t.name.endswith(f"/{name}"))
        others = " or ".join(f"{other}/{name}" for other in named if self.caller.may(other))
        hint = f"another namespace's is {others}" if others else f"see: sf {cls.KIND} ls"
        raise NotFound(f"{cls.KIND} {name[:80]} not found in namespace {home[:80]}", hint=hint)

    def check_match(self, item: Stored) -> None:
        """Raises Precondition when If-Match names another revision than the one now read."""
        wanted = self.request.headers.get("if-match")
        if wanted and wanted != "*" and etag(item) not in [part.strip() for part in wanted.split(",")]:
            raise Precondition(f"{item.KIND} {item.id} has changed", hint=f"its entity tag is {etag(item)}")

    def show(self, item: O, view: Callable[[O], Any]) -> Response:
        """Its view with its entity tag; 304 when the caller has it already."""
        tag = etag(item)
        if self.request.method == "GET" and self.request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return JSONResponse(view(item), headers={"ETag": tag})

    def once(self, txn: Transaction, cls: type[O], body: BaseModel, make: Callable[[Transaction], O]) -> O:
        """`make`, or what it made when this Idempotency-Key was first used (kept for a day).

        Raises Conflict when the same key comes with other arguments.
        """
        made = self.made_before(txn, cls, body) or make(txn)
        if (name := self._request()) and txn.find(Taken, name) is None:
            take(txn, name, made.id, self._arguments(body))
        return made

    def made_before(self, txn: Transaction, cls: type[O], body: BaseModel) -> O | None:
        """What this Idempotency-Key made. Raises Conflict."""
        seen = txn.find(Taken, name) if (name := self._request()) else None
        if seen is not None and seen.note != self._arguments(body):
            raise Conflict("this Idempotency-Key was used with other arguments", hint="use a new key")
        return txn.get(cls, seen.owner) if seen else None

    def _request(self) -> str:
        key = self.request.headers.get("idempotency-key", "")
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"request/{self.caller.namespace}/{digest}" if key else ""

    def _arguments(self, body: BaseModel) -> str:
        said = [str(self.request.url.path), body.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def etag(item: Stored) -> str:
    return f'"{item.revision}"'


Ctx = Annotated[Context, Depends(Context)]


async def _admin(ctx: Ctx) -> Context:
    ctx.admin()
    return ctx


Admin = Annotated[Context, Depends(_admin)]
"""As Ctx, for what the administrator alone may do."""


def at(cls: type[O]) -> Any:
    """The object of a path with {ref}; found in a thread, so that the event loop never waits for the state."""

    def find(ctx: Ctx, ref: str) -> O:
        return ctx.find(cls, ref)

    return Depends(find)


Guest = Annotated[Instance, at(Instance)]
