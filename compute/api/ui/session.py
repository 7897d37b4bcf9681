"""Who looks at the pages: a token in a cookie that no script reads.

Whatever a page shows or does is a request to the API itself with that token, in this process: the pages can do what
the API can, for whom it can, and nothing else. A form is taken from a page of this server (Origin) that this session
was given (a word made from its token).
"""

import hmac
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, quote

import httpx
from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader

from compute.api.context import Context
from compute.api.problems import status_of
from compute.errors import ComputeError, Denied, Invalid, Unauthenticated
from imagestore import size_text

COOKIE, SESSION_S = "sf-session", 8 * 3600
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
HEADERS["Referrer-Policy"] = "same-origin"  # with no-referrer a browser would hide where a form comes from


def _ago(gone_s: float) -> str:
    units = ("d", 86400), ("h", 3600), ("min", 60), ("s", 1)
    unit, each_s = next(((u, s) for u, s in units if abs(gone_s) >= s), units[-1])
    return f"{gone_s / each_s:.0f} {unit} ago" if gone_s >= 0 else f"in {-gone_s / each_s:.0f} {unit}"


_pages = Environment(loader=PackageLoader("compute.api.ui"), autoescape=True, trim_blocks=True)
_pages.filters["iso"] = lambda at_s: datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
_pages.filters["ago"] = lambda at_s: _ago(time.time() - at_s)
_pages.filters["bytes"] = lambda count: size_text(count or 0)


class Refused(ComputeError):
    """The API's answer to a page, in its own words."""

    def __init__(self, status: int, said: dict[str, Any]) -> None:
        super().__init__(str(said.get("error", status)), hint=str(said.get("hint", "")))
        self.status = status


class Visit:
    """One request of somebody who is logged in. Raises Unauthenticated, Denied over plain HTTP from elsewhere."""

    def __init__(self, request: Request) -> None:
        token, self.request = request.cookies.get(COOKIE, ""), request
        self.word = hmac.digest(token.encode(), b"form", "sha256").hex()
        bearer = (b"authorization", f"Bearer {token}".encode())
        kept = [(name, value) for name, value in request.headers.raw if name != bearer[0]]
        self.ctx = Context(Request({**request.scope, "headers": [*kept, bearer]}, request.receive))
        client = (request.client.host, request.client.port) if request.client else ("", 0)
        itself = httpx.ASGITransport(request.app, raise_app_exceptions=False, client=client)
        url = f"{request.url.scheme}://{request.url.netloc}"
        self._api = partial(
            httpx.AsyncClient, transport=itself, base_url=url, headers=[bearer], trust_env=False
        )

    async def api(self, verb: str, *path: str, **body: Any) -> Any:
        """What the API answers this caller. Raises Refused."""
        given = {name: value for name, value in body.items() if value is not None}
        async with self._api() as api:
            answer = await api.request(
                verb, "/".join(quote(p, safe="") for p in ("", *path)), json=given or None
            )
        plain = answer.json() if answer.headers.get("content-type") == "application/json" else answer.content
        if answer.status_code >= 400:
            raise Refused(answer.status_code, plain if isinstance(plain, dict) else {})
        return plain

    async def form(self) -> dict[str, str]:
        """What was filled in. Raises Denied for a form of another page."""
        found = await fields(self.request)
        if not hmac.compare_digest(found.pop("word", "").encode(), self.word.encode()):
            raise Denied("this form is of another session", hint="load the page again")
        return found


async def fields(request: Request) -> dict[str, str]:
    """A form's fields; those left empty are not there. Raises Denied where it is no page of ours, Invalid."""
    if request.headers.get("origin", "").partition("://")[2] != request.headers.get("host"):
        raise Denied("a page of another server may not send forms")
    try:
        return dict(parse_qsl((await request.body()).decode(), max_num_fields=64))
    except ValueError as err:
        raise Invalid(f"not a form: {err}") from err


def shown(visit: Visit | None, template: str, status: int = 200, **values: Any) -> Response:
    """A page. Everything in it is escaped."""
    known = {"who": visit.ctx.caller, "word": visit.word} if visit else {}
    return HTMLResponse(_pages.get_template(template).render(known | values), status, HEADERS)


def gone_to(path: str) -> Response:
    """After a form: the page to load."""
    return RedirectResponse(f"/ui/{path}", 303, HEADERS)


class Page(APIRoute):
    """A route whose errors are pages; without a session it is the way to log in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def show(request: Request) -> Response:
            try:
                return await handle(request)
            except ComputeError as err:
                status = err.status if isinstance(err, Refused) else status_of(err)
                if isinstance(err, Unauthenticated) and not request.url.path.endswith(("/login", "/events")):
                    return gone_to("login")
                return shown(None, "error.html", status, error=str(err), hint=err.hint)

        return show
