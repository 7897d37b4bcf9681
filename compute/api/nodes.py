"""/nodes and /admin."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from compute.api import views
from compute.api.context import Admin, Body, Context, Ctx, ask_stores
from compute.api.edge import Route
from compute.api.history import add_events, add_metadata
from compute.cluster import quarantine
from compute.cluster.certificates import authority, certificate
from compute.cluster.quarantine import Quarantined
from compute.cluster.records import nodes as acts
from compute.cluster.records.epochs import epoch
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import Stored
from compute.config import Config
from compute.errors import Conflict, NotFound
from compute.wire.codec import to_plain
from compute.wire.spec import CachedImage

router = APIRouter(tags=["nodes"], route_class=Route)


class CacheBody(Body):
    image: str
    architecture: str = ""


def _find(ctx: Ctx, ref: str) -> Node:
    """By name or UUID."""
    for node in ctx.read().list(Node):
        if ref in (node.name, node.uuid) and node.state != "deleted":
            return node
    raise NotFound(f"node {ref[:80]} not found", hint="see: sf node ls")


Known = Annotated[Node, Depends(_find)]


def _find_to_change(ctx: Context, ref: str) -> Stored:
    if ctx.request.method != "GET":
        ctx.admin()
    return _find(ctx, ref)


def _view(ctx: Context, node: Node) -> dict[str, object]:
    controller, now = ctx.services.controller, epoch(ctx.read())
    alive, server = controller.nodes.alive(node.name), node.name == controller.server
    awaited, used = now.why if node.name in now.waiting else "", controller.usage.of(node)
    return views.node(node, alive=alive, server=server, awaited=awaited) | {"usage": used}


def _living(ctx: Context) -> list[str]:
    return ctx.services.controller.nodes.among(ctx.read().list(Node))


@router.get("/nodes")
def list_nodes(ctx: Ctx) -> Response:
    return JSONResponse([_view(ctx, n) for n in ctx.read().list(Node) if n.state != "deleted"])


@router.post("/nodes/token")
def make_token(ctx: Admin) -> Response:
    """A single-use token for `sf agent --join`."""
    config = ctx.services.config
    if not config.agent_listen:
        hint = "set agent_listen = host:port (SF_AGENT_LISTEN) where other machines reach this one"
        raise Conflict("this server does not listen for agents", hint=hint)
    *_, fingerprint = certificate(config.state_dir / "auth")
    token = ctx.act(lambda txn: acts.make_token(txn, fingerprint))
    return JSONResponse(
        {"token": str(token), "url": f"https://{config.agent_listen}", "expires_in": acts.TOKEN_S}
    )


@router.get("/nodes/orphans")
def list_orphans(ctx: Admin) -> Response:
    """Guests that nodes have and no record knows; they are left as they are."""
    return JSONResponse([views.orphan(one) for one in ctx.read().list(Quarantined)])


@router.post("/nodes/orphans/{uuid}/adopt")
def adopt_orphan(ctx: Admin, uuid: str) -> Response:
    """Make the records of such a guest from what its node knows of it."""
    made = ctx.act(lambda txn: quarantine.adopt(txn, uuid))
    return JSONResponse({"uuid": made.uuid, "name": made.name, "namespace": made.namespace})


@router.delete("/nodes/orphans/{uuid}")
def delete_orphan(ctx: Admin, uuid: str) -> Response:
    """Have such a guest removed by its node, with its disks."""
    return JSONResponse(views.orphan(ctx.act(lambda txn: quarantine.order_deletion(txn, uuid))))


@router.get("/nodes/{ref}")
def get_node(ctx: Ctx, known: Known) -> Response:
    return ctx.show(known, partial(_view, ctx))


@router.get("/nodes/{ref}/cache")
async def cached_images(ctx: Admin, known: Known) -> Response:
    """What its cache holds, complete or not."""
    held = await (await ctx.services.controller.nodes.operations(known.name)).cached("")
    return JSONResponse(to_plain(held, list[CachedImage]))


@router.post("/nodes/{ref}/cache")
async def prefetch_image(ctx: Admin, known: Known, body: CacheBody) -> Response:
    """Have it bring the whole of an image, in the background."""
    node = await ctx.services.controller.nodes.operations(known.name)
    architecture = body.architecture or ctx.services.config.architecture
    found = await ask_stores(ctx.images(ctx.caller.namespace).resolve, body.image, architecture)
    return JSONResponse(to_plain(await node.cached(str(found.digest)), list[CachedImage]))


@router.delete("/nodes/{ref}")
def remove_node(ctx: Admin, known: Known) -> Response:
    """Forget a node and what ran on it; its routers go to others."""
    server, others = ctx.services.controller.server, _living(ctx)
    alive = known.name in others
    remove = partial(acts.remove, name=known.name, server=server, alive=alive, router_nodes=others)
    while not (gone := ctx.act(remove)):
        pass
    return JSONResponse(_view(ctx, gone))


@router.post("/nodes/{ref}/drain")
@router.post("/nodes/{ref}/undrain")
def drain(ctx: Admin, known: Known) -> Response:
    """Place nothing new there and route elsewhere; what runs goes on. Undrained, it is used again."""
    others, drained = _living(ctx), ctx.request.url.path.endswith("/drain")
    changed = ctx.act(lambda txn: acts.drain(txn, known.name, drained=drained, router_nodes=others))
    return JSONResponse(_view(ctx, changed))


@router.get("/admin/cacert")
def authoritys_certificate(request: Request) -> Response:
    """The certificate that the API's is signed with, in PEM, for everybody; null where it is not."""
    config: Config = request.app.state.services.config
    signed = config.tls and not config.tls_cert
    return JSONResponse(authority(config.state_dir / "auth")[0].read_text() if signed else None)


@router.get("/admin/locks")
def locks(ctx: Admin) -> Response:
    """The state store has transactions where others have locks: there is never one to show."""
    return JSONResponse({})


add_metadata(router, "/nodes/{ref}", _find_to_change)
add_events(router, "/nodes/{ref}", _find)
