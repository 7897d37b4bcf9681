"""A guest's screen for a browser: the page, what it loads, and tickets. The node is played and says everything back."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from compute.api import streams
from compute.cluster.auth import Authority
from compute.cluster.records.instances import Instance
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import Transaction, transact
from compute.config import Config
from tests.api_server import Running, running
from tests.system.test_ui import Visitor


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("screens")
    (home / "novnc/core/util").mkdir(parents=True)
    for name in ("core/rfb.js", "core/util/int.js", "vnc.html", "core/notes.txt", "secret.js"):
        (home / "novnc" / name).write_text("// of noVNC")
    settings = Config(state_dir=home / "state", node_name="node1", novnc=home / "novnc")
    with running(home / "state", config=settings) as found:
        for name in ("shop", "rival"):
            found.call("POST", "/auth/namespaces", {"namespace": name, "key_name": "k", "key": f"{name}-key"})
            found.tokens[name] = found.login(name, f"{name}-key").body["access_token"]
        for name in ("web", "db"):
            made = found.instance(name, as_namespace="shop", video={"model": "virtio", "vdi": "vnc"}).body
            found.wait_for(f"/instances/{made['uuid']}", "created")
        yield found


def _ticket(server: Running, name: str = "web", kind: str = "vnc", namespace: str = "shop") -> str:
    answer = server.call("POST", f"/instances/{name}/streams/{kind}", namespace=namespace)
    assert answer.status == 200, answer.body
    assert answer.body["expires_in"] == 60
    return str(answer.body["ticket"])


@contextmanager
def _open(
    server: Running, ticket: str, name: str = "web", kind: str = "vnc", **headers: str
) -> Iterator[ClientConnection]:
    """As a browser does it: on a page of the server, without any header of its own."""
    url = f"ws{server.url.removeprefix('http')}/instances/{name}/streams/{kind}"
    words = [Subprotocol("sf"), Subprotocol(f"ticket.{ticket}")]
    sent = {"Origin": server.url, **headers}
    with connect(url, additional_headers=sent, subprotocols=words, proxy=None) as socket:
        assert socket.subprotocol == "sf", "the ticket is not said back"
        with suppress(ConnectionClosed):
            socket.send("{}")
        yield socket


def _refusal(socket: ClientConnection) -> str:
    said = json.loads(socket.recv(10))
    assert "error" in said, said
    with pytest.raises(ConnectionClosed):
        socket.recv(10)
    return str(said["kind"])


def _uuid(server: Running, name: str) -> str:
    return str(server.get(f"/instances/{name}", namespace="shop")["uuid"])


def test_a_ticket_opens_the_stream_that_it_was_made_for_and_opens_it_once(server: Running) -> None:
    ticket, uuid = _ticket(server), _uuid(server, "web")
    with _open(server, ticket, uuid) as socket:
        assert json.loads(socket.recv(10)) == ["vnc", uuid, {}]
        socket.send(b"RFB 003.008\n")
        assert socket.recv(10) == b"RFB 003.008\n"
        with _open(server, ticket, uuid) as second:
            assert _refusal(second) == "Unauthenticated"
    said = {e["message"]: e["by"] for e in server.get(f"/instances/{uuid}/events", namespace="shop")}
    assert said["vnc opened"] == "shop/k"


def test_another_guest_another_kind_another_tenant_and_another_page_are_refused(server: Running) -> None:
    web, db = _uuid(server, "web"), _uuid(server, "db")
    with _open(server, _ticket(server), db) as socket:
        assert _refusal(socket) == "Unauthenticated"
    with _open(server, _ticket(server), web, "console") as socket:
        assert _refusal(socket) == "Unauthenticated"
    with _open(server, "guessed", web) as socket:
        assert _refusal(socket) == "Unauthenticated"
    with _open(server, _ticket(server), web, Origin="https://evil.example") as socket:
        assert _refusal(socket) == "Denied"
    # Who shows a token is its caller, whatever else it shows.
    with _open(server, _ticket(server), web, Authorization=f"Bearer {server.tokens['rival']}") as socket:
        assert _refusal(socket) == "NotFound"
    assert server.call("POST", f"/instances/{web}/streams/vnc", namespace="rival").status == 404
    assert server.call("POST", f"/instances/{web}/streams/vnc", namespace="").status == 401


def test_a_tickets_time_is_short(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_TICKET_S", -1)
    made = server.call("POST", "/instances/web/streams/vnc", namespace="shop").body["ticket"]
    with _open(server, made, _uuid(server, "web")) as socket:
        assert _refusal(socket) == "Unauthenticated"


def test_a_ticket_is_no_token_and_a_token_no_ticket(server: Running) -> None:
    made, uuid = _ticket(server), _uuid(server, "web")
    for scheme in ("Bearer", "Ticket"):
        told = {"Authorization": f"{scheme} {made}"}
        for verb, path in (("GET", "/instances"), ("POST", f"/instances/{uuid}/poweroff")):
            assert server.call(verb, path, namespace="", headers=told).status == 401
    with _open(server, "", uuid, Authorization=f"Bearer {made}") as socket:
        assert _refusal(socket) == "Unauthenticated"
    for words in (server.tokens["shop"], "", "x.y.z", f"{made[:-3]}abc"):
        with _open(server, words, uuid) as socket:
            assert _refusal(socket) == "Unauthenticated"
    with _open(server, "", uuid, Authorization=f"Ticket {made}") as socket:
        assert json.loads(socket.recv(10))[0] == "vnc"
    with _open(server, "", uuid, Authorization=f"Ticket {made}") as socket:
        assert _refusal(socket) == "Unauthenticated", "said in whatever way, it is good once"


def test_of_many_that_show_one_ticket_at_once_one_gets_in_on_any_server(server: Running) -> None:
    made, uuid = _ticket(server), _uuid(server, "web")

    def get_in(_: int) -> bool:
        with _open(server, made, uuid) as socket:
            return isinstance(json.loads(socket.recv(20)), list)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(get_in, range(8))) == 1
    services = server.services
    assert Authority(services.store).caller(f"Bearer {server.tokens['shop']}"), "another server's authority"
    used = [t.name for t in Transaction(services.store).list(Taken, f"ticket/{uuid}/vnc/")]
    assert used and not any(made in name for name in used), "what is kept opens nothing"


def test_a_ticket_ends_with_its_key_and_so_does_what_it_opened(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_AGAIN_S", 0.05)
    uuid = _uuid(server, "web")
    server.call("POST", "/auth/namespaces/shop/keys", {"key_name": "passing", "key": "p"}, namespace="shop")
    server.tokens["passing"] = server.login("shop", "p").body["access_token"]
    used, kept = (_ticket(server, namespace="passing") for _ in range(2))
    with _open(server, used, uuid) as socket:
        socket.recv(10)
        server.call("DELETE", "/auth/namespaces/shop/keys/passing", namespace="shop")
        assert _refusal(socket) == "Unauthenticated"
    with _open(server, kept, uuid) as socket:
        assert _refusal(socket) == "Unauthenticated"


def test_the_page_is_everybodys_knows_nothing_and_runs_nothing_but_its_own_scripts(server: Running) -> None:
    page = server.call("GET", "/screen", namespace="")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    html = page.body.decode()
    assert re.findall("<script[^>]*>", html) == ['<script type="module" src="screen/screen.js">']
    for path in ("", "/screen.js", "/core/rfb.js", "/core/util/int.js"):
        answer = server.call("GET", f"/screen{path}", namespace="")
        assert answer.status == 200, path
        policy = answer.headers["content-security-policy"]
        assert (
            policy.startswith("default-src 'none'; ")
            and "script-src 'self'; connect-src 'self'; img-src data:;" in policy
        )
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not path or "javascript" in answer.headers["content-type"]


@pytest.mark.parametrize(
    "path",
    [
        "/vnc.html",
        "/secret.js",
        "/core/notes.txt",
        "/core/none.js",
        "/core/../secret.js",
        "/..%2fstate%2fsf.db",
    ]
    + ["//etc/passwd", "/%2fetc/passwd", "/core/..%2f..%2fsecret.js", "/screen.html", "/core/a%00.js"]
    + [f"/core/{'a' * 5000}.js", f"/core{'/a' * 500}.js"],
)
def test_no_other_file_is_served(server: Running, path: str) -> None:
    assert server.call("GET", f"/screen{path}", namespace="").status == 404


def test_a_viewers_file_is_for_what_has_a_port_and_not_for_who_only_reads(server: Running) -> None:
    uuid = _uuid(server, "db")
    path = f"/instances/{uuid}/vdiconsolehelper"
    refused = server.call("GET", path, namespace="shop")
    assert (refused.status, refused.body["hint"]) == (409, "sf instance vnc db")

    def listens(txn: Any) -> None:
        found = txn.get(Instance, uuid)
        video, extra = {**found.video, "vdi": "spice"}, {"vdi_password": "5ecre7"}
        txn.update(replace(found, vdi_port=5901, video=video, extra=extra))

    transact(server.services.store, listens)
    told = server.call("GET", path, namespace="shop")
    assert told.headers["content-type"].startswith("application/x-virt-viewer")
    lines = told.body.decode().splitlines()
    assert lines[0] == "[virt-viewer]" and {"type=spice", "port=5901", "password=5ecre7"} < set(lines)
    body = {"key_name": "reader", "key": "r", "read_only": True}
    server.call("POST", "/auth/namespaces/shop/keys", body, namespace="shop")
    server.tokens["reader"] = server.login("shop", "r").body["access_token"]
    assert server.call("GET", path, namespace="reader").status == 403
    assert server.call("GET", path, namespace="rival").status == 404
    for where in (f"/instances/{uuid}", "/instances"):
        assert "5ecre7" in json.dumps(server.get(where, namespace="shop"))
        assert "5ecre7" not in json.dumps(server.get(where, namespace="reader"))
    assert server.call("POST", f"/instances/{uuid}/streams/vnc", namespace="reader").status == 403


def test_screens_count_as_streams(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_OF_ONE", 3)
    uuid = _uuid(server, "web")
    with ExitStack() as many:
        for _ in range(3):
            many.enter_context(_open(server, _ticket(server), uuid)).recv(10)
        with _open(server, _ticket(server), uuid) as socket:
            assert _refusal(socket) == "Unavailable"


def test_the_console_in_the_browser_leads_to_the_screen_and_who_only_reads_to_none(server: Running) -> None:
    uuid, shop = _uuid(server, "web"), Visitor(server.url).login("shop", "shop-key")
    status, where, page = shop.send(f"/ui/instances/{uuid}/screen")
    assert status == 200 and where.startswith(f"/screen#{uuid}.") and "screen/screen.js" in page
    with _open(server, where.partition(".")[2], uuid) as socket:
        assert json.loads(socket.recv(10)) == ["vnc", uuid, {}]
    body = {"key_name": "looks", "key": "looks-key", "read_only": True}
    server.call("POST", "/auth/namespaces/shop/keys", body, namespace="shop")
    looks = Visitor(server.url).login("shop", "looks-key")
    assert looks.ask(f"/ui/instances/{uuid}")[0] == 200
    for act in ("screen", "poweroff", "delete"):
        status, _, page = looks.send(f"/ui/instances/{uuid}/{act}")
        assert status == 403 and "key looks of namespace shop may only read" in page
    assert looks.send("/ui/logout")[:2] == (200, "/ui/login") and not list(looks.jar)


def test_a_server_without_novnc_says_what_to_do(tmp_path: Path) -> None:
    with running(tmp_path, config=Config(state_dir=tmp_path, node_name="node1", novnc=tmp_path)) as server:
        answer = server.call("GET", "/screen", namespace="")
    assert answer.status == 503 and "apt install novnc" in answer.body["hint"]
    assert "--listen 5901" in answer.body["hint"]
