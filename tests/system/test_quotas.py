"""What a namespace may have: never more than its quota, however many ask at once; who is refused leaves nothing."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from compute.api.images import stores
from compute.cluster.quotas import DEFAULTS, used
from compute.cluster.records.addresses import FLOATING, Ipam
from compute.cluster.records.interfaces import Interface
from compute.cluster.records.taken import Claims, Taken
from compute.cluster.records.transaction import Transaction
from compute.config import Config
from imagestore.errors import NoSpace
from imagestore.push import push
from imagestore.store.open import open_store
from tests.api_server import Answer, Running, running
from tests.system.test_login import Laptop, laptop  # noqa: F401
from tests.system.test_push_over_the_wire import url
from tests.unit.imagestore.images import make_raw


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    config = Config(
        state_dir=tmp_path / "server",
        node_name="node1",
        floating_pool=IPv4Network("192.0.2.0/24"),
        uplink="lo",
    )
    with running(tmp_path / "server", config=config) as found:
        for name in ("shop", "rival"):
            body = {"namespace": name, "key_name": "k", "key": f"{name}-key"}
            assert found.call("POST", "/auth/namespaces", body).status == 200
            found.tokens[name] = found.login(name, f"{name}-key").body["access_token"]
        yield found


def limit(server: Running, **limits: int) -> None:
    assert server.call("PUT", "/auth/namespaces/shop/quota", limits).status == 200


def guest(server: Running, name: str, **more: object) -> Answer:
    return server.instance(name, as_namespace="shop", memory=16, **more)


def crowd(count: int, one: object) -> Counter[int]:
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(one, range(count)))  # type: ignore[arg-type]
    for refused in (a for a in answers if a.status == 507):
        assert "of namespace" not in refused.body["error"] and " at most" in refused.body["error"]
        assert refused.body["hint"] == "sf namespace quota show shop"
    return Counter(a.status for a in answers)


def has(server: Running, what: str) -> int:
    rows = server.get("/auth/namespaces/shop/quota", namespace="shop")
    return {row["name"]: row["used"] for row in rows}[what]


def test_fifty_that_ask_at_once_get_what_the_quota_allows_and_leave_nothing(server: Running) -> None:
    network = server.call(
        "POST", "/networks", {"name": "lan", "netblock": "10.9.0.0/24"}, namespace="shop"
    ).body
    for what, most, body in (
        ("instances", 5, {}),
        ("cpus", 8, {"cpus": 1}),
        ("memory_mib", 5 * 16 + 8, {}),
        ("disk_gb", 15, {"disk": [{"size": 3}]}),
        ("floating", 5, {"network": [{"network_uuid": network["uuid"], "float": True}]}),
    ):
        before = Transaction(server.services.store)
        held = before.get(Ipam, FLOATING).pool.held
        taken = {t.name for t in before.list(Taken)}
        limit(server, **{what: most})
        statuses = crowd(
            50, lambda number, body=body, what=what: guest(server, f"{what[:3]}-{number}", **body)
        )
        assert statuses == {200: most if what not in ("memory_mib", "disk_gb") else 5, 507: statuses[507]}, (
            what
        )
        assert has(server, what) <= most
        limit(server, **{what: DEFAULTS[what]})
        for row in server.get("/instances", namespace="shop"):
            assert server.call("DELETE", f"/instances/{row['uuid']}", namespace="shop").status == 200
            server.wait_for(f"/instances/{row['uuid']}", "deleted")
        after = Transaction(server.services.store)
        assert has(server, what) == 0
        assert (after.get(Claims, "node1").cpus, after.get(Claims, "node1").memory_mib) == (0, 0)
        assert {t.name for t in after.list(Taken)} == taken
        assert after.get(Ipam, FLOATING).pool.held == held
        assert not [i for i in after.list(Interface) if i.state == "created"]


def test_networks_keys_and_what_is_changed_later_count_too(server: Running) -> None:
    limit(server, networks=3, keys=4, cpus=4, floating=0)
    ask = lambda n: server.call(  # noqa: E731
        "POST", "/networks", {"name": f"n{n}", "netblock": f"10.{n}.0.0/24"}, namespace="shop"
    )
    assert crowd(20, ask) == {200: 3, 507: 17}
    key = lambda n: server.call(  # noqa: E731
        "POST", "/auth/namespaces/shop/keys", {"key_name": f"k{n}", "key": "x"}, namespace="shop"
    )
    assert crowd(8, key) == {200: 3, 507: 5}
    net = server.get("/networks", namespace="shop")[0]["uuid"]
    made = guest(server, "web", cpus=2, network=[{"network_uuid": net}]).body
    server.wait_for(f"/instances/{made['uuid']}", "created")
    assert server.call("PATCH", "/instances/web", {"cpus": 5}, namespace="shop").status == 507
    assert server.call("PATCH", "/instances/web", {"cpus": 4}, namespace="shop").status == 200
    interface = made["interfaces"][0]["uuid"]
    assert server.call("POST", f"/interfaces/{interface}/float", namespace="shop").status == 507
    assert server.call("DELETE", f"/networks/{net}", namespace="shop").status != 200
    # What is there stays when a limit falls; less is always allowed, and another namespace has its own.
    limit(server, networks=1, keys=1)
    assert server.call("DELETE", "/auth/namespaces/shop/keys/k0", namespace="shop").status in (200, 404)
    assert (
        server.call("POST", "/networks", {"name": "a", "netblock": "10.7.0.0/24"}, namespace="rival").status
        == 200
    )
    assert used(Transaction(server.services.store), "shop")["networks"] == 3
    assert server.call("DELETE", "/auth/namespaces/rival").status == 400


def test_only_the_administrator_sets_quotas_and_words_are_checked(server: Running) -> None:
    path = "/auth/namespaces/shop/quota"
    assert server.call("PUT", path, {"cpus": 9999}, namespace="shop").status == 403
    assert server.call("GET", path, namespace="rival").status == 404
    assert server.call("PUT", path, {"gold": 1}).status == 400
    for wrong in (-1, "x", 1.5, 2**60, None):
        assert server.call("PUT", path, {"cpus": wrong}).status == 400
    assert server.call("PUT", "/auth/namespaces/nobody/quota", {"cpus": 1}).status == 404
    limit(server, instances=0)
    assert guest(server, "a").status == 507
    # A namespace of the same name that is made later has the defaults.
    assert server.call("DELETE", "/auth/namespaces/shop").status == 200
    assert server.call("POST", "/auth/namespaces", {"namespace": "shop"}).status == 200
    assert {row["most"] for row in server.get(path)} == set(DEFAULTS.values())


def test_stored_bytes_are_counted_before_they_are_there(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    store = open_store(url(server))
    push(store, make_raw(tmp_path / "a.raw"), "a", "1", format_="raw")
    limit(server, stored_gb=0)
    with pytest.raises(NoSpace, match=r"stored_gb 0\.\d+, of 0 at most"):
        push(store, make_raw(tmp_path / "b.raw", seed=2), "b", "1", format_="raw")
    assert [r.name for r in store.names.list()] == ["a"]
    limit(server, stored_gb=1)
    # What is on its way counts: two of these are too many together.
    monkeypatch.setattr(stores, "_LOOK_S", 1e9)
    inner = server.services.namespaces.of("shop")
    stores._STORED[inner.url] = (1 << 30) - (3 << 20), stores._STORED[inner.url][1]

    def one(seed: int) -> bool:
        other = open_store(url(server))
        try:
            raw = make_raw(tmp_path / f"{seed}.raw", seed=seed, size_bytes=6 << 20)
            push(other, raw, f"n{seed}", "1", format_="raw", cache=tmp_path / str(seed))
        except NoSpace:
            return False
        finally:
            other.backend.close()
        return True

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(one, range(10, 16)))
    assert True in done and False in done
    assert stores._STORED[inner.url][0] <= 1 << 30
    store.backend.close()


def test_the_commands_show_and_set_them(server: Running, laptop: Laptop) -> None:  # noqa: F811
    import os
    import subprocess

    from tests.machines import SF

    def sf(*words: str, namespace: str = "system", key: str = "") -> subprocess.CompletedProcess[str]:
        told = {"SF_API_URL": server.url, "SF_NAMESPACE": namespace, "SF_KEY": key or server.key}
        environment = {"HOME": str(laptop.home), "PATH": os.environ["PATH"], "NO_COLOR": "1", **told}
        return subprocess.run([SF, *words], env=environment, capture_output=True, text=True, timeout=60)

    assert sf("namespace", "quota", "set", "shop", "instances=0", "stored_gb=3").returncode == 0
    shown = sf("namespace", "quota", "show", "shop", namespace="shop", key="shop-key").stdout
    assert [line.split() for line in shown.splitlines()][1] == ["instances", "0", "0"]
    refused = sf("instance", "create", "w", "--image", "debian:12", namespace="shop", key="shop-key")
    assert refused.returncode == 6
    assert (
        "namespace shop would have instances 1, of 0 at most (sf namespace quota show shop)" in refused.stderr
    )
    assert sf("namespace", "quota", "set", "shop", "instances=many").returncode == 2
    assert sf("namespace", "quota", "set", "shop", "gold=1").returncode == 2
