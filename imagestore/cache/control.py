"""The image service's control socket: one JSON object per line each way, `{"op": …}` and `{"ok": …}` or `{"error": …}`.

Operations: attach, settle, detach, sync, booted, figures, join (peers), pin, unpin, prefetch, prune, ls, leave (end if
nobody needs you), watch (waits until an event has happened after `after`, at most `wait_s`). Who may connect to the
socket may do all of it.
"""

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from imagestore import errors
from imagestore.cache.open_images import SETTLE_S
from imagestore.cache.service import ImageService
from imagestore.errors import Invalid, StoreError, Unavailable
from imagestore.formats.digest import Digest
from imagestore.outside import read_json

_LINE_BYTES = 1 << 20
Request = dict[str, Any]


class ControlServer:
    """Serves one ImageService on a Unix socket, for its owner alone."""

    def __init__(self, service: ImageService, path: Path) -> None:
        self._service, self._path = service, path
        self._clients: set[asyncio.Task[None]] = set()
        self._heard_s = time.monotonic()
        self.alone = False
        """The agent has said that it leaves."""

    @property
    def silent_s(self) -> float:
        """For how long nobody was connected."""
        return 0.0 if self._clients else time.monotonic() - self._heard_s

    async def start(self) -> None:
        """Listen, in place of a stale socket. Raises OSError."""
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(fresh), limit=_LINE_BYTES)
        fresh.chmod(0o600)
        fresh.rename(self._path)

    async def close(self) -> None:
        """Stop listening and drop the clients."""
        self._path.unlink(missing_ok=True)
        self._server.close()
        for client in self._clients:
            client.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._clients.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while line := await reader.readline():
                    writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            self._clients.discard(task)
            self._heard_s = time.monotonic()
            writer.close()

    async def _answer(self, line: bytes) -> Request:
        try:
            request = read_json(line)
            self.alone = False
            handler = getattr(self, f"_do_{request['op']}")
            return {"ok": await handler(request)}
        except StoreError as error:
            return {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        except OSError as error:
            return {"error": "Unavailable", "message": str(error), "hint": ""}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {
                "error": "Invalid",
                "message": f"bad request: {type(error).__name__}: {error}",
                "hint": "",
            }

    async def _do_attach(self, r: Request) -> Request:
        more = {name: r[name] for name in ("fill", "patience_s") if name in r}
        return await self._service.attach(Digest.parse(r["image"]), r["reader"], **more)

    async def _do_settle(self, r: Request) -> None:
        await self._service.settle(r["reader"])

    async def _do_detach(self, r: Request) -> None:
        await self._service.detach(r["reader"])

    async def _do_sync(self, r: Request) -> None:
        await self._service.sync(r["readers"])

    async def _do_booted(self, r: Request) -> None:
        self._service.images.booted(r["reader"], float(r.get("settle_s", SETTLE_S)))

    async def _do_figures(self, r: Request) -> Request:
        return self._service.images.figures(r["reader"])

    async def _do_leave(self, r: Request) -> None:
        self.alone = True

    async def _do_join(self, r: Request) -> None:
        await self._service.join(r["me"], r["listen"], r["peers"], bytes.fromhex(r["secret"]))

    async def _do_pin(self, r: Request) -> None:
        self._service.pin(Digest.parse(r["image"]), pinned=True)

    async def _do_unpin(self, r: Request) -> None:
        self._service.pin(Digest.parse(r["image"]), pinned=False)

    async def _do_prefetch(self, r: Request) -> None:
        await self._service.images.fetch(Digest.parse(r["image"]))

    async def _do_prune(self, r: Request) -> list[str]:
        return await self._service.prune(int(r["limit_bytes"]))

    async def _do_ls(self, r: Request) -> Request:
        return {"pid": os.getpid(), "free_bytes": self._service.free_bytes(), "images": self._service.ls()}

    async def _do_watch(self, r: Request) -> list[Request]:
        return await self._service.events(int(r["after"]), min(60.0, float(r.get("wait_s", 20))))


class Away(Unavailable):
    """There is no service, or it ended before it answered."""


class ControlClient:
    """Asks an image service; a connection per question, since the service may be another one by the next."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def ask(self, op: str, *, timeout_s: float = 90.0, **arguments: Any) -> Any:
        """The answer to one operation. Raises what the service raised; Away when there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(self.path), limit=1 << 26)
                try:
                    writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                    line = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            hint = "sf serve and sf agent start it; by hand: sf imaged"
            raise Away(f"the image service does not answer on {self.path}", hint=hint) from error
        if not line:
            raise Away("the image service ended in the middle of a question")
        answer = json.loads(line)
        if "ok" in answer:
            return answer["ok"]
        kind = getattr(errors, answer["error"], Invalid)
        raise kind(answer["message"], hint=answer["hint"])
