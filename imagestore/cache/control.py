"""The image service's control socket: one JSON object per line each way, `{"op": …}` and `{"ok": …}` or `{"error": …}`.

Operations are those methods of the service that OPERATIONS names, those of its images that OF_IMAGES does, and `leave`:
end if nobody needs you. Who may connect to the socket may do all of it.
"""

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from imagestore import errors
from imagestore.cache.service import ImageService
from imagestore.errors import Invalid, StoreError, Unavailable
from imagestore.outside import read_json

_LINE_BYTES = 1 << 20
OPERATIONS = frozenset("attach settle detach sync join use readable pin unpin prune ls watch".split())
OF_IMAGES = frozenset(("booted", "figures", "prefetch"))
Request = dict[str, Any]


class ControlServer:
    """Serves one ImageService on a Unix socket, for its owner alone."""

    def __init__(self, service: ImageService, path: Path) -> None:
        self._service, self._path = service, path
        self._clients: dict[asyncio.Task[None], asyncio.StreamReader] = {}
        self._heard_s = time.monotonic()
        self.alone = False  # the agent has said that it leaves

    @property
    def silent_s(self) -> float:
        """For how long nobody was connected. Who hung up waits for no answer, however long its question's wait."""
        now_s = time.monotonic()
        self._heard_s = self._heard_s if all(r.at_eof() for r in self._clients.values()) else now_s
        return now_s - self._heard_s

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
        self._clients[task] = reader
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while line := await reader.readline():
                    writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            self._clients.pop(task)
            self._heard_s = time.monotonic()
            writer.close()

    async def _answer(self, line: bytes) -> Request:
        try:
            request = read_json(line)
            self.alone = (op := request.pop("op")) == "leave"
            if self.alone:
                return {"ok": None}
            if op not in OPERATIONS | OF_IMAGES:
                raise Invalid(f"there is no operation {op!r}")
            owner = self._service.images if op in OF_IMAGES else self._service
            return {"ok": await getattr(owner, op)(**request)}
        except StoreError as error:
            failure = error
        except OSError as error:
            failure = Unavailable(str(error))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            failure = Invalid(f"bad request: {type(error).__name__}: {error}")
        return {"error": type(failure).__name__, "message": str(failure), "hint": failure.hint}


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
        raise getattr(errors, answer["error"], Invalid)(answer["message"], hint=answer["hint"])
