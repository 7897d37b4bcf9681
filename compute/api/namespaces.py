"""/auth: tokens, namespaces, keys and trust."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Body, Context, Ctx, Services, address_of
from compute.api.edge import Route
from compute.api.history import add_events, add_metadata
from compute.cluster import auth
from compute.cluster.quotas import DEFAULTS, Quota, used
from compute.cluster.records.namespaces import Namespace
from compute.errors import Conflict, Invalid, NotFound

router = APIRouter(tags=["auth"], route_class=Route)


_RESERVED = ("all", "local", "my")
"""Before the slash of a name they mean something else."""


class LoginBody(Body):
    namespace: str
    key: str


class CreateBody(Body):
    namespace: str
    key_name: str | None = None
    key: str | None = None


class KeyValueBody(Body):
    key_name: str | None = None
    key: str
    ttl_s: int | None = Field(default=None, ge=0, le=100 * 366 * 86400)
    """How long it holds; 0: for ever. Not given: as it was, or for ever."""
    read_only: bool | None = None

    def given(self) -> dict[str, Any]:
        return {"key": self.key, "ttl_s": self.ttl_s, "read_only": self.read_only}


class KeyBody(KeyValueBody):
    key_name: str


class TrustBody(Body):
    external_namespace: str


def _find(ctx: Context, name: str) -> Namespace:
    """Raises NotFound also for a namespace that does not trust the caller."""
    found = ctx.read().find(Namespace, name)
    if found is None or not ctx.caller.may(name):
        raise NotFound(f"namespace {name[:80]} not found")
    return found


def _own(ctx: Context, name: str) -> Namespace:
    """Keys and trust are the namespace's own affair: a friend could stay by them. Raises Denied, NotFound."""
    found = _find(ctx, name)
    if ctx.caller.namespace != name:
        ctx.admin()
    return found


@router.post("/auth")
def login(request: Request, body: LoginBody) -> Response:
    services: Services = request.app.state.services
    return JSONResponse(services.authority.login(body.namespace, body.key, address_of(request)))


@router.get("/auth/namespaces")
def list_namespaces(ctx: Ctx) -> Response:
    return JSONResponse([views.namespace(n) for n in ctx.read().list(Namespace) if ctx.caller.may(n.name)])


@router.post("/auth/namespaces")
def create_namespace(ctx: Ctx, body: CreateBody) -> Response:
    ctx.admin()
    if body.namespace in {*_RESERVED, *dict(ctx.services.config.stores)}:
        raise Conflict(f"{body.namespace}/… means something else already", hint="sf remote ls; another name")
    made = auth.create_namespace(ctx.store, body.namespace, body.key_name or "", body.key or "", ctx.by)
    return JSONResponse(views.namespace(made))


@router.get("/auth/namespaces/{ref}")
def get_namespace(ctx: Ctx, ref: str) -> Response:
    item = _find(ctx, ref)
    return ctx.show(item, views.namespace(item))


@router.delete("/auth/namespaces/{ref}")
def delete_namespace(ctx: Ctx, ref: str) -> Response:
    ctx.admin()
    auth.delete_namespace(ctx.store, ref)
    return JSONResponse(None)


@router.get("/auth/namespaces/{ref}/keys")
def list_keys(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(sorted(_find(ctx, ref).keys))


@router.post("/auth/namespaces/{ref}/keys")
def add_key(ctx: Ctx, ref: str, body: KeyBody) -> Response:
    _own(ctx, ref)
    auth.set_key(ctx.store, ref, body.key_name, must_exist=False, by=ctx.by, **body.given())
    return JSONResponse(body.key_name)


@router.put("/auth/namespaces/{ref}/keys")
def change_key(ctx: Ctx, ref: str, body: KeyBody) -> Response:
    return change_named_key(ctx, ref, body.key_name, body)


@router.put("/auth/namespaces/{ref}/keys/{key_name}")
def change_named_key(ctx: Ctx, ref: str, key_name: str, body: KeyValueBody) -> Response:
    _own(ctx, ref)
    auth.set_key(ctx.store, ref, key_name, must_exist=True, by=ctx.by, **body.given())
    return JSONResponse(key_name)


@router.delete("/auth/namespaces/{ref}/keys/{key_name}")
def delete_key(ctx: Ctx, ref: str, key_name: str) -> Response:
    def change(item: Namespace) -> Namespace:
        if key_name not in item.keys:
            raise NotFound(f"namespace {ref} has no key {key_name[:80]}")
        return replace(item, keys={k: v for k, v in item.keys.items() if k != key_name})

    _own(ctx, ref)
    auth.change_namespace(ctx.store, ref, change, f"key {key_name} removed", ctx.by)
    return JSONResponse(None)


@router.post("/auth/namespaces/{ref}/trust")
def add_trust(ctx: Ctx, ref: str, body: TrustBody) -> Response:
    _own(ctx, ref)
    # A tenant is not told which namespaces there are: whoever is made later is trusted by nobody.
    if ctx.caller.admin and ctx.read().find(Namespace, body.external_namespace) is None:
        raise Invalid(f"namespace {body.external_namespace[:80]} does not exist")
    return _trust(ctx, ref, body.external_namespace, trusted=True)


@router.delete("/auth/namespaces/{ref}/trust/{external}")
def remove_trust(ctx: Ctx, ref: str, external: str) -> Response:
    _own(ctx, ref)
    return _trust(ctx, ref, external, trusted=False)


def _trust(ctx: Context, ref: str, other: str, *, trusted: bool) -> Response:
    def change(item: Namespace) -> Namespace:
        rest = tuple(name for name in item.trust if name != other)
        return replace(item, trust=(*rest, other) if trusted else rest)

    said = f"trusts {other[:80]}" if trusted else f"trusts {other[:80]} no more"
    return JSONResponse(views.namespace(auth.change_namespace(ctx.store, ref, change, said, ctx.by)))


@router.get("/auth/namespaces/{ref}/quota")
def get_quota(ctx: Ctx, ref: str) -> Response:
    """What of each it has, and may have at most."""
    _find(ctx, ref)
    quota, has, store = Quota.of(ctx.read(), ref), used(ctx.read(), ref), ctx.services.namespaces.find(ref)
    has["stored_gb"] = sum(stat.size_bytes for stat in store.backend.list("")) >> 30 if store else 0
    return JSONResponse([{"name": what, "used": has[what], "most": quota.most(what)} for what in DEFAULTS])


@router.put("/auth/namespaces/{ref}/quota")
def set_quota(ctx: Ctx, ref: str, body: dict[str, Annotated[int, Field(ge=0, le=2**40)]]) -> Response:
    ctx.admin()
    if unknown := body.keys() - DEFAULTS.keys():
        raise Invalid(f"there is no quota of {min(unknown)[:40]}", hint=", ".join(DEFAULTS))
    _find(ctx, ref)
    ctx.act(lambda txn: txn.update(replace(known := Quota.of(txn, ref), limits=known.limits | body)))
    return get_quota(ctx, ref)


add_metadata(router, "/auth/namespaces/{ref}", _find)
add_events(router, "/auth/namespaces/{ref}", _own)
