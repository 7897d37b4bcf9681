"""Streams of the API as commands have them: what the server's are is in `compute.api.streams`."""

import json
import os
import signal
import socket
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import quote

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

from cli.cloud.api import Api
from cli.errors import CONFLICT, ERROR, EXIT_CODES, UNREACHABLE, Problem
from cli.output import say

_LIMITS: dict[str, Any] = {"open_timeout": 20, "compression": None, "max_size": None, "proxy": None}
_PIECE_BYTES = 1 << 16
_LEAVE = b"\x1d"
# What a guest may have left behind is undone: soft reset, main screen, cursor, mouse, paste.
_SANE = b"\x1b[!p\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?2004l"
Message = bytes | dict[str, Any]


class Stream(ExitStack):
    """One, open until its block ends. `send` and `receive` may be called from two threads."""

    def __init__(self, api: Api, name: str, kind: str, /, **options: Any) -> None:
        super().__init__()
        told = {"Authorization": f"Bearer {api.token()}"}
        url = f"ws{api.url.removeprefix('http')}/instances/{quote(name, safe='')}/streams/{kind}"
        try:
            self._socket = self.enter_context(connect(url, ssl=api.tls, additional_headers=told, **_LIMITS))
        except (OSError, WebSocketException) as error:
            raise Problem(f"no stream from {api.url}: {error}", code=UNREACHABLE) from error
        self.send(options)

    def send(self, message: Message) -> None:
        """Waits while the guest takes nothing. A stream that has ended says why to who receives."""
        with suppress(ConnectionClosed):
            self._socket.send(message if isinstance(message, bytes) else json.dumps(message))

    def receive(self) -> Message:
        """Bytes, or what else is said. Raises Problem for an error, and when the stream ends before it should."""
        try:
            message = self._socket.recv()
        except ConnectionClosed as error:
            raise Problem("the connection ended", hint="try again", code=UNREACHABLE) from error
        said: Any = None
        with suppress(ValueError, RecursionError):
            said = message if isinstance(message, bytes) else json.loads(message)
        if not isinstance(said, bytes | dict):
            raise Problem("what answers is no stream of sf", hint="is the URL right?", code=UNREACHABLE)
        if isinstance(said, dict) and "error" in said:
            code = EXIT_CODES.get(str(said.get("kind")), ERROR)
            raise Problem(str(said["error"]), hint=str(said.get("hint") or ""), code=code)
        return said

    def data(self) -> Iterator[bytes]:
        """What comes until its end."""
        while isinstance(message := self.receive(), bytes):
            yield message


def carry(stream: Stream, read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Both ways, until the guest has nothing more to say. `read` ends with b""."""

    def there() -> None:
        with suppress(OSError):
            while data := read():
                stream.send(data)
        stream.send({"eof": True})

    threading.Thread(target=there, daemon=True).start()
    for data in stream.data():
        write(data)


def forward(port: int, opened: Callable[[], Stream]) -> None:
    """Every connection to a port here is a stream of its own; until interrupted. One that fails ends no other."""

    def serve(client: socket.socket) -> None:
        with client:
            try:
                with opened() as stream:
                    carry(stream, lambda: client.recv(_PIECE_BYTES), client.sendall)
            except (Problem, OSError) as error:
                say(f"a connection ended: {error}")

    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise Problem(f"cannot listen on port {port}: {error}", hint="another port", code=CONFLICT) from error
    with listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        say(f"127.0.0.1:{listener.getsockname()[1]} leads there; Ctrl-C ends it")
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client,), daemon=True).start()


def interact(stream: Stream) -> None:
    """This terminal is the guest's, escape sequences and all, until ^]; then as before, however this ends."""
    before, left = termios.tcgetattr(0), threading.Event()

    def there() -> None:
        with suppress(OSError):
            while typed := os.read(0, 4096):
                typed, leave, _ = typed.partition(_LEAVE)
                stream.send(typed)
                if leave:
                    break
        left.set()
        stream.close()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        tty.setraw(0)
        threading.Thread(target=there, daemon=True).start()
        for data in stream.data():
            os.write(1, data)
    except Problem:
        if not left.is_set():
            raise
    finally:
        with suppress(OSError, termios.error):
            os.write(1, _SANE)
            termios.tcsetattr(0, termios.TCSAFLUSH, before)
