"""Errors as answers: one table from exceptions to statuses, one shape, and the request id that finds it in the log."""

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from compute import errors as compute
from imagestore import errors as images
from net import errors as net

log = logging.getLogger(__name__)

_TRACE = 4000

STATUSES: dict[type[Exception], int] = {
    compute.Invalid: 400,
    compute.Unauthenticated: 401,
    compute.Denied: 403,
    compute.NotFound: 404,
    compute.NotReady: 406,
    compute.Conflict: 409,
    compute.Precondition: 412,
    compute.Unavailable: 503,
    compute.NoCapacity: 507,
    compute.NoSpace: 507,
    images.Invalid: 400,
    images.NotFound: 404,
    images.Conflict: 409,
    images.StoreError: 503,
    images.NoSpace: 507,
    net.Invalid: 400,
    net.Conflict: 409,
    net.Exhausted: 507,
    ClientDisconnect: 400,
}


_MESSAGE_LENGTH = 1000  # what is said back of a request's own words has an end


def answer(request: Request, status: int, message: str, hint: str = "") -> JSONResponse:
    """The shape of every error."""
    body: dict[str, Any] = {"error": message[:_MESSAGE_LENGTH], "status": status}
    if hint:
        body["hint"] = hint
    body["request_id"] = getattr(request.state, "request_id", "")
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status, headers)


def status_of(error: Exception) -> int:
    for cls in type(error).__mro__:
        if cls in STATUSES:
            return STATUSES[cls]
    return 500


async def _known(request: Request, error: Exception) -> JSONResponse:
    status = status_of(error)
    if status >= 500 and status != 507:
        log.warning("request %s: %s", getattr(request.state, "request_id", ""), error)
    return answer(request, status, str(error), getattr(error, "hint", ""))


async def _invalid(request: Request, error: Any) -> JSONResponse:
    first: Any = next(iter(error.errors()), {})
    where = ".".join(str(part)[:80] for part in first.get("loc", ()) if part not in ("body", "query", "path"))
    message = "unknown key" if first.get("type") == "extra_forbidden" else first.get("msg", "not valid")
    return answer(request, 400, f"{where}: {message}" if where else f"the body: {message}")


async def _http(request: Request, error: Any) -> JSONResponse:
    message = f"no such path: {request.url.path}" if error.status_code == 404 else str(error.detail)
    return answer(request, error.status_code, message)


async def _system(request: Request, error: Any) -> JSONResponse:
    """A disk that is full when something arrives is no fault of the server's."""
    if error.errno in images.DISK_FULL:
        return answer(request, 507, "the server's disk is full", "sf doctor says which")
    return await _unknown(request, error)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("request %s failed: %s", getattr(request.state, "request_id", ""), compute.brief(error))
    log.debug("%s", "".join(traceback.format_exception(error, limit=-10))[-_TRACE:])
    return answer(request, 500, f"internal error: {type(error).__name__}", "the server's log has the details")


def install(app: FastAPI) -> None:
    for cls in (compute.ComputeError, images.StoreError, net.NetError, ClientDisconnect):
        app.add_exception_handler(cls, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _system)
    app.add_exception_handler(Exception, _unknown)
