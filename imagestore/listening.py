"""What every HTTP server of ours grants a stranger: so many connections, so much time, so many tries.

`Guarded` is uvicorn's protocol (https://www.uvicorn.org) with limits. A connection that waits for its client - one
that is idle, or in the middle of a request - must bring LEAST_BYTES or the request's end in each PATIENCE_S; a client
that takes nothing of an answer for STALLED_S is gone. Who comes when there are too many is let in, and the one goes
that has been waiting longest: of the same address, or of all when the whole server is full.
"""

import asyncio
import resource
import threading
import time
from asyncio import constants
from collections import OrderedDict
from collections.abc import Hashable
from ipaddress import ip_address, ip_network
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LEAST_BYTES = 4096
HEAD_BYTES = 1 << 16
_FILES = 1 << 16


def raise_limits() -> None:
    """As many descriptors for this process as it may have (up to 65,536): the default, 1,024, is for select().

    And no minute for a TLS handshake: until it is over a connection is nobody's yet, and not counted.
    """
    constants.SSL_HANDSHAKE_TIMEOUT = Guarded.PATIENCE_S
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def origin(host: str) -> str:
    """Whose a client's address is: an IPv4 address one client's, of IPv6 the 64 bits that one network has."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ip_network(f"{address}/64", strict=False))


class Buckets:
    """Token buckets by any key: `burst` at once, then `per_second`; of keys unseen for long nothing is remembered."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: Hashable, count: float = 1.0) -> bool:
        """False when there are no more; a negative count gives back."""
        with self._lock:
            now = time.monotonic()
            left, at = self._left.pop(key, (self._burst, now))
            left = min(self._burst, left + (now - at) * self._per_second)
            enough = left >= count
            self._left[key] = (min(self._burst, left - count) if enough else left, now)
            if len(self._left) > 10_000:
                self._left.popitem(last=False)
            return enough


class Guarded(HttpToolsProtocol):
    """One connection."""

    PATIENCE_S: ClassVar[float] = 10.0
    STALLED_S: ClassVar[float] = 60.0
    MOST: ClassVar[int] = 4096  # of one server; never more than a quarter of the process's descriptors
    MOST_OF_ONE: ClassVar[int] = 512

    _origin = ""
    _reading = True
    _since_s = _moved_s = 0.0
    _received = _left_bytes = 0
    _apart_bytes = 0
    """Received since a request began or the last piece of its body: of its head, or of what may follow a body."""
    _timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """It is the client's turn."""
        return self._reading or self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._origin = origin(self.client[0]) if self.client else ""
        self._begin()
        self._look()
        most = min(self.MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        same = [one for one in self.connections if isinstance(one, Guarded) and one._origin == self._origin]
        if len(same) > self.MOST_OF_ONE:
            self._make_room(same)
        elif len(self.connections) > most:
            self._make_room([one for one in self.connections if isinstance(one, Guarded)])

    def _make_room(self, among: "list[Guarded]") -> None:
        others = [one for one in among if one is not self and one.waiting]
        longest = min(others, key=lambda one: one._since_s, default=self)
        longest.connections.discard(longest)
        longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """From now on it is the WebSocket's: whoever serves that counts them, and pings."""
        if self._timer:
            self._timer.cancel()
        super().handle_websocket_upgrade()

    def _begin(self) -> None:
        self._reading, self._received, self._apart_bytes = True, 0, 0
        self._since_s = self._moved_s = self.loop.time()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        now_s, left_bytes = self.loop.time(), self.transport.get_write_buffer_size()
        if left_bytes < self._left_bytes or not self.flow.write_paused:
            self._moved_s = now_s
        self._left_bytes = left_bytes
        patience_s = self.PATIENCE_S if self._reading else max(self.PATIENCE_S, self.timeout_keep_alive)
        late = self.waiting and not self.flow.read_paused and now_s - self._since_s >= patience_s
        if (late and self._received < LEAST_BYTES) or now_s - self._moved_s >= self.STALLED_S:
            self.transport.abort()
            return
        if late:
            self._since_s, self._received = now_s, 0
        self._timer = self.loop.call_later(self.PATIENCE_S / 2, self._look)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._apart_bytes += len(data)
        super().data_received(data)
        if self._apart_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_body(self, body: bytes) -> None:
        self._apart_bytes = 0
        super().on_body(body)

    def resume_writing(self) -> None:
        self._moved_s = self.loop.time()
        super().resume_writing()

    def on_message_begin(self) -> None:
        self._begin()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._reading = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._since_s = self.loop.time()
        super().on_response_complete()


def settings() -> dict[str, Any]:
    """What uvicorn is told for all servers of ours."""
    return {"http": Guarded, "server_header": False, "access_log": False, "lifespan": "off"}
