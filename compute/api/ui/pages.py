"""The pages: what the API says of each noun, and forms that become its requests."""

import base64
from asyncio import gather, to_thread
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from compute.api.context import address_of
from compute.api.history import all_events
from compute.api.ui.session import COOKIE, HEADERS, SESSION_S, Page, Refused, Visit, form, gone_to, shown
from compute.errors import NotFound, Unauthenticated

router = APIRouter(prefix="/ui", route_class=Page, include_in_schema=False)
Asked = Annotated[Visit, Depends(Visit)]

_ONE = {"instance": "instances/{ref}"}
_PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "": ("instances", {"instances": "instances"}),
    "/instances": ("instances", {"instances": "instances"}),
    "/instances/new": ("new", {"images": "artifacts", "networks": "networks", "spaces": "auth/namespaces"}),
    "/instances/{ref}": ("instance", _ONE | {w: f"instances/{{ref}}/{w}" for w in ("events", "snapshot")}),
    "/instances/{ref}/console": ("console", _ONE | {"said": "instances/{ref}/consoledata"}),
    "/instances/{ref}/confirm": ("confirm", _ONE),
    "/images": ("images", {"images": "artifacts"}),
    "/networks": ("networks", {"networks": "networks", "instances": "instances", "rules": "rules"}),
    "/networks/{ref}": ("network", {"network": "networks/{ref}", "findings": "networks/{ref}/doctor"}),
    "/nodes": ("nodes", {"nodes": "nodes", "orphans": "nodes/orphans"}),
    "/quotas": ("quotas", {"spaces": "auth/namespaces", "rows": "auth/namespaces/{namespace}/quota"}),
}  # path: its template, and the words in it with what the API is asked for each
_PAGES["/instances/{ref}"][1]["rules"] = "backups"
_POSTS = "poweron poweroff rebootsoft reboothard pause unpause snapshot restore backup".split()
_ACTS = {verb: ("POST", verb) for verb in _POSTS} | {
    "schedule": ("PUT", "backup"),
    "unschedule": ("DELETE", "backup"),
    "delete": ("DELETE",),
    "screen": ("POST", "streams", "vnc"),
}  # a button of an instance: its request, whose body are the form's fields


@router.api_route("/login", methods=["GET", "POST"])
async def login(request: Request) -> Response:
    address, authority = address_of(request), request.app.state.services.authority
    given = await form(request) if request.method == "POST" else {}
    space, key = given.get("namespace", ""), given.get("key", "").strip()
    if not given:
        return shown(None, "login.html")
    try:
        told = await to_thread(authority.login, space, key, address, lasts_s=SESSION_S)
    except Unauthenticated as err:
        return shown(None, "login.html", 401, error=str(err), asked=space)
    secure, answer = request.url.scheme == "https", gone_to("instances")
    kept: Any = {"path": "/ui", "httponly": True, "samesite": "strict", "secure": secure}
    answer.set_cookie(COOKIE, told["access_token"], SESSION_S, **kept)
    return answer


@router.post("/logout")
async def logout(visit: Asked) -> Response:
    await form(visit.request, visit.word)
    answer = gone_to("login")
    answer.delete_cookie(COOKIE, "/ui")
    return answer


@router.get("/events")
def events(visit: Asked) -> Response:
    """What tells a page that there may be news."""
    return all_events(visit.ctx, follow=True)


async def _page(visit: Visit, path: str, status: int = 200, **told: Any) -> Response:
    template, asked = _PAGES[path]
    query, caller = visit.request.query_params, visit.ctx.caller
    names = {"namespace": caller.namespace, **query, **visit.request.path_params}
    asked = {word: path for word, path in asked.items() if word != "orphans" or caller.admin}
    paths = [[part.format_map(names) for part in path.split("/")] for path in asked.values()]
    found = await gather(*(visit.api("GET", *parts) for parts in paths))
    values = {"query": names, **dict(zip(asked, found, strict=True)), **told}
    return shown(visit, f"{template}.html", status, **values)


def _add(path: str) -> None:
    @router.get(path)
    async def page(visit: Asked) -> Response:
        return await _page(visit, path)


for _path in _PAGES:
    _add(_path)


@router.post("/instances/new")
async def create_instance(visit: Asked) -> Response:
    given = await form(visit.request, visit.word)
    asked: dict[str, Any] = {n: given.get(n) for n in ("name", "cpus", "memory", "ssh_key", "namespace")}
    asked["disk"] = [{"size": given.get("disk"), "base": given.get("image")}]
    asked["network"] = [{"network_uuid": given["network"]}] if "network" in given else None
    asked["user_data"] = base64.b64encode(given.get("user_data", "").encode()).decode()
    try:
        made = await visit.api("POST", "instances", **asked)
    except Refused as err:
        return await _page(visit, "/instances/new", err.status, error=str(err), hint=err.hint, given=given)
    return gone_to(f"instances/{made['uuid']}")


@router.post("/instances/{ref}/{act}")
async def act(visit: Asked, ref: str, act: str) -> Response:
    given = await form(visit.request, visit.word)
    if act not in _ACTS:
        raise NotFound(f"nothing here is called {act[:40]}")
    verb, *path = _ACTS[act]
    done = await visit.api(verb, "instances", ref, *path, **given)
    if act == "screen":
        return RedirectResponse(f"/screen#{ref}.{done['ticket']}", 303, HEADERS)
    return gone_to("instances" if act == "delete" else f"instances/{ref}")


@router.get("/static/{file}")
def static(file: Literal["style.css", "live.js"]) -> Response:
    """For everybody."""
    data = files("compute.api.ui").joinpath("static", file).read_bytes()
    kind = "text/javascript" if file.endswith(".js") else "text/css"
    return Response(data, media_type=kind, headers=HEADERS | {"Cache-Control": "max-age=300"})
