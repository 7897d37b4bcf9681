"""Web servers for tests, on loopback: nginx over a directory, and one that misbehaves on demand."""

import contextlib
import http.server
import io
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.servers import free_ports

_NGINX = """
daemon off; pid {state}/pid; error_log {state}/error.log; {processes}
events {{ worker_connections 256; }}
http {{
  log_format sent '$request_method $uri $status $http_range'; access_log {state}/access.log sent;
  default_type application/octet-stream; sendfile on;
  client_body_temp_path {state}/t; proxy_temp_path {state}/t; fastcgi_temp_path {state}/t;
  uwsgi_temp_path {state}/t; scgi_temp_path {state}/t;
  server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; {extra} }}
}}
"""


@contextlib.contextmanager
def nginx(root: Path, state: Path, extra: str = "", *, workers: int = 0) -> Iterator[str]:
    """URL of an nginx that serves `root`, with directory listings; `state` is its own directory.

    workers: processes besides its master, which run as we do; 0: one process does it all.
    """
    port = free_ports(1, 23000)
    state.mkdir(parents=True, exist_ok=True)
    configuration = state / "nginx.conf"
    processes = "master_process off; worker_processes 1;"
    if workers:
        processes = f"worker_processes {workers};" + " user root;" * (os.geteuid() == 0)
    configuration.write_text(
        _NGINX.format(root=root, state=state, port=port, extra=extra, processes=processes)
    )
    process = subprocess.Popen(["nginx", "-e", str(state / "error.log"), "-c", str(configuration)])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), contextlib.closing(_connect(port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _connect(port: int) -> contextlib.AbstractContextManager[object]:
    import socket

    return socket.create_connection(("127.0.0.1", port), 1)


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def misbehaving(answers: dict[str, Answer]) -> Iterator[str]:
    """URL of a server that answers each path by the given function (404 for others)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = answers.get(self.path)
            if answer is None:
                self.send_error(404)
                return
            with contextlib.suppress(OSError):
                answer(self)

        def do_HEAD(self) -> None:
            real, self.wfile = self.wfile, io.BytesIO()
            self.do_GET()
            head, end, _ = self.wfile.getvalue().partition(b"\r\n\r\n")
            self.wfile = real
            self.wfile.write(head + end)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def body(data: bytes, **headers: str) -> Answer:
    """The whole body at once."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def raw(data: bytes, *lines: str) -> Answer:
    """A body under header lines as they are, whatever they say."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        head = "".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", *lines, ""))
        handler.wfile.write(head.encode("latin-1", "replace") + data)
        handler.close_connection = True

    return answer


def redirect(to: str) -> Answer:
    """A temporary redirect."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Never comes to an end and never says how long it is."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    piece = os.urandom(1 << 16)
    while True:
        handler.wfile.write(piece)


@contextlib.contextmanager
def serving(app: object) -> Iterator[str]:
    """URL of uvicorn over an ASGI application, with the limits of our servers, in a thread."""
    import asyncio
    import socket

    import uvicorn

    from imagestore import listening

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", **listening.settings())  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
