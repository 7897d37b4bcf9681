"""/screen: a guest's screen in a browser, by noVNC of this machine; /instances/R/vdiconsolehelper for native viewers.

The page is everybody's and knows nothing. What it shows stands behind the # of its address, which a browser sends
nobody: an instance's uuid and a ticket for its stream `vnc` (`api.streams`).
"""

import re
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from compute.api.context import Ctx, Guest
from compute.api.edge import Route
from compute.api.ui.session import HEADERS
from compute.cluster.records.nodes import Node
from compute.errors import Conflict, Denied, NotFound, Unavailable

router = APIRouter(tags=["instances"], route_class=Route)

_PAGE = Path(__file__).with_name("screen.html")
_SCRIPT = re.compile(r"(?:core|vendor)(?:/[A-Za-z0-9_-]{1,64}){1,8}\.js")
_HEADERS = HEADERS | {"Cache-Control": "max-age=300"}


@router.get("/screen", include_in_schema=False)
@router.get("/screen/{name:path}", include_in_schema=False)
def page(request: Request, name: str = "") -> Response:
    novnc: Path = request.app.state.services.config.novnc
    if not (novnc / "core/rfb.js").is_file():
        hint = "there: apt install novnc, or SF_NOVNC; from here: sf instance vnc NAME --listen 5901, and a viewer"
        raise Unavailable(f"the server has no noVNC in {novnc}", hint=hint)
    ours = {"": _PAGE, "screen.js": _PAGE.with_suffix(".js")}
    path = novnc / name if _SCRIPT.fullmatch(name) else ours.get(name)
    if path is None or not path.is_file():
        raise NotFound(f"the screen has no {name[:80]}")
    return FileResponse(path, headers=_HEADERS)


@router.get("/instances/{ref}/vdiconsolehelper")
def viewer(ctx: Ctx, known: Guest) -> Response:
    """What virt-viewer reads, with the password, where it can reach the node: for SPICE."""
    if ctx.caller.read_only:
        raise Denied("a key that may only read sees no screen's password")
    if not known.vdi_port:
        raise Conflict(f"{known.name} shows its screen on no port", hint=f"sf instance vnc {known.name}")
    host, secret = ctx.read().get(Node, known.node).facts["address"], known.extra["vdi_password"]
    told = f"type={known.video['vdi']}\nhost={host}\nport={known.vdi_port}\npassword={secret}\ndelete-this-file=1"
    return Response(f"[virt-viewer]\n{told}\n", media_type="application/x-virt-viewer")
