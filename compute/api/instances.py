"""/instances: what users run."""

import time
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from compute.api import views
from compute.api.context import Body, Context, Ctx, DeleteAllBody, Guest, ListBody, NamespaceBody, apart
from compute.api.edge import Route
from compute.api.history import add_events, add_metadata
from compute.cluster.images.artifacts import resolve_disks, want
from compute.cluster.images.snapshots import offered
from compute.cluster.quotas import enforce
from compute.cluster.records import instances as acts
from compute.cluster.records.instances import NO_VIDEO, Instance
from compute.cluster.records.interfaces import Interface, Want
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.rules import Rules
from compute.cluster.records.snapshots import snapshots_of, take
from compute.cluster.records.transaction import Transaction, new_uuid
from compute.cluster.scheduler import Judged, unreadable, weigh
from compute.cluster.scheduler import create_instance as create
from compute.cluster.scheduler import set_instance as change
from compute.errors import Conflict, Invalid
from compute.wire.codec import Base64, to_json, to_plain
from compute.wire.spec import AGENT_CHANNEL
from net import ipam, own_macs

router = APIRouter(tags=["instances"], route_class=Route)

USER_DATA_BYTES = 2**16
_MOST_S = 10 * 366 * 86400.0
Loss = Literal["leave", "restart", "restore"]


class DiskBody(Body):
    size: int | None = Field(default=None, ge=0, le=2**20)  # GB
    base: str | None = None
    bus: str | None = None
    type: str | None = None


class NetworkBody(Body):
    network_uuid: str
    address: str | None = None
    macaddress: str | None = None
    model: str | None = None
    rules: str | None = None
    float: bool | None = None


class VideoBody(Body):
    model: Literal["cirrus", "virtio", "vga", "qxl", "bochs", "none"] = "cirrus"
    memory: int = Field(default=16384, ge=0, le=2**18)  # KiB
    vdi: Literal["vnc", "spice", "none", ""] | None = None

    def given(self) -> dict[str, Any]:
        """What the guest gets; virtio's card has no memory of its own. Raises Invalid."""
        vdi, most = None if self.vdi in ("none", "") else self.vdi, 16384 if self.model == "cirrus" else 2**18
        memory = 0 if self.model in ("virtio", "none") else self.memory
        if memory and (memory.bit_count() != 1 or not 4096 <= memory <= most):
            raise Invalid(f"video: memory is {memory} KiB", hint=f"4096, twice or four times that, … {most}")
        if vdi and self.model == "none":
            raise Invalid(f"video: {vdi} shows a card, and the model is none")
        return {"model": self.model, "memory": memory, "vdi": vdi}


class CreateBody(Body):
    name: str
    cpus: int
    memory: int  # MB
    disk: list[DiskBody]
    network: list[NetworkBody] | None = None
    ssh_key: str | None = Field(default=None, max_length=USER_DATA_BYTES)
    user_data: Base64 | None = Field(default=None, max_length=USER_DATA_BYTES)
    placed_on: str | None = None
    namespace: str | None = None
    video: VideoBody | None = None
    uefi: bool | None = None
    secure_boot: bool | None = None
    nvram_template: str | None = None
    tpm: bool = False
    cpu_model: str = ""
    configdrive: Literal["openstack-disk", "none"] | None = None
    metadata: dict[str, Any] | None = None
    side_channels: list[str] | None = None
    ttl: float | None = Field(default=None, gt=0, le=_MOST_S)  # seconds, after which it is deleted
    lease: float | None = Field(default=None, ge=5, le=3600)
    """Seconds, after which it is deleted unless its maker renews that: POST /instances/R/lease."""
    ephemeral: bool = False  # it is deleted once it is off
    on_node_loss: Loss | None = None
    sync: bool = False
    """Fetch an image that no store has, where a source list names it: the administrator's word."""
    node_labels: dict[str, str] = Field(default={}, max_length=16)
    """Only on a node that has all of these in its metadata."""
    dry_run: bool = False
    """Make nothing. Answers with every node: the one that it would be placed on first, and why not on the others."""


class SetBody(Body):
    name: str | None = None
    cpus: int | None = None
    memory: int | None = Field(default=None, serialization_alias="memory_mib")  # MB
    disks: dict[str, Annotated[int, Field(ge=1, le=2**20)]] | None = None  # device: GB
    autostart: Literal["yes", "no", "last"] | None = None
    order: int | None = Field(default=None, ge=0, le=9)
    delay_s: int | None = Field(default=None, ge=0, le=600)
    on_node_loss: Loss | None = None
    ttl: float | None = Field(default=None, ge=0, le=_MOST_S)
    """Seconds from now, after which it is deleted; 0: it stays."""


class SnapshotBody(Body):
    warm: bool = False
    """With its memory, as what later instances of its image and size begin, instead of booting; the end of this one."""


class LeaseBody(Body):
    seconds: float = Field(ge=0, le=3600)


class PowerOffBody(Body):
    timeout_s: int = Field(default=0, ge=0, le=86400)
    """How long the guest is asked to end before its power is taken; 0: at once."""


class PlugBody(Body):
    network: NetworkBody


class ConsoleBody(Body):
    length: int = Field(default=10240, ge=-1, le=2**31)


def _view(ctx: Context, item: Instance, links: Iterable[Interface] | None = None) -> dict[str, Any]:
    links = acts.interfaces_of(ctx.read(), item.uuid) if links is None else links
    used = ctx.services.controller.usage.of(item)
    return views.instance(item, links, ctx.caller.read_only) | {"usage": used}


@router.get("/instances")
def list_instances(ctx: Ctx, body: ListBody | None = None) -> Response:
    interfaces: dict[str, list[Interface]] = defaultdict(list)
    for interface in ctx.read().list(Interface):
        interfaces[interface.instance_uuid].append(interface)
    found = [_view(ctx, item, interfaces[item.uuid]) for item in ctx.listed(Instance, body)]
    return Response(to_json(sorted(found, key=lambda view: view["created"])), media_type="application/json")


@router.post("/instances")
@apart
def create_instance(ctx: Ctx, body: CreateBody) -> Response:
    """Records the wish and answers; the node does the rest. Poll `state`."""
    namespace = ctx.namespace(body.namespace)
    config, controller = ctx.services.config, ctx.services.controller
    wanted = tuple(d.model_dump() for d in body.disk)
    if body.nvram_template:
        raise Invalid("NVRAM templates are not offered", hint="secure_boot has one with Microsoft's keys")
    if body.configdrive == "none" and (body.ssh_key or body.user_data):
        raise Invalid("without a config drive nothing hands the guest its ssh_key or user_data")
    channels = [AGENT_CHANNEL] if body.side_channels is None else body.side_channels
    if unknown := set(channels) - {AGENT_CHANNEL, "sf-agent", "sf-agent2"}:
        hint = f"leave side_channels out, or name {AGENT_CHANNEL}: qemu-guest-agent answers there"
        raise Invalid(f"no side channel {min(unknown)[:80]!r} is offered", hint=hint)
    made = ctx.made_before(ctx.read(), Instance, body)
    if made is None:
        sync = config.sync_names or (body.sync and ctx.caller.admin)
        same = "name cpus ssh_key configdrive secure_boot tpm cpu_model metadata ephemeral on_node_loss"
        instance = Instance(
            **body.model_dump(include={*same.split(), "node_labels"}, exclude_none=True),
            uuid=new_uuid(),
            namespace=namespace,
            node=body.placed_on or "",
            memory_mib=body.memory,
            # Stores are asked here: what a transaction does may be repeated.
            disks=resolve_disks(ctx.images(namespace), wanted, config.architecture, config.sources, sync),
            disk_spec=wanted,
            user_data=body.user_data or b"",
            video=body.video.given() if body.video else NO_VIDEO,
            uefi=bool(body.uefi or body.secure_boot),
            side_channels=(AGENT_CHANNEL,) if channels else (),
            until_s=_after(body.ttl),
            held_s=_after(body.lease),
        )
        instance = offered(ctx.read(), ctx.services.namespaces, instance, config.architecture)
        wants = [_want(ctx, network, namespace) for network in body.network or ()]
        images = {disk.image for disk in instance.disks if disk.image and not disk.store}
        closed = unreadable(ctx.services.resolver.stores, ctx.read().list(Node), images, controller.server)
        usable, used = controller.nodes.usable() | closed, controller.usage.of
        seen: dict[str, Any] = {"limits": config, "usable": usable, "used": used}

        def make(txn: Transaction) -> Instance:
            for name in {disk.image_name for disk in instance.disks if disk.pending}:
                want(txn, namespace, name)
            return create(txn, instance, wants, **seen)

        if body.dry_run:
            _, found = weigh(ctx.read(), instance, **seen)
            if any(one.fits for one in found):  # whatever else is in the way is said in the same words
                make(trial := ctx.read())
                enforce(trial)
            return JSONResponse(to_plain(found, list[Judged]))
        made = ctx.act(lambda txn: ctx.once(txn, Instance, body, make), queued=True)
    return get_instance(ctx, made.uuid)


def _after(seconds: float | None) -> float:
    return time.time() + seconds if seconds else 0


def _want(ctx: Context, body: NetworkBody, namespace: str) -> Want:
    network = ctx.find(Network, body.network_uuid, namespace)
    if network.bridge and (body.address or body.macaddress):  # it might be anybody's on the LAN
        ctx.admin()
    nodes = [node.name for node in ctx.read().list(Node)]
    own = own_macs(ctx.services.controller.installation, network.vni, nodes)
    if body.macaddress and ipam.check_mac(body.macaddress) in own:
        hint = "give none to have one chosen"
        raise Conflict(f"{body.macaddress} is a MAC address of the network itself", hint=hint)
    asked = body.address or "", body.macaddress or "", body.model or "virtio", bool(body.float)
    rules = (ctx.find(Rules, body.rules, namespace).uuid,) if body.rules else ()
    return Want(network.uuid, *asked, rules)


@router.delete("/instances")
def delete_instances(ctx: Ctx, body: DeleteAllBody) -> Response:
    """Every instance of a namespace; answers with their UUIDs."""
    doomed = ctx.doomed(Instance, body)
    return JSONResponse([ctx.act(partial(acts.delete_instance, uuid=one.uuid)).uuid for one in doomed])


@router.get("/instances/{ref}")
def get_instance(ctx: Ctx, ref: str, body: NamespaceBody | None = None) -> Response:
    return ctx.show(ctx.find(Instance, ref, body.namespace if body else None), partial(_view, ctx))


@router.patch("/instances/{ref}")
def set_instance(ctx: Ctx, known: Guest, body: SetBody) -> Response:
    """Change what is given, leave the rest. Disks grow at once, the rest counts from the next start on."""
    changes = body.model_dump(exclude_none=True, by_alias=True)
    if body.ttl is not None:
        changes["until_s"] = _after(changes.pop("ttl"))
    usable, used = ctx.services.controller.nodes.usable(), ctx.services.controller.usage.of
    act = partial(change, changes=changes, limits=ctx.services.config, usable=usable, used=used)
    return JSONResponse(_view(ctx, ctx.change(known, act)))


@router.post("/instances/{ref}/lease")
def renew_lease(ctx: Ctx, known: Guest, body: LeaseBody) -> Response:
    """Its maker is there, and says so again within these seconds; 0: it needs nobody from now on."""
    changed = ctx.change(known, partial(acts.hold, seconds=body.seconds))
    return JSONResponse({"held_until": changed.held_s or None})


@router.delete("/instances/{ref}")
def delete_instance(ctx: Ctx, ref: str, body: NamespaceBody | None = None) -> Response:
    known = ctx.find(Instance, ref, body.namespace if body else None)
    return JSONResponse(_view(ctx, ctx.change(known, acts.delete_instance)))


@router.post("/instances/{ref}/rebootsoft")
@router.post("/instances/{ref}/reboothard")
@router.post("/instances/{ref}/poweron")
@router.post("/instances/{ref}/pause")
@router.post("/instances/{ref}/unpause")
def power(ctx: Ctx, known: Guest) -> Response:
    act = partial(acts.power, verb=ctx.request.url.path.rpartition("/")[2])
    return JSONResponse(_view(ctx, ctx.change(known, act)))


@router.post("/instances/{ref}/poweroff")
def poweroff(ctx: Ctx, known: Guest, body: PowerOffBody | None = None) -> Response:
    """Takes its power: at once, or once the guest was asked to end for `timeout_s`. Poll `power_state`."""
    act = partial(acts.power, verb="poweroff", grace_s=body.timeout_s if body else 0)
    return JSONResponse(_view(ctx, ctx.change(known, act)))


@router.get("/instances/{ref}/interfaces")
def get_interfaces(ctx: Ctx, known: Guest) -> Response:
    return JSONResponse([views.interface(i) for i in acts.interfaces_of(ctx.read(), known.uuid)])


@router.post("/instances/{ref}/interfaces")
def plug_interface(ctx: Ctx, known: Guest, body: PlugBody) -> Response:
    want = _want(ctx, body.network, known.namespace)
    add = partial(acts.add_interface, uuid=known.uuid, want=want)
    return JSONResponse(views.interface(ctx.act(lambda txn: ctx.once(txn, Interface, body, add))))


@router.get("/instances/{ref}/snapshot")
def list_snapshots(ctx: Ctx, known: Guest) -> Response:
    """The newest first."""
    return JSONResponse([views.snapshot(one) for one in snapshots_of(ctx.read(), known.uuid)])


@router.post("/instances/{ref}/snapshot")
def take_snapshot(ctx: Ctx, known: Guest, body: SnapshotBody | None = None) -> Response:
    """Of all its disks at one moment, into the namespace's own store. Poll the list for its `state`."""
    act = partial(take, warm=bool(body and body.warm))
    return JSONResponse(views.snapshot(ctx.change(known, act)))


@router.get("/instances/{ref}/consoledata")
async def get_console(ctx: Ctx, known: Guest, body: ConsoleBody | None = None) -> Response:
    """What the guest wrote on its serial console: raw bytes."""
    node = await ctx.services.controller.nodes.operations(known.node)
    said = await node.console(known.uuid, (body or ConsoleBody()).length)
    return Response(said, media_type="text/plain; charset=utf-8")


@router.delete("/instances/{ref}/consoledata")
async def clear_console(ctx: Ctx, known: Guest) -> Response:
    await (await ctx.services.controller.nodes.operations(known.node)).clear_console(known.uuid)
    return JSONResponse(None)


add_metadata(router, "/instances/{ref}", lambda ctx, ref: ctx.find(Instance, ref))
add_events(router, "/instances/{ref}", lambda ctx, ref: ctx.find(Instance, ref))
