"""What every request passes before its handler: an id, a limit on its body, the JSON reader, and the counting."""

import re
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import unquote

from fastapi import HTTPException
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compute.errors import Invalid
from imagestore import decimal, read_json

BODY_BYTES = 2**20  # more than any JSON body needs: user data is at most 64 KiB
DRAINED_BYTES = 2**26
_OBJECTS = ("/stores/", "/agent/v1/stores/", "/upload/")  # below these, bodies have bounds of their own
_TOO_LARGE = f"the body has more than {BODY_BYTES} bytes"
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"})
SLASH = "%2F"  # how a slash inside one part of a path reaches the handlers, as in /instances/shop%2Fweb
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class _Asked(Request):
    async def json(self) -> Any:
        try:
            return read_json(await self.body(), most_bytes=BODY_BYTES)
        except ValueError as err:
            raise HTTPException(400, f"the body is no JSON that can be taken: {err}") from err


class Route(APIRoute):
    """A route whose body passes the one JSON reader before anything else sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_first(request: Request) -> Response:
            return await handle(_Asked(request.scope, request.receive))

        return read_first


class Edge:
    """Pure ASGI: streaming answers pass through untouched. registry: one each, or what two servers count adds up."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app, labels, took = app, ["method", "route", "status"], "Time to the last byte"
        self.requests = Counter("sf_api_requests", "Requests answered", labels, registry=registry)
        self.seconds = Histogram("sf_api_request_seconds", took, ["method"], registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"%2f" in (raw := scope.get("raw_path") or b"").lower():
            scope["path"] = unquote(re.sub("%2f", "%252F", raw.decode("ascii"), flags=re.IGNORECASE))
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500
        left = most = 2**40 if scope["path"].startswith(_OBJECTS) else BODY_BYTES

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise Invalid(_TOO_LARGE)
            return message

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if (length := decimal(headers.get(b"content-length", b"").decode("latin-1")) or 0) > most:
                # Most clients send all of it before they read an answer: swallow what is not absurd.
                while length < DRAINED_BYTES and (await receive()).get("more_body"):
                    pass
                body = {"error": _TOO_LARGE, "status": 413, "request_id": request_id}
                await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, marked)
                return
            await self.app(scope, limited, marked)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "none")
            self.requests.labels(method, route, str(status)).inc()
            self.seconds.labels(method).observe(time.perf_counter() - started)
