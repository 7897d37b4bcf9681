"""Who looks at the pages: a token in a cookie that no script reads.

Whatever a page shows or does is a request to the API itself with that token, in this process: the pages can do what
the API can, for whom it can, and nothing else. A form is taken from a page of this server (Origin) that this session
was given (a word made from its token).
"""

import hmac
import re
import time
from collections.abc import Callable, Coroutine
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
HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
# With no-referrer a browser would hide where a form comes from.
HEADERS |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*|[^\[\]])|[^\n\t -\x7e\xa0-\U0010ffff]")
"""What only a terminal makes something of."""

_pages = Environment(loader=PackageLoader("compute.api.ui"), autoescape=True, trim_blocks=True)
_pages.filters["date"] = lambda at_s: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_s))
_pages.filters["bytes"] = lambda count: size_text(count or 0)
_pages.filters["text"] = lambda said: _ESCAPES.sub("", said.decode(errors="replace").replace("\r\n", "\n"))
_pages.filters["zip"] = zip


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
        scope = {**request.scope, "method": "GET", "headers": [*kept, bearer]}
        self.ctx, self._told = Context(Request(scope, request.receive)), [bearer]
        client = (request.client.host, request.client.port) if request.client else ("", 0)
        self._itself = httpx.ASGITransport(request.app, raise_app_exceptions=False, client=client)

    async def api(self, verb: str, *path: str, **body: Any) -> Any:
        """What the API answers this caller. Raises Refused."""
        given = {name: value for name, value in body.items() if value is not None}
        url = f"{self.request.base_url}{'/'.join(quote(part, safe='') for part in path)}"
        asked = httpx.Request(verb, url, headers=self._told, json=given or None)
        answer = await self._itself.handle_async_request(asked)
        await answer.aread()
        plain = answer.json() if answer.headers.get("content-type") == "application/json" else answer.content
        if answer.status_code >= 400:
            raise Refused(answer.status_code, plain if isinstance(plain, dict) else {})
        return plain


async def form(request: Request, word: str = "") -> dict[str, str]:
    """What was filled in; what was left empty is not there. Raises Denied for a form of another page or session."""
    if request.headers.get("origin", "").partition("://")[2] != request.headers.get("host"):
        raise Denied("a page of another server may not send forms")
    try:
        found = dict(parse_qsl((await request.body()).decode(), max_num_fields=64))
    except ValueError as err:
        raise Invalid(f"not a form: {err}") from err
    if not hmac.compare_digest(found.pop("word", "").encode(), word.encode()):
        raise Denied("this form is of another session", hint="load the page again")
    return found


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
