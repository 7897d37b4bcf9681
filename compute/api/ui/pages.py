"""The pages: what the API says of each noun, and forms that become its requests."""

import base64
import re
from asyncio import gather, to_thread
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from compute.api.context import address_of
from compute.api.history import all_events
from compute.api.ui.picture import picture
from compute.api.ui.session import COOKIE, HEADERS, SESSION_S, Page, Refused, Visit, fields, gone_to, shown
from compute.errors import NotFound, Unauthenticated

router = APIRouter(prefix="/ui", route_class=Page, include_in_schema=False)
Asked = Annotated[Visit, Depends(Visit)]

_CONSOLE_BYTES = 1 << 16
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*|[^\[\]])|[^\n\t -\x7e\xa0-\U0010ffff]")
"""What only a terminal makes something of."""
_FILES = {"style.css": "text/css", "live.js": "text/javascript"}
_POSTS = "poweron poweroff rebootsoft reboothard pause unpause snapshot restore backup".split()
_ACTS = {verb: ("POST", verb) for verb in _POSTS} | {
    "schedule": ("PUT", "backup"),
    "unschedule": ("DELETE", "backup"),
    "delete": ("DELETE",),
}
"""A button of an instance: its request, whose body are the form's fields."""


@router.get("")
def start() -> Response:
    return gone_to("instances")


@router.get("/login")
def login_page(request: Request) -> Response:
    address_of(request)
    return shown(None, "login.html")


@router.post("/login")
async def login(request: Request) -> Response:
    given, authority = await fields(request), request.app.state.services.authority
    asked = given.get("namespace", ""), given.get("key", "").strip(), address_of(request)
    try:
        told = await to_thread(authority.login, *asked, lasts_s=SESSION_S)
    except Unauthenticated as err:
        return shown(None, "login.html", 401, error=str(err), asked=asked[0])
    secure, answer = request.url.scheme == "https", gone_to("instances")
    kept: dict[str, Any] = {"path": "/ui", "httponly": True, "samesite": "strict", "secure": secure}
    answer.set_cookie(COOKIE, told["access_token"], SESSION_S, **kept)
    return answer


@router.post("/logout")
async def logout(visit: Asked) -> Response:
    await visit.form()
    answer = gone_to("login")
    answer.delete_cookie(COOKIE, "/ui")
    return answer


@router.get("/events")
def events(visit: Asked) -> Response:
    """What tells a page that there may be news."""
    return all_events(visit.ctx, follow=True)


@router.get("/instances")
async def instances(visit: Asked) -> Response:
    return shown(visit, "instances.html", instances=await visit.api("GET", "instances"))


async def _new(visit: Visit, status: int = 200, **told: Any) -> Response:
    asked = ("artifacts",), ("networks",), ("auth", "namespaces")
    images, networks, spaces = await gather(*(visit.api("GET", *path) for path in asked))
    values = {"given": {}, "images": images, "networks": networks, "namespaces": [s["name"] for s in spaces]}
    return shown(visit, "new.html", status, **values | told)


@router.get("/instances/new")
async def new_instance(visit: Asked) -> Response:
    return await _new(visit)


@router.post("/instances/new")
async def create_instance(visit: Asked) -> Response:
    given = await visit.form()
    asked: dict[str, Any] = {n: given.get(n) for n in ("name", "cpus", "memory", "ssh_key", "namespace")}
    asked["disk"] = [{"size": given.get("disk"), "base": given.get("image")}]
    asked["network"] = [{"network_uuid": given["network"]}] if "network" in given else None
    asked["user_data"] = base64.b64encode(given.get("user_data", "").encode()).decode()
    try:
        made = await visit.api("POST", "instances", **asked)
    except Refused as err:
        return await _new(visit, err.status, error=str(err), hint=err.hint, given=given)
    return gone_to(f"instances/{made['uuid']}")


@router.get("/instances/{ref}")
async def instance(visit: Asked, ref: str) -> Response:
    found, uuid = (one := await visit.api("GET", "instances", ref)), one["uuid"]
    events, snapshots, rules = await gather(
        visit.api("GET", "instances", uuid, "events", limit=20),
        visit.api("GET", "instances", uuid, "snapshot"),
        visit.api("GET", "backups"),
    )
    rule = next((rule for rule in rules if rule["uuid"] == uuid), None)
    return shown(visit, "instance.html", instance=found, events=events, snapshots=snapshots, rule=rule)


@router.get("/instances/{ref}/console")
async def console(visit: Asked, ref: str) -> Response:
    found = await visit.api("GET", "instances", ref)
    data = await visit.api("GET", "instances", ref, "consoledata", length=_CONSOLE_BYTES)
    text = _ESCAPES.sub("", data.decode(errors="replace").replace("\r\n", "\n"))
    return shown(visit, "console.html", instance=found, text=text)


@router.get("/instances/{ref}/confirm/{act}")
async def confirm(visit: Asked, ref: str, act: str, image: str = "") -> Response:
    """Before what cannot be undone."""
    found = await visit.api("GET", "instances", ref)
    return shown(visit, "confirm.html", instance=found, act=act, image=image)


@router.post("/instances/{ref}/{act}")
async def act(visit: Asked, ref: str, act: str) -> Response:
    given = await visit.form()
    if act not in _ACTS:
        raise NotFound(f"nothing here is called {act[:40]}")
    verb, *path = _ACTS[act]
    await visit.api(verb, "instances", ref, *path, **given)
    return gone_to("instances" if act == "delete" else f"instances/{ref}")


@router.get("/images")
async def images(visit: Asked) -> Response:
    return shown(visit, "images.html", images=await visit.api("GET", "artifacts"))


@router.get("/networks")
async def networks(visit: Asked) -> Response:
    found, guests = await gather(visit.api("GET", "networks"), visit.api("GET", "instances"))
    return shown(visit, "networks.html", networks=found, picture=picture(found, guests))


@router.get("/nodes")
async def nodes(visit: Asked) -> Response:
    orphans = await visit.api("GET", "nodes", "orphans") if visit.ctx.caller.admin else []
    return shown(visit, "nodes.html", nodes=await visit.api("GET", "nodes"), orphans=orphans)


@router.get("/quotas")
async def quotas(visit: Asked, namespace: str = "") -> Response:
    name, spaces = namespace or visit.ctx.caller.namespace, await visit.api("GET", "auth", "namespaces")
    rows = await visit.api("GET", "auth", "namespaces", name, "quota")
    return shown(visit, "quotas.html", namespaces=sorted(s["name"] for s in spaces), name=name, rows=rows)


@router.get("/{file}")
def static(file: str) -> Response:
    """Style and script, for everybody."""
    if file not in _FILES:
        raise NotFound(f"no page is called {file[:40]}")
    data = files("compute.api.ui").joinpath("static", file).read_bytes()
    return Response(data, media_type=_FILES[file], headers=HEADERS | {"Cache-Control": "max-age=300"})
