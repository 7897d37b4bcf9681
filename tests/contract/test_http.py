"""The read-only backend: what the contract says of reading, against nginx; and servers that lie."""

import base64
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from compute.cluster import certificates
from imagestore.backends.directory import Directory
from imagestore.backends.http import Http
from imagestore.backends.s3 import S3
from imagestore.backends.wrappers import Retried
from imagestore.errors import Corrupt, Denied, Invalid, NotFound, Unavailable, Unsupported
from imagestore.mirror.download import Downloader
from imagestore.store.open import open_backend, open_store
from imagestore.store.store import Store
from tests import servers
from tests.web import nginx
from tests.world import World, disk

DATA = bytes(range(256)) * 40
Answer = Callable[[socket.socket, bytes], None]


PLACES = """
location /moved/ { rewrite ^/moved/(.*)$ /$1 redirect; }
location /down/ { return 302 ftp://127.0.0.1/; }
location /secret/ { return 403; }
location /busy/ { return 503; }
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Directory, str]]:
    directory = Directory(tmp_path / "store")
    directory.put("packs/ab/cd", DATA)
    directory.put("a/empty", b"")
    with nginx(tmp_path / "store", tmp_path / "nginx", PLACES) as url:
        yield directory, url


def test_reading_keeps_the_contract(served: tuple[Directory, str]) -> None:
    http = Http(served[1])
    whole = http.get("packs/ab/cd")
    assert whole.data == DATA and whole.stat == http.stat("packs/ab/cd")
    assert whole.stat.size_bytes == len(DATA)
    assert http.get("packs/ab/cd", 10, 5).data == DATA[10:15]
    assert http.get("packs/ab/cd", 10, 5).stat == whole.stat
    assert http.get("packs/ab/cd", len(DATA) - 3).data == DATA[-3:]
    assert http.get("a/empty").data == b""
    assert abs(whole.stat.modified_s - served[0].stat("packs/ab/cd").modified_s) < 2
    for start, length in [(0, len(DATA) + 1), (len(DATA), 1), (len(DATA) + 9, 1)]:
        with pytest.raises(Corrupt):
            http.get("packs/ab/cd", start, length)
    for ask in (http.get, http.stat):
        with pytest.raises(NotFound):
            ask("names/debian/12")
    served[0].put("packs/ab/cd", b"other")
    assert http.stat("packs/ab/cd").etag != whole.stat.etag


def test_it_writes_and_lists_nothing(served: tuple[Directory, str]) -> None:
    http = Http(served[1])
    for act in (lambda: http.put("a", b""), lambda: http.delete("a"), lambda: list(http.list(""))):
        with pytest.raises(Unsupported):
            act()


def test_statuses_have_their_kinds_and_redirects_go_to_web_servers_only(
    served: tuple[Directory, str],
) -> None:
    assert Http(f"{served[1]}/moved").get("packs/ab/cd", 1, 2).data == DATA[1:3]
    for place, kind in [("secret", Denied), ("busy", Unavailable), ("down", Denied)]:
        with pytest.raises(kind):
            Http(f"{served[1]}/{place}").get("packs/ab/cd")


def test_a_store_on_plain_http_leads_to_nothing_else_that_only_this_machine_can_reach() -> None:
    """H8."""
    asked: list[bytes] = []

    def inside(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        sends("200 OK", b"hi", "Content-Length: 2")(connection, request)

    with liar(inside) as there:
        port = there.rpartition(":")[2]
        for host in (
            "127.0.0.1",
            "localhost",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "169.254.169.254",
            "10.0.0.1",
            "0.0.0.0",
        ):
            moved = sends("302 There", b"", "Content-Length: 0", f"Location: http://{host}:{port}/x")
            with liar(moved) as url, pytest.raises(Denied):
                Http(url).get("store.json")
    assert not asked


def test_a_store_on_a_web_server_is_read_like_any_other(tmp_path: Path) -> None:
    world = World(tmp_path / "world", backend=Directory(tmp_path / "store"))
    digest = world.push("a", disk(1))
    with nginx(tmp_path / "store", tmp_path / "nginx") as url:
        world.store = open_store(url)
        assert world.store.names.get("a").digest("x86_64") == digest
        world.check("a")
        with pytest.raises(NotFound):
            world.store.names.get("b")
        with pytest.raises(Denied):
            world.store.check_writable()
        with pytest.raises(NotFound):
            open_store(f"{url}/nothing")


@contextlib.contextmanager
def liar(answer: Answer) -> Iterator[str]:
    """A server whose every connection is answered by `answer(connection, request)`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    answer(connection, connection.recv(65536))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def sends(status: str, body: bytes, *headers: str, after: Answer | None = None) -> Answer:
    head = "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers]) + "\r\n\r\n"

    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(head.encode() + body)
        if after is not None:
            after(connection, request)

    return answer


def drip(connection: socket.socket, _: bytes) -> None:
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.02)


RANGE = "Content-Range: bytes 10-14/100"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (sends("200 OK", bytes(100), "Content-Length: 100"), Corrupt),
        (
            sends("206 Partial Content", bytes(5), "Content-Length: 5", "Content-Range: bytes 0-4/100"),
            Corrupt,
        ),
        (sends("206 Partial Content", bytes(5), "Content-Length: 5"), Corrupt),
        (
            sends("206 Partial Content", bytes(9), "Content-Length: 9", "Content-Range: bytes 10-18/100"),
            Corrupt,
        ),
        (sends("206 Partial Content", bytes(3), "Content-Length: 5", RANGE), Unavailable),
        (sends("206 Partial Content", bytes(3), RANGE), Unavailable),
        (sends("206 Partial Content", bytes(50), RANGE), Corrupt),
        (sends("206 Partial Content", bytes(5), "Content-Encoding: gzip", RANGE), Corrupt),
        (sends("206 Partial Content", b"", "Content-Length: 99999999999", RANGE), Corrupt),
        (sends("302 Found", b"", "Location: /again"), Unavailable),
        (lambda connection, _: None, Unavailable),
        (sends("rubbish", b""), Unavailable),
    ],
    ids=[
        *[
            "range ignored",
            "another range",
            "no content-range",
            "too long a range",
            "truncated",
            "truncated at close",
        ],
        *["endless body", "re-encoded", "huge length", "redirect loop", "hangs up", "no http"],
    ],
)
def test_a_lying_server_is_found_out(
    answer: Answer, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 2.0)
    with liar(answer) as url, pytest.raises(kind):
        Http(url).get("packs/ab/cd", 10, 5)


def test_a_body_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.3)
    drips = sends(
        "206 Partial Content",
        b"",
        "Content-Length: 100000",
        "Content-Range: bytes 0-99999/100000",
        after=drip,
    )
    with liar(drips) as url, pytest.raises(Unavailable, match="in time"):
        Http(url).get("packs/ab/cd", 0, 100_000)


def begins(sent: bytes, again: bytes) -> Answer:
    """Sends that, then the same piece again and again, each in time for one read, for 2 s."""

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(sent)
        for _ in range(100):
            connection.sendall(again)
            time.sleep(0.02)

    return answer


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        begins(b"HTTP/1.1 ", b"2"),
        begins(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        begins(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        begins(CHUNKED + b"2;", b"x"),
        begins(CHUNKED + b"2\r\nhi\r\n0\r\n", b"X: x\r\n"),
    ],
    ids=["status", "headers", "heads of nothing", "a chunk's length", "trailers"],
)
def test_a_head_that_drips_is_given_up_and_so_is_what_stands_around_chunks(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.2)
    monkeypatch.setattr("imagestore.backends.web.is_public", lambda address: True)
    with liar(answer) as url, pytest.raises(Unavailable, match="timed out"):
        Http(url).get("store.json")
    with liar(answer) as there, closing(Downloader(trusted=False)) as web:
        moved = sends("302 Found", b"", f"Location: {there}/x")
        with liar(moved) as url, pytest.raises(Unavailable, match="timed out"):
            web.fetch(url, tmp_path / "file", limit_bytes=1 << 30)


def test_a_head_that_drips_over_tls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path, "IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.5)
    answer = begins(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x")
    with encrypted(certificate, key, answer) as url, pytest.raises(Unavailable, match="timed out"):
        Http(url).get("store.json")


def test_a_strangers_name_may_have_any_number_of_addresses_where_nobody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.2)
    monkeypatch.setattr("imagestore.backends.web._CONNECT_S", 0.1)
    monkeypatch.setattr("imagestore.backends.web.is_public", lambda address: True)
    real = socket.getaddrinfo

    def resolve(host: str, *a: Any, **k: Any) -> list[Any]:
        return real("127.0.0.1", *a, **k) * 30 if host == "many.example" else real(host, *a, **k)

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        plain(self, address)

    tried, plain = list[Any](), socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with contextlib.ExitStack() as stack, closing(Downloader(trusted=False)) as web:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # whoever comes now finds no room, and no answer
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        with pytest.raises(Unavailable):
            web.small(f"http://many.example:{server.getsockname()[1]}/x")
        assert 0 < len(tried) < 30


def test_an_error_that_drips_is_an_error_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.3)
    sent: list[bytes] = []

    def drips(connection: socket.socket, _: bytes) -> None:
        while len(sent) < 4096:
            connection.sendall(b" ")
            sent.append(b" ")
            time.sleep(0.01)

    with liar(sends("404 Not Found", b"", "Content-Length: 4096", after=drips)) as url:
        with pytest.raises(NotFound):
            Http(url).get("packs/ab/cd")
        assert len(sent) < 4096


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.2)
    with liar(lambda connection, _: time.sleep(3)) as url, pytest.raises(Unavailable):
        Http(url).get("packs/ab/cd")


def test_a_passing_fault_is_retried_and_a_lie_is_not() -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        good = sends("206 Partial Content", b"hello", "Content-Length: 5", RANGE)
        bad = sends("503 Busy", b"", "Content-Length: 0")
        (good if len(asked) > 2 else bad)(connection, request)

    with liar(answer) as url:
        assert Retried(Http(url), sleep=lambda _: None).get("packs/ab/cd", 10, 5).data == b"hello"
        assert len(asked) == 3
        assert b"range: bytes=10-14" in asked[0].lower()
        with pytest.raises(Corrupt):
            Retried(Http(url), sleep=lambda _: None).get("packs/ab/cd", 11, 5)
        assert len(asked) == 4


def test_a_wrong_byte_in_a_manifest_is_found(tmp_path: Path) -> None:
    world = World(tmp_path / "world", backend=Directory(tmp_path / "store"))
    digest = world.push("a", disk(1))
    path = next((tmp_path / "store" / "manifests").rglob("*/*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with nginx(tmp_path / "store", tmp_path / "nginx") as url, pytest.raises(Corrupt):
        open_store(url).manifest(digest)


def s3_at(url: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in servers.credentials().items():
        monkeypatch.setenv(name, value)
    return S3("bucket", endpoint_url=url, region="us-east-1")


S3_HEADERS = ("ETag: e", "Last-Modified: Sun, 22 Nov 2026 12:00:00 GMT")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (sends("200 OK", bytes(100), "Content-Length: 100", *S3_HEADERS), Corrupt),
        (
            sends("206 OK", bytes(5), "Content-Length: 5", "Content-Range: bytes 0-4/100", *S3_HEADERS),
            Corrupt,
        ),
        (sends("206 OK", bytes(3), "Content-Length: 5", RANGE, *S3_HEADERS), Unavailable),
        (sends("206 OK", bytes(9), "Content-Length: 9", RANGE, *S3_HEADERS), Corrupt),
        (sends("500 Oh", b"", "Content-Length: 0"), Unavailable),
        (sends("403 No", b"", "Content-Length: 0"), Denied),
        (lambda connection, _: None, Unavailable),
    ],
    ids=["range ignored", "another range", "truncated", "too long a range", "500", "403", "hangs up"],
)
def test_a_lying_s3_server_is_found_out(
    answer: Answer, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with liar(answer) as url, pytest.raises(kind):
        s3_at(url, monkeypatch).get("packs/ab/cd", 10, 5)


def test_a_body_that_drips_is_given_up_whoever_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.3)
    headers = ("Content-Length: 100000", "Content-Range: bytes 0-99999/100000", *S3_HEADERS)
    with liar(sends("206 OK", b"", *headers, after=drip)) as url, pytest.raises(Unavailable, match="in time"):
        s3_at(url, monkeypatch).get("packs/ab/cd", 0, 100_000)


def test_a_profile_or_endpoint_that_is_none_is_invalid() -> None:
    for options in ({"profile": "there-is-no-such-profile"}, {"endpoint_url": "nonsense"}):
        with pytest.raises(Invalid):
            S3("bucket", **options)


def test_a_server_may_think_for_longer_than_it_may_take_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(connection: socket.socket, request: bytes) -> None:
        time.sleep(0.6)
        sends("200 OK", b"hi", "Content-Length: 2")(connection, request)

    monkeypatch.setattr("imagestore.backends.web._CONNECT_S", 0.3)
    with liar(slow) as url:
        assert Http(url).get("store.json").data == b"hi"


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def proxy(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        sends("200 OK", b"hi", "Content-Length: 2")(connection, request)

    with liar(proxy) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert Http("http://images.example/sf").get("store.json").data == b"hi"
        assert asked[0].startswith(b"GET http://images.example/sf/store.json ")
        monkeypatch.setenv("HTTPS_PROXY", url)
        with pytest.raises(Unavailable):
            Http("https://images.example/sf").get("store.json")
        assert asked[1].startswith(b"CONNECT images.example:443 ")


def test_a_password_goes_to_the_server_that_it_is_for_and_not_where_that_one_sends_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imagestore.backends.web.is_public", lambda address: True)
    asked: list[bytes] = []

    def elsewhere(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        sends("200 OK", b"hi", "Content-Length: 2")(connection, request)

    with liar(elsewhere) as there:

        def moved(connection: socket.socket, request: bytes) -> None:
            asked.append(request)
            sends("302 There", b"", "Content-Length: 0", f"Location: {there}/x")(connection, request)

        with liar(moved) as url:
            http = Http(url.replace("//", "//me:p%40ss@") + "/sf")
            assert http.url == f"{url}/sf"
            assert http.get("store.json").data == b"hi"
            monkeypatch.undo()
            with pytest.raises(Denied, match="no public address"):  # nor to what only this machine can reach
                http.get("store.json")
    first, second, _ = (request.lower() for request in asked)
    assert b"authorization: basic " + base64.b64encode(b"me:p@ss").lower() in first
    assert b"authorization" not in second


@contextlib.contextmanager
def encrypted(certificate: Path, key: Path, answer: Answer | None = None) -> Iterator[str]:
    """A server that answers everything with "hi", or so, over TLS alone."""
    answer = answer or sends("200 OK", b"hi", "Content-Length: 2")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with context.wrap_socket(connection, server_side=True) as tls:
                        answer(tls, tls.recv(65536))
                except (ssl.SSLError, ConnectionError):
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"https://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def self_signed(directory: Path, names: str) -> tuple[Path, Path]:
    """A certificate that says who it is of, and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
        + ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_a_private_authority_is_believed_only_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path, "IP:127.0.0.1")
    with encrypted(certificate, key) as url:
        with pytest.raises(Denied, match="certificate"):
            Http(url).get("store.json")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert Http(url).get("store.json").data == b"hi"


def test_an_authority_of_ours_is_believed_by_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 3.13 on what a default context wants of authorities is more than ours say."""

    def strict(**options: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(**options)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
        return context

    authority, _ = certificates.authority(tmp_path)
    with encrypted(*certificates.shown(tmp_path, ["elsewhere"])) as url:
        monkeypatch.setattr(ssl, "create_default_context", strict)
        assert Http(url, ca=authority.read_text()).get("store.json").data == b"hi"


def test_credentials_in_a_url_are_not_shown(served: tuple[Directory, str]) -> None:
    backend = open_backend(served[1].replace("http://", "http://me:secret@"))
    assert "secret" not in backend.url
    with pytest.raises(NotFound) as caught:
        Store.open(backend)
    assert "secret" not in str(caught.value)


def test_a_foreign_server_is_known_by_the_name_that_the_redirect_gives_though_its_address_is_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of its kind: a certificate for that name is believed, one for another is not."""
    certificate, key = self_signed(tmp_path, "DNS:localhost,IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("imagestore.backends.web.is_public", lambda address: True)
    names = {"/right/x": "localhost", "/wrong/x": "ip6-localhost"}
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with context.wrap_socket(connection, server_side=True) as tls:
                        asked.append(request := tls.recv(65536))
                        path = request.partition(b" ")[2].partition(b" ")[0].decode()
                        move = f"Location: https://{names.get(path, '')}:{port}/there?a=b"
                        if path in names:
                            sends("302 There", b"", "Content-Length: 0", move)(tls, request)
                        else:
                            sends("200 OK", b"hi", "Content-Length: 2")(tls, request)
                except (ssl.SSLError, ConnectionError):
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        assert Http(f"https://127.0.0.1:{port}/right").get("x").data == b"hi"
        assert asked[-1].startswith(b"GET /there?a=b ")
        assert b"host: localhost:%d" % port in asked[-1].lower()
        with pytest.raises(Denied, match=r"(?i)hostname mismatch"):
            Http(f"https://127.0.0.1:{port}/wrong").get("x")
        server.shutdown(socket.SHUT_RDWR)
