"""An HTTP proxy that fails some requests in the ways of networks and busy servers, for stores in a bucket."""

import contextlib
import ctypes
import http.client
import http.server
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
_BUSY = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"
)


def listen(address: str, port: int, namespace: Path | None = None) -> socket.socket:
    """A listening socket, in another network namespace (such as /proc/PID/ns/net) if one is named."""
    made: list[socket.socket] = []

    def make() -> None:  # in a thread of its own: setns(2) is for the calling thread alone
        if namespace is not None:
            descriptor = os.open(namespace, os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
            finally:
                os.close(descriptor)
        made.append(socket.create_server((address, port), backlog=128))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@contextlib.contextmanager
def proxy(listener: socket.socket, port: int, share: float, seed: int) -> Iterator[dict[str, int]]:
    """Pass requests on to 127.0.0.1:`port`; of these `share` fail. Yields how often which way."""
    rng, count = random.Random(seed), {"passed": 0, "busy": 0, "reset": 0, "lost": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            way = rng.choice(["busy", "reset", "lost"]) if rng.random() < share else "passed"
            count[way] += 1
            self.close_connection = way in ("reset", "lost")
            if way == "reset":
                return
            if way == "busy":
                self._answer(503, [("Content-Type", "application/xml")], _BUSY)
                return
            there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        there.putheader(name, value)
                there.endheaders(body or None)
                answer = there.getresponse()
                data = answer.read()
            finally:
                there.close()
            if way == "passed":
                self._answer(answer.status, answer.getheaders(), data)

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            sized = self.command == "HEAD"
            unsized = () if sized else ("content-length",)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", *unsized):
                    self.send_header(name, value)
            if not sized:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"" if sized else data)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients hang up, that is what this is for

    server = Server(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
