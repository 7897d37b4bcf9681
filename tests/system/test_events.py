"""The events of all that somebody sees: by the API, and by `sf events`."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError

import pytest

from compute.api import history
from tests.api_server import Running, running
from tests.system.machine import within

SF = Path(sys.executable).with_name("sf")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "state") as found:
        found.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "shop-key"})
        found.login("shop", "shop-key")
        found.network()
        yield found


def stream(server: Running, namespace: str, key: str, **more: str) -> Any:
    token = server.login(namespace, key).body["access_token"]
    asked = urllib.request.Request(
        f"{server.url}/events?follow=true", headers={"Authorization": f"Bearer {token}", **more}
    )
    return urllib.request.urlopen(asked, timeout=30)


def told(answer: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    last = ""
    for line in answer:
        what, _, text = line.decode().rstrip().partition(": ")
        last = text if what == "id" else last
        if what == "data":
            yield last, json.loads(text)


def test_the_newest_events_of_all_that_the_caller_sees_and_of_nothing_else(server: Running) -> None:
    server.instance("web", network="lan")
    server.wait_for("/instances/web", "created")
    every = server.get("/events", {"limit": 50})
    assert {e["object"] for e in every} == {"instance", "network", "node"}
    assert [e["timestamp"] for e in every] == sorted((e["timestamp"] for e in every), reverse=True)
    assert {"name": "web", "message": "state is created"}.items() <= next(
        e for e in every if e["message"] == "state is created"
    ).items()
    assert len(server.get("/events", {"limit": 2})) == 2
    assert {e["type"] for e in server.get("/events", {"event_type": "audit"})} == {"audit"}
    theirs = server.get("/events", namespace="shop", key="shop-key")
    assert {e["object"] for e in theirs} <= {"node"}
    assert server.call("GET", "/events", namespace="").status == 401


def test_a_stream_of_all_events_tells_of_ones_own_alone_resumes_and_ends_with_its_key(
    server: Running,
) -> None:
    with stream(server, "system", server.key) as all_of_it, stream(server, "shop", "shop-key") as shop:
        server.instance("web", network="lan")
        body = {"name": "shops", "netblock": "10.44.0.0/24"}
        assert server.call("POST", "/networks", body, namespace="shop", key="shop-key").status == 200
        own = next(told(shop))[1]
        assert (own["object"], own["name"]) == ("network", "shops")
        reading = told(all_of_it)
        mark, first = next((m, e) for m, e in reading if e["name"] == "web")
        assert first["message"] == "asked for; placed on node1"
        next(e for _, e in reading if e["name"] == "shops")
        server.call("PUT", "/auth/namespaces/shop/keys/k", {"key": "another"})
        assert [e for _, e in told(shop) if e["object"] != "node"] == []  # and it ends
    with stream(server, "system", server.key, **{"Last-Event-ID": mark}) as again:
        assert "asked for; placed on node1" not in {next(told(again))[1]["message"]}


def test_a_reader_that_comes_back_after_a_restart_is_told_what_happened_meanwhile(tmp_path: Path) -> None:
    with running(tmp_path / "state") as server:
        server.network()
        with stream(server, "system", server.key) as first:
            server.instance("web", network="lan")
            mark = next(mark for mark, _ in told(first))
        server.wait_for("/instances/web", "created")
    with (
        running(tmp_path / "state") as again,
        stream(again, "system", again.key, **{"Last-Event-ID": mark}) as resumed,
    ):
        for _, event in told(resumed):
            if (event["name"], event["message"]) == ("web", "state is created"):
                return
    raise AssertionError("it is forgotten")


def test_what_is_used_is_in_views_and_the_newest_of_its_events_and_a_node_speaks_of_its_own_guests(
    server: Running,
) -> None:
    uuid = server.instance("web", network="lan").body["uuid"]
    server.wait_for(f"/instances/{uuid}", "created")
    server.count()
    server.count()
    used = server.get("/instances/web")["usage"]
    assert used["memory_bytes"] == 1 << 28 and used["per_s"]["cpu_s"] > 0 and used["cpu_share"] > 0
    (event,) = server.get("/instances/web/events", {"event_type": "usage"})
    assert (event["type"], event["extra"]["memory_bytes"]) == ("usage", 1 << 28)
    (event,) = server.get("/nodes/node1/events", {"event_type": "resources", "limit": 1})
    assert event["extra"]["disk_total_bytes"] == 100 << 30
    assert "usage" not in {e["type"] for e in server.get("/instances/web/events")}
    server.call("POST", "/instances/web/poweroff")
    within(20, lambda: server.get("/instances/web")["power_state"] == "off", "it is off")

    def unknown() -> bool:
        server.count()
        return server.get("/instances/web")["usage"] is None

    within(20, unknown, "its node counts it no more")  # which says first that it is off, and then forgets it
    metrics = server.call("GET", "/metrics").body.decode()
    assert 'sf_node_disk_total_bytes{node="node1"} 1.073741824e+11' in metrics


def test_who_follows_events_too_often_is_refused_until_one_has_ended(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_MOST_OF_ONE", 2)
    first, second = (stream(server, "shop", "shop-key", **{"Last-Event-ID": "1"}) for _ in range(2))
    assert [next(told(one)) for one in (first, second)]  # both are under way
    with pytest.raises(HTTPError) as refused:
        stream(server, "shop", "shop-key")
    assert refused.value.code == 503
    assert stream(server, "system", server.key).status == 200
    first.close()
    second.close()

    def again() -> bool:
        with suppress(HTTPError), stream(server, "shop", "shop-key") as answer:
            return bool(answer.status == 200)
        return False

    within(30, again, "there is room once they are gone")


def test_sf_events_lists_and_follows_in_lines_of_json(server: Running, tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "SF_API_URL": server.url, "SF_KEY": server.key}
    listed = subprocess.run(
        [SF, "events", "--limit", "3"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "network lan" in listed.stdout and "created as 10.42.0.0/24" in listed.stdout, listed.stderr
    argv = [SF, "events", "-f", "--format", "json"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.extend(following.stdout or ()), daemon=True)
        reading.start()
        try:
            for number in range(100):  # it is not known when it listens
                server.network(f"n{number}", f"10.{number + 50}.0.0/24")
                reading.join(0.3)
                if said:
                    break
            event = json.loads(said[0])
            assert event["object"] == "network" and event["message"].startswith("created as 10.")
        finally:
            following.kill()
            reading.join(10)
