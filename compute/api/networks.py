"""/networks, /interfaces and /rules."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Admin, Body, Context, Ctx, DeleteAllBody, ListBody, NamespaceBody, at
from compute.api.edge import Route
from compute.api.history import add_events, add_metadata
from compute.cluster.records import interfaces, rules
from compute.cluster.records import networks as acts
from compute.cluster.records.addresses import parse_within
from compute.cluster.records.instances import remove_interface
from compute.cluster.records.interfaces import Interface, interfaces_on
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node, router_candidates
from compute.cluster.records.rules import Rules
from compute.cluster.records.transaction import Transaction, new_uuid
from compute.errors import Conflict, Invalid, NotFound
from net import Allow, Limits, ipam

router = APIRouter(tags=["networks"], route_class=Route)
Rate = Annotated[int, Field(ge=0, le=2**40)]


class CreateBody(Body):
    netblock: str = ""
    name: str
    bridge: str | None = None
    """Of the nodes: its guests are on that LAN. The administrator's alone."""
    range: str | None = None
    """`A-B`: what may be handed out of a LAN's netblock; without both, the LAN's own DHCP server gives addresses."""
    gateway: str | None = None  # of a LAN
    ipv6: str | None = None
    """`auto`, or a /64 of the site's that is led to its router: the administrator's alone. The netblock may be ""."""
    slaac: bool | None = None
    isolated: bool | None = None  # nobody may begin to speak to its guests but who their rules allow
    provide_dhcp: bool | None = None
    provide_nat: bool | None = None
    provide_dns: bool | None = None
    namespace: str | None = None


class DeleteNetworksBody(DeleteAllBody):
    clean_wait: bool = False


class RouteBody(Body):
    next_hop: str


class DnsNameBody(Body):
    name: str


class DnsBody(DnsNameBody):
    value: str


class PublishBody(Body):
    ports: str


def _interface(ctx: Ctx, ref: str) -> Interface:
    """Seen by its instance's namespace and by its network's, which may have to unplug it."""
    read = ctx.read()
    found = read.find(Interface, ref)
    if found is None or not (ctx.sees(found) or ctx.sees(read.get(Network, found.network_uuid))):
        raise NotFound(f"interface {ref[:80]} not found", hint="see: sf network show")
    return found


Link = Annotated[Interface, Depends(_interface)]
Lan = Annotated[Network, at(Network)]
Found = Annotated[Rules, at(Rules)]


@router.get("/networks")
def list_networks(ctx: Ctx, body: ListBody | None = None) -> Response:
    shown = [views.network(n) for n in ctx.listed(Network, body)]
    return JSONResponse(sorted(shown, key=lambda view: view["created"]))


@router.post("/networks")
def create_network(ctx: Ctx, body: CreateBody) -> Response:
    config = ctx.services.config
    if body.bridge or body.ipv6 not in (None, "", "auto"):
        ctx.admin()
    if body.bridge and body.ipv6:
        raise Invalid("a LAN's IPv6 is the LAN's own", hint="without ipv6")
    if not body.bridge and (body.range or body.gateway):
        raise Invalid("a range and a gateway are a LAN's", hint="with bridge")
    uuid, seed = new_uuid(), ctx.services.controller.installation
    wanted = Network(
        **body.model_dump(exclude={"namespace", "range", "ipv6"}, exclude_none=True),
        uuid=uuid,
        netblock6=str(ipam.netblock6(body.ipv6, f"{seed}/{uuid}")) if body.ipv6 else "",
        namespace=ctx.namespace(body.namespace),
        vni=0,
    )
    excluded = [*config.excluded, IPv4Network(config.mesh_address), *filter(None, [config.floating_pool])]

    def make(txn: Transaction) -> Network:
        routers = router_candidates(txn, ctx.services.controller.nodes.among(txn.list(Node)))
        return acts.create_network(
            txn, wanted, excluded=excluded, router_nodes=routers, chosen=body.range or ""
        )

    return get_network(ctx, ctx.act(lambda txn: ctx.once(txn, Network, body, make)).uuid)


@router.delete("/networks")
def delete_networks(ctx: Ctx, body: DeleteNetworksBody) -> Response:
    """Every network of a namespace that has no interfaces; answers with their UUIDs."""
    gone = []
    for network in ctx.doomed(Network, body):
        with suppress(*([Conflict] if body.clean_wait else [])):
            gone.append(ctx.act(partial(acts.delete_network, uuid=network.uuid)).uuid)
    return JSONResponse(gone)


@router.get("/networks/{ref}")
def get_network(ctx: Ctx, ref: str, body: NamespaceBody | None = None) -> Response:
    return ctx.show(ctx.find(Network, ref, body.namespace if body else None), views.network)


@router.delete("/networks/{ref}")
def delete_network(ctx: Ctx, ref: str, body: NamespaceBody | None = None) -> Response:
    known = ctx.find(Network, ref, body.namespace if body else None)
    return JSONResponse(views.network(ctx.change(known, acts.delete_network)))


@router.get("/networks/{ref}/interfaces")
def network_interfaces(ctx: Ctx, known: Lan) -> Response:
    return JSONResponse([views.interface(i) for i in interfaces_on(ctx.read(), known.uuid)])


@router.get("/networks/{ref}/addresses")
def network_addresses(ctx: Ctx, known: Lan) -> Response:
    return JSONResponse([] if known.state == "deleted" else acts.addresses(ctx.read(), known))


@router.get("/networks/{ref}/ping/{address}")
async def ping(ctx: Ctx, known: Lan, address: str) -> Response:
    """Ping from inside the network, on the node that routes it."""
    six = known.block6 if ":" in address or known.six_alone else None
    target = parse_within(address, six or IPv4Network(known.netblock))
    network = await asyncio.to_thread(acts.find_routed, ctx.read(), known.uuid)
    node = await ctx.services.controller.nodes.operations(acts.routing(network))
    stdout, stderr = await node.ping(known.uuid, target)
    return JSONResponse({"stdout": stdout, "stderr": stderr})


@router.get("/networks/{ref}/doctor")
async def doctor(ctx: Admin, known: Lan) -> Response:
    """What is not as it should be, on every node: `[{node, problem, fix}]`. It tells of the hosts: not for tenants."""
    return JSONResponse(await ctx.services.controller.examine(known.name))


@router.post("/networks/{ref}/route")
def route(ctx: Ctx, known: Lan, body: RouteBody | None = None) -> Response:
    """An address that is routed to `next_hop`, or to the network's only guest."""
    hops = [body.next_hop] if body else [i.address for i in interfaces_on(ctx.read(), known.uuid)]
    if len(hops) != 1:
        raise Invalid(f"{len(hops)} guests are on network {known.name}", hint="next_hop: the address of one")
    return JSONResponse(ctx.change(known, lambda txn, uuid: acts.route(txn, uuid, hops[0])))


@router.delete("/networks/{ref}/route/{address}")
def unroute(ctx: Ctx, known: Lan, address: str) -> Response:
    return JSONResponse(ctx.change(known, partial(acts.unroute, address=address)))


@router.post("/networks/{ref}/dns")
def set_dns(ctx: Ctx, known: Lan, body: DnsBody) -> Response:
    return JSONResponse(ctx.change(known, partial(acts.set_dns, **body.model_dump())))


@router.delete("/networks/{ref}/dns")
def remove_dns(ctx: Ctx, known: Lan, body: DnsNameBody) -> Response:
    return JSONResponse(ctx.change(known, partial(acts.set_dns, name=body.name, value=None)))


@router.get("/interfaces/{ref}")
def get_interface(ctx: Ctx, known: Link) -> Response:
    return ctx.show(known, views.interface)


@router.delete("/interfaces/{ref}")
def unplug_interface(ctx: Ctx, known: Link) -> Response:
    """Take it out of its running instance."""
    return JSONResponse(ctx.change(known, lambda txn, uuid: remove_interface(txn, txn.get(Interface, uuid))))


@router.post("/interfaces/{ref}/float")
@router.post("/interfaces/{ref}/defloat")
def float_interface(ctx: Ctx, known: Link) -> Response:
    act = partial(interfaces.float_interface, on=ctx.request.url.path.endswith("/float"))
    return JSONResponse(views.interface(ctx.change(known, act)))


@router.post("/interfaces/{ref}/publish")
async def publish(ctx: Ctx, known: Link, body: PublishBody) -> Response:
    """Lead ports of the router node's own addresses to it: `8080:80`, `53:53/udp`, `9000-9009:9000-9009`."""
    wanted = interfaces.parse_published(body.ports)
    network = await asyncio.to_thread(acts.find_routed, ctx.read(), known.network_uuid)
    node = await ctx.services.controller.nodes.operations(acts.routing(network))
    used = await node.listening()
    act = partial(interfaces.publish, wanted=wanted, listening=used, admin=ctx.caller.admin)
    return JSONResponse(views.interface(await asyncio.to_thread(ctx.change, known, act)))


@router.delete("/interfaces/{ref}/publish")
def unpublish(ctx: Ctx, known: Link, body: PublishBody) -> Response:
    act = partial(interfaces.unpublish, wanted=interfaces.parse_published(body.ports))
    return JSONResponse(views.interface(ctx.change(known, act)))


class LimitsBody(Body):
    bytes_in: Rate = 0
    bytes_out: Rate = 0
    packets_in: Rate = 0
    packets_out: Rate = 0


@router.put("/interfaces/{ref}/limits")
def limit(ctx: Ctx, known: Link, body: LimitsBody) -> Response:
    """How much passes in a second, to the guest (in) and from it (out); 0 is without limit."""
    limits = Limits(**body.model_dump())
    ctx.change(known, lambda txn, uuid: txn.update(replace(txn.get(Interface, uuid), limits=limits)))
    return get_interface(ctx, _interface(ctx, known.uuid))


class AllowBody(Body):
    allow: list[str] = Field(max_length=256)
    """`tcp:80,443`, `tcp:22@192.0.2.0/24`, `udp:53@NETWORK`, `icmp`, `any`."""


class RulesBody(AllowBody):
    name: str
    namespace: str | None = None


class AttachBody(Body):
    rules: str


def _allow(ctx: Context, body: AllowBody, namespace: str) -> tuple[Allow, ...]:
    """A network, one of the rules' own namespace, stands for the netblocks that it has now."""
    own = ctx.listed(Network, ListBody(namespace=namespace))
    seen = [network for network in own if network.netblock != str(ipam.ANY)]
    blocks = {n.name: n.netblock6 if n.six_alone else n.netblock for n in seen}
    six = {n.name: n.netblock6 for n in seen if n.netblock6 and not n.six_alone}
    also = (text for text in body.allow if text.partition("@")[2] in six)
    return tuple(rules.parse(text, blocks) for text in body.allow) + tuple(rules.parse(t, six) for t in also)


@router.get("/rules")
def list_rules(ctx: Ctx, body: ListBody | None = None) -> Response:
    return JSONResponse([views.rules(item) for item in ctx.listed(Rules, body)])


@router.post("/rules")
def create_rules(ctx: Ctx, body: RulesBody) -> Response:
    namespace = ctx.namespace(body.namespace)
    wanted = Rules(uuid=new_uuid(), name=body.name, namespace=namespace, allow=_allow(ctx, body, namespace))
    made = ctx.act(lambda txn: ctx.once(txn, Rules, body, lambda t: rules.create_rules(t, wanted)))
    return JSONResponse(views.rules(made))


@router.get("/rules/{ref}")
def get_rules(ctx: Ctx, found: Found) -> Response:
    return ctx.show(found, views.rules)


@router.put("/rules/{ref}")
def set_rules(ctx: Ctx, found: Found, body: AllowBody) -> Response:
    """Other rules under the name, at once wherever they are attached."""
    allow = _allow(ctx, body, found.namespace)
    ctx.change(found, lambda txn, uuid: txn.update(replace(txn.get(Rules, uuid), allow=allow)))
    return get_rules(ctx, ctx.find(Rules, found.uuid))


@router.delete("/rules/{ref}")
def delete_rules(ctx: Ctx, found: Found) -> Response:
    return JSONResponse(views.rules(ctx.change(found, rules.delete_rules)))


@router.post("/interfaces/{ref}/rules")
@router.delete("/interfaces/{ref}/rules")
def attach_rules(ctx: Ctx, known: Link, body: AttachBody) -> Response:
    """POST attaches them, DELETE takes them away; twice is once."""
    wanted, on = ctx.find(Rules, body.rules).uuid, ctx.request.method == "POST"
    act = partial(rules.attach_rules, rules_uuid=wanted, on=on)
    return JSONResponse(views.interface(ctx.change(known, act)))


add_metadata(router, "/networks/{ref}", lambda ctx, ref: ctx.find(Network, ref))
add_events(router, "/networks/{ref}", lambda ctx, ref: ctx.find(Network, ref))
add_metadata(router, "/interfaces/{ref}", _interface)
