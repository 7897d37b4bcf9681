"""A stream that this node brings to a server on another machine: a WebSocket, since only the node can connect."""

import ssl
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from compute.errors import Unavailable
from compute.wire.streams import MESSAGE_BYTES, Stream

_LIMITS: dict[str, Any] = {"open_timeout": 5, "ping_timeout": 60, "max_size": MESSAGE_BYTES}


async def bring(url: str, ticket: str, authorization: str, context: ssl.SSLContext) -> Stream:
    """The stream of a ticket, open. Raises Unavailable."""
    where = f"wss{url.removeprefix('https').rstrip('/')}/agent/v1/streams/{ticket}"
    told = {"Authorization": authorization}
    try:
        made = connect(where, additional_headers=told, ssl=context, compression=None, proxy=None, **_LIMITS)
        socket = await made
    except (OSError, TimeoutError, WebSocketException) as err:
        raise Unavailable(f"the server did not take a stream: {err!r}") from err
    return Stream(socket.send, socket.recv, socket.close, ConnectionClosed)
