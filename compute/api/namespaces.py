"""/auth: tokens, namespaces, keys and trust."""

import time
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Admin, Body, Context, Ctx, Services, address_of, apart
from compute.api.edge import Route
from compute.api.history import add_events, add_metadata
from compute.cluster import auth
from compute.cluster.liveness import Server
from compute.cluster.quotas import DEFAULTS, Quota, used
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import Transaction, check_name
from compute.errors import Conflict, Invalid, NotFound

router = APIRouter(tags=["auth"], route_class=Route)


_RESERVED = ("all", "local", "my")  # before the slash of a name they mean something else


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
    ttl_s: int | None = Field(default=None, ge=1, le=100 * 366 * 86400)
    """How long it holds from now on. Not given: as it was, or for ever."""
    read_only: bool | None = None


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
    told = services.authority.login(body.namespace, body.key, address_of(request))
    servers = [one.url for one in Transaction(services.store).list(Server) if one.url]
    return JSONResponse(told | ({"servers": servers} if servers else {}))


@router.get("/auth/namespaces")
def list_namespaces(ctx: Ctx) -> Response:
    return JSONResponse([views.namespace(n) for n in ctx.read().list(Namespace) if ctx.caller.may(n.name)])


@router.post("/auth/namespaces")
def create_namespace(ctx: Admin, body: CreateBody) -> Response:
    if body.namespace in {*_RESERVED, *ctx.services.controller.stores()}:
        raise Conflict(f"{body.namespace}/… means something else already", hint="sf remote ls; another name")
    keys = {body.key_name or "default": auth.hash_key(body.key)} if body.key else {}
    made = ctx.act(lambda txn: auth.create_namespace(txn, body.namespace, keys))
    return JSONResponse(views.namespace(made))


@router.get("/auth/namespaces/{ref}")
def get_namespace(ctx: Ctx, ref: str) -> Response:
    return ctx.show(_find(ctx, ref), views.namespace)


@router.delete("/auth/namespaces/{ref}")
def delete_namespace(ctx: Admin, ref: str) -> Response:
    while ctx.act(lambda txn: auth.delete_namespace(txn, ref)):
        pass
    return JSONResponse(None)


@router.get("/auth/namespaces/{ref}/keys")
def list_keys(ctx: Ctx, ref: str) -> Response:
    return JSONResponse(sorted(_find(ctx, ref).keys))


@router.post("/auth/namespaces/{ref}/keys")
@router.put("/auth/namespaces/{ref}/keys")
def set_key(ctx: Ctx, ref: str, body: KeyBody) -> Response:
    return change_key(ctx, ref, body.key_name, body)


@router.put("/auth/namespaces/{ref}/keys/{key_name}")
def change_key(ctx: Ctx, ref: str, key_name: str, body: KeyValueBody) -> Response:
    _own(ctx, ref)
    hashed, may = auth.hash_key(body.key), body.model_dump(include={"read_only"}, exclude_none=True)
    may |= {"expires_s": int(time.time()) + body.ttl_s} if body.ttl_s else {}
    there = ctx.request.method == "PUT"
    ctx.act(lambda txn: auth.set_key(txn, ref, key_name, hashed, must_exist=there, **may))
    return JSONResponse(key_name)


@router.delete("/auth/namespaces/{ref}/keys/{key_name}")
def delete_key(ctx: Ctx, ref: str, key_name: str) -> Response:
    def action(txn: Transaction) -> None:
        keys = dict(txn.get(Namespace, ref).keys)
        if keys.pop(key_name, None) is None:
            raise NotFound(f"namespace {ref} has no key {key_name[:80]}")
        auth.change_namespace(txn, ref, f"key {key_name} removed", keys=keys)

    _own(ctx, ref)
    return JSONResponse(ctx.act(action))


@router.post("/auth/namespaces/{ref}/trust")
def add_trust(ctx: Ctx, ref: str, body: TrustBody) -> Response:
    return _trust(ctx, ref, check_name(body.external_namespace, "namespace"), trusted=True)


@router.delete("/auth/namespaces/{ref}/trust/{external}")
def remove_trust(ctx: Ctx, ref: str, external: str) -> Response:
    return _trust(ctx, ref, external, trusted=False)


def _trust(ctx: Context, ref: str, other: str, *, trusted: bool) -> Response:
    def action(txn: Transaction) -> Namespace:
        rest = tuple(name for name in txn.get(Namespace, ref).trust if name != other)
        said = f"trusts {other[:80]}{'' if trusted else ' no more'}"
        return auth.change_namespace(txn, ref, said, trust=(*rest, other) if trusted else rest)

    _own(ctx, ref)
    # A tenant is not told which namespaces there are: whoever is made later is trusted by nobody.
    if trusted and ctx.caller.admin and ctx.read().find(Namespace, other) is None:
        raise Invalid(f"namespace {other[:80]} does not exist")
    return JSONResponse(views.namespace(ctx.act(action)))


def get_quota(ctx: Ctx, ref: str) -> Response:
    """What of each it has, and may have at most."""
    _find(ctx, ref)
    quota, has, store = Quota.of(ctx.read(), ref), used(ctx.read(), ref), ctx.services.namespaces.find(ref)
    has["stored_gb"] = sum(stat.size_bytes for stat in store.backend.list("")) >> 30 if store else 0
    return JSONResponse([{"name": what, "used": has[what], "most": quota.most(what)} for what in DEFAULTS])


router.get("/auth/namespaces/{ref}/quota")(apart(get_quota))


@router.put("/auth/namespaces/{ref}/quota")
@apart
def set_quota(ctx: Admin, ref: str, body: dict[str, Annotated[int, Field(ge=0, le=2**40)]]) -> Response:
    if unknown := body.keys() - DEFAULTS.keys():
        raise Invalid(f"there is no quota of {min(unknown)[:40]}", hint=", ".join(DEFAULTS))
    _find(ctx, ref)
    ctx.act(lambda txn: txn.update(replace(known := Quota.of(txn, ref), limits=known.limits | body)))
    return get_quota(ctx, ref)


add_metadata(router, "/auth/namespaces/{ref}", _find)
add_events(router, "/auth/namespaces/{ref}", _own)
