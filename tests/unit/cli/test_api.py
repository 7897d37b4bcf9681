"""The client of the REST API, against a real HTTP server."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from select import select
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cli.cloud.api import Api
from cli.errors import Problem
from cli.main import sf
from cli.settings import living

SEEN: list[tuple[str, str, Any, str]] = []
TOKENS = ["first", "second", "third"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    logins = 0
    valid = ""

    def answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else None
        SEEN.append((self.command, self.path, body, self.headers.get("Authorization") or ""))
        status, found = self.route(body)
        reply = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Request-ID", "req-7")
        if self.path == "/bye":
            self.close_connection = True
        self.end_headers()
        self.wfile.write(reply)

    def route(self, body: Any) -> tuple[int, Any]:
        cls = type(self)
        if self.path == "/auth":
            if body["key"] != "right":
                return 401, {"error": "wrong key", "status": 401}
            cls.valid = TOKENS[cls.logins]
            cls.logins += 1
            return 200, {"access_token": cls.valid, "expires_in": 900}
        if self.headers.get("Authorization") != f"Bearer {cls.valid}":
            return 401, {"error": "expired", "status": 401}
        if self.path.startswith("/fail/"):
            return int(self.path[6:]), {"error": "it\nbroke", "hint": "mend it"}
        return 200, {"path": self.path, "body": body}

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    SEEN.clear()
    Handler.logins, Handler.valid = 0, ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def api(url: str) -> Iterator[Api]:
    with click.Context(sf, obj={"api_url": url, "key": "right", "namespace": "shop"}):
        yield Api()


def test_a_get_carries_its_arguments_as_json_and_quotes_its_path(api: Api) -> None:
    assert api("GET", "networks", "a/b c", all=True, nothing=None) == {
        "path": "/networks/a%2Fb%20c",
        "body": {"all": True},
    }
    assert SEEN[0][2] == {"namespace": "shop", "key": "right"}
    assert SEEN[1][3] == "Bearer first"


def test_it_authenticates_once_more_when_the_token_has_ended(api: Api) -> None:
    api("GET", "x")
    Handler.valid = "another"
    assert api("DELETE", "x")["path"] == "/x"
    assert [path for _, path, _, _ in SEEN] == ["/auth", "/x", "/x", "/auth", "/x"]


def test_nothing_secret_goes_over_plain_http_when_another_server_is_asked(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api("GET", "x")
    monkeypatch.setattr("cli.cloud.api.living", lambda _: "http://192.0.2.1:13000")
    with pytest.raises(Problem, match="plain HTTP") as caught:
        api._open()
    assert caught.value.code == 4


def test_streams_that_are_opened_at_once_when_the_token_has_ended_share_one_login(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser's connections to a forwarded port, after ten minutes."""
    plain, asked, go = Handler.route, threading.Event(), threading.Event()

    def route(handler: Handler, body: Any) -> tuple[int, Any]:
        asked.set()
        assert go.wait(20)
        return plain(handler, body)

    monkeypatch.setattr(Handler, "route", route)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(api.token)
        assert asked.wait(20)
        second = pool.submit(api.token)
        with suppress(TimeoutError):  # the other one fails at once, or waits
            second.exception(0.2)
        go.set()
        assert [first.result(20), second.result(20)] == ["first", "first"]
    assert len(SEEN) == 1


def test_a_wrong_key_is_an_authentication_error_and_tried_once(url: str) -> None:
    with click.Context(sf, obj={"api_url": url, "key": "wrong"}), pytest.raises(Problem) as caught:
        Api()("GET", "x")
    assert caught.value.code == 4
    assert len(SEEN) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(400, 2), (403, 4), (404, 3), (406, 5), (409, 5), (500, 1), (503, 8), (507, 6)]
)
def test_each_status_becomes_its_exit_code_with_hint_and_request_id(api: Api, status: int, code: int) -> None:
    with pytest.raises(Problem, match="broke") as caught:
        api("GET", "fail", str(status))
    assert (caught.value.code, caught.value.hint, caught.value.request_id) == (code, "mend it", "req-7")


def test_a_connection_that_the_server_closed_is_opened_again(api: Api) -> None:
    assert api("GET", "bye")["path"] == "/bye"
    assert api("GET", "x")["path"] == "/x"


def test_nobody_there_is_unreachable_with_or_without_a_key() -> None:
    for flags in ({"key": "k"}, {}):
        given = {"api_url": "http://127.0.0.1:9", **flags}
        with click.Context(sf, obj=given), pytest.raises(Problem, match=r"127\.0\.0\.1:9") as caught:
            Api()("GET", "x")
        assert caught.value.code == 8


@pytest.mark.parametrize(
    "bad", ["127.0.0.1:13000", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://[::1"]
)
def test_what_is_no_http_url_is_a_usage_error(bad: str) -> None:
    with click.Context(sf, obj={"api_url": bad}), pytest.raises(Problem) as caught:
        Api()
    assert caught.value.code == 2
    with pytest.raises(Problem, match="not the URL"):
        living([bad, "http://127.0.0.1:9"])


def test_where_another_server_answers_nothing_is_a_success(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api("GET", "x")
    with pytest.raises(Problem, match="broke"):
        api("DELETE", "fail", "302")
    monkeypatch.setattr(Handler, "route", lambda *_: (200, ["It works!"]))
    api._token = ""
    with pytest.raises(Problem, match="no API of sf") as caught:
        api("DELETE", "x")
    assert caught.value.code == 4


def test_a_request_that_may_not_be_repeated_is_sent_after_the_server_closed_an_idle_connection(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "timeout", 0.05)  # of an idle connection, as every server has one
    api("GET", "x")
    assert select([api._connection.sock], [], [], 20)[0]  # type: ignore[list-item]
    assert api("POST", "instances", "web", "restore")["path"] == "/instances/web/restore"


def test_what_a_ping_prints_commands_no_terminal(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"stdout": ["64 bytes from\x1b[2J 10.0.0.9"], "stderr": []}
    plain = Handler.route
    monkeypatch.setattr(Handler, "route", lambda h, b: (200, said) if "ping" in h.path else plain(h, b))
    done = CliRunner().invoke(sf, ["network", "ping", "lan", "10.0.0.9"], obj=click.get_current_context().obj)
    assert (done.exit_code, done.stdout) == (0, "64 bytes from [2J 10.0.0.9\n")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_no_name_is_never_a_request_about_all(api: Api, name: str) -> None:
    with pytest.raises(Problem) as caught:
        api("DELETE", "networks", name)
    assert (caught.value.code, SEEN) == (2, [])


def test_a_range_and_a_gateway_are_never_left_out(api: Api) -> None:
    words = "network create home 192.168.1.0/24 --range 192.168.1.9-192.168.1.20 --gateway 192.168.1.2"
    CliRunner().invoke(sf, words.split(), obj=click.get_current_context().obj)
    (sent,) = [body for method, path, body, _ in SEEN if (method, path) == ("POST", "/networks")]
    assert (sent["range"], sent["gateway"]) == ("192.168.1.9-192.168.1.20", "192.168.1.2")


@pytest.mark.parametrize(
    "words",
    [
        "instance set web --disk 100G --disk vda=200G",
        "node drain n1 --timeout 1s",
        "node drain n1 --move --undo",
    ],
)
def test_no_option_counts_for_nothing(api: Api, words: str) -> None:
    done = CliRunner().invoke(sf, words.split(), obj=click.get_current_context().obj)
    assert (done.exit_code, SEEN) == (2, []), done.output


def test_events_are_followed_over_the_end_of_a_server_from_where_they_were(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    plain = Handler.answer

    def answer(handler: Handler) -> None:
        if not handler.path.startswith("/events"):
            plain(handler)
            return
        asked.append(handler.headers.get("Last-Event-ID"))
        handler.close_connection = True
        if len(asked) == 2:  # it answers nothing at all
            return
        if len(asked) == 4:
            handler.send_error(403)
            return
        handler.send_response(200)
        handler.end_headers()
        number = len(asked)
        cut = f'id: {number + 1}\ndata: {{"n": {number + 1}, "what": "ü'.encode()[:-1]  # it is killed
        handler.wfile.write(f': still here\n\nid: {number}\ndata: {{"n": {number}}}\n\n'.encode() + cut)

    monkeypatch.setattr(Handler, "do_GET", answer)
    monkeypatch.setattr("time.sleep", lambda _: None)
    seen = []
    with pytest.raises(Problem) as caught:
        for event in api.follow("events"):
            seen.append(event["n"])
    assert (seen, asked, caught.value.code) == ([1, 3], ["", "1", "1", "3"], 4)
