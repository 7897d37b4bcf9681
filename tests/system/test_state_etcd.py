"""A server whose state is in etcd: its API, copies there and back, backups, and members and servers that die."""

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from compute import back_up_state, copy_state, restore_state, state_members
from compute.cluster import state_backup
from compute.cluster.records.epochs import Epoch
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state import opening
from compute.cluster.state.opening import open_state
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import Conflict, Unavailable
from tests import api_server, invariants
from tests.api_server import Running
from tests.drills import everything, seed
from tests.etcd import Members, members

pytest.importorskip("etcd3gw")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def one() -> Iterator[Members]:
    with members(1) as made:
        yield made


def config_of(directory: Path, state: str = "") -> Config:
    return Config(state_dir=directory, node_name="node1", state=state)


def records(store: StateStore) -> dict[str, bytes]:
    return {r.key: r.value for r in store.list("") if not r.key.startswith(("epoch/", "alive/"))}


def identity(place: Path) -> None:
    (place / "installation.json").write_text('{"id": "0123abcd"}')
    (place / "node.json").write_text(json.dumps({"machine": "m1", "epoch": "", "reached": 0}))


def test_the_api_serves_from_etcd_and_a_server_that_starts_again_goes_on(
    one: Members, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "sf", f"{one.url}{tmp_path}")
    with api_server.running(tmp_path / "sf", config=config) as server:
        lan = server.network()["uuid"]
        made = [server.instance(f"web{n}", lan).body["uuid"] for n in range(5)]
        for uuid in made:
            server.wait_for(f"/instances/{uuid}", "created")
        server.call("DELETE", f"/instances/{made[0]}")
        server.wait_for(f"/instances/{made[0]}", "deleted")
        invariants.check(server.services.store)
    with api_server.running(tmp_path / "sf", config=config) as again:
        assert {i["uuid"] for i in again.get("/instances")} == set(made[1:])
        again.call("DELETE", "/instances", {"confirm": True})
        for uuid in made[1:]:
            again.wait_for(f"/instances/{uuid}", "deleted")
        assert again.call("DELETE", "/networks/lan").status == 200
        invariants.check(again.services.store)
    assert not (tmp_path / "sf/sf.db").exists()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a server that made a network and guests, and was stopped."""
    place = tmp_path / "sf"
    with api_server.running(place) as server:
        lan = server.network()["uuid"]
        for n in range(30):
            server.instance(f"web{n}", lan)
    identity(place)
    return place


def test_a_state_is_copied_to_etcd_and_back_in_a_new_epoch(one: Members, place: Path, tmp_path: Path) -> None:
    url, back = f"{one.url}{tmp_path}", tmp_path / "back"
    with closing(open_state(config_of(place))) as store:
        before, first = records(store), Transaction(store).get(Epoch, "state")
    back.mkdir()
    copy_state(config_of(place), str(place), url)
    with closing(open_state(config_of(place, url))) as store:
        now = Transaction(store).get(Epoch, "state")
        assert records(store) == before
        assert now.number != first.number and now.former[0] == first.number and now.waiting == ("node1",)
        invariants.check(store)
    with pytest.raises(Conflict, match="there is a state"):
        copy_state(config_of(place), str(place), url)
    copy_state(config_of(place), url, str(back))
    with closing(open_state(config_of(back))) as store:
        assert records(store) == before
        assert Transaction(store).get(Epoch, "state").former[:2] == (now.number, first.number)
    # A server goes on from there, once its node has said what it has.
    with api_server.running(place, config=config_of(place, url)) as server:
        assert len(server.get("/instances")) == 30


def test_a_copy_that_was_killed_at_any_moment_is_no_state_and_is_begun_anew(
    one: Members, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_state(config_of(place))) as store:
        before = records(store)
    for step in (0, 1):
        url, commits = f"{one.url}{tmp_path}/{step}", iter(range(99))
        into = open_state(config_of(place, url))
        real = into.commit

        def fails(*arguments: object, step: int = step, commits=commits, real=real, **named: object) -> int:  # type: ignore[no-untyped-def]
            if next(commits) == step:
                raise Unavailable("killed")
            return int(real(*arguments, **named))

        with monkeypatch.context() as patch:
            patch.setattr(into, "commit", fails)
            with pytest.raises(Unavailable):
                back_up_state(place, str(tmp_path / "kept"))
                restore_state(place, str(tmp_path / "kept"), into=into)
        assert into.get("epoch/state") is None
        restore_state(place, str(tmp_path / "kept"), into=into)
        assert records(into) == before
        into.close()


def test_the_state_in_etcd_is_backed_up_by_the_server_and_by_hand(one: Members, tmp_path: Path) -> None:
    url, place = f"{one.url}{tmp_path}", tmp_path / "sf"
    config = replace(config_of(place, url), state_backup=(tmp_path / "kept").as_uri())
    with api_server.running(place, config=config) as server:
        server.network()
        identity(place)
        store = server.services.store
        assert "was backed up" in state_backup._when_due(config, store)
        made = back_up_state(place, str(tmp_path / "file"), records=store)
        assert made.trouble == ""
        before = records(store)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    restore_state(fresh, config.state_backup)
    with closing(open_state(config_of(fresh))) as restored:
        assert records(restored) == before
    other = tmp_path / "other"
    told = {"SF_STATE": f"{url}/again", "SF_STATE_DIR": str(other), "PATH": "/usr/bin:/bin"}
    sf = [Path(sys.executable).with_name("sf"), "state"]
    subprocess.run([*sf, "restore", config.state_backup], env=told, check=True)
    with closing(open_state(config_of(other, f"{url}/again"))) as restored:
        assert records(restored) == before
    assert not (other / "sf.db").exists() and (other / "installation.json").exists()
    subprocess.run([*sf, "backup", tmp_path / "by-hand"], env=told, check=True)
    assert subprocess.run([*sf, "check", tmp_path / "by-hand"], env=told).returncode == 0


def test_the_doctor_sees_each_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "SLOW_MS", 60_000)  # what is slow has a test of its own
    with members(3) as three:
        config = config_of(tmp_path, three.url)
        assert [mend for _, mend in state_members(config)] == ["", "", ""]
        three.kill(1)
        deadline = time.monotonic() + 60
        while [bool(mend) for _, mend in state_members(config)] != [False, True, False]:
            assert time.monotonic() < deadline  # the others choose a leader first
        told = {"SF_STATE": three.url, "SF_STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
        sf = [Path(sys.executable).with_name("sf"), "doctor", "--format", "json"]
        said = json.loads(subprocess.run(sf, env=told, capture_output=True, cwd=ROOT).stdout)
        answers = [": answers in " in one["what"] for one in said if one["part"] == "state"]
        assert answers == [True, False, True]


def start(directory: Path, state: str) -> tuple["subprocess.Popen[str]", Running]:
    told = [sys.executable, "-m", "tests.api_server", str(directory), state]
    child = subprocess.Popen(told, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout
    url, key = child.stdout.readline().split()
    return child, Running(url, key, None, None, None)  # type: ignore[arg-type]


@pytest.mark.skipif(not everything(), reason="scripts/test --all; test_servers.py has a sample of it")
@pytest.mark.timeout(1800)
def test_a_server_and_a_member_are_killed_under_load_and_every_answer_took_effect(tmp_path: Path) -> None:
    """Of three members; the creates that were answered are there, what was deleted is gone, nothing is leaked."""
    rng = random.Random(seed())
    acknowledged: dict[str, str] = {}
    doubtful = set[str]()
    with members(3) as three:
        for number in range(20):
            child, server = start(tmp_path, three.url)
            victim = rng.randrange(3)
            timers = [
                threading.Timer(rng.uniform(0.2, 2), three.kill, [victim]),
                threading.Timer(rng.uniform(2, 4), child.kill),
            ]
            try:
                lan = server.call("POST", "/networks", {"name": "lan", "netblock": "10.0.0.0/22"})
                assert lan.status in (200, 409)
                there = {i["uuid"]: i for i in server.get("/instances")}
                missing = set(acknowledged.values()) - there.keys()
                assert not missing, f"acknowledged, and gone: {missing}"
                for timer in timers:
                    timer.start()
                for step in range(1000):
                    name = f"vm-{number}-{step}"
                    made = server.instance(name, network="lan", memory=16)
                    assert made.status in (200, 503, 507), made.body
                    if made.status == 200:
                        acknowledged[name] = made.body["uuid"]
                    if acknowledged and (made.status == 507 or rng.random() < 0.7):
                        uuid = acknowledged.pop(rng.choice(list(acknowledged)))
                        gone = server.call("DELETE", f"/instances/{uuid}")
                        assert gone.status in (200, 503), gone.body
                        if gone.status == 503:
                            doubtful.add(uuid)
            except (OSError, ValueError, http.client.HTTPException):
                pass  # it died in the middle of an answer
            finally:
                for timer in timers:
                    timer.cancel()
                child.kill()
                child.wait()
            three.start(victim)
            three.ready(victim)
            with closing(open_state(config_of(tmp_path, three.url))) as store:
                invariants.check(store)
        child, server = start(tmp_path, three.url)
        try:
            server.call("DELETE", "/instances", {"confirm": True})
            deadline = time.monotonic() + 60
            while server.get("/instances"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert server.call("DELETE", "/networks/lan").status == 200
        finally:
            child.kill()
            child.wait()
        with closing(open_state(config_of(tmp_path, three.url))) as store:
            invariants.check(store)
            assert not store.list("ipam/") and not store.list("interface/")
            assert {i.state for i in Transaction(store).list(Instance)} <= {"deleted"}


@pytest.mark.skipif(not everything(), reason="scripts/test --all; test_servers.py has a sample of it")
def test_a_member_that_dies_under_a_server_costs_its_callers_no_more_than_a_pause(tmp_path: Path) -> None:
    with members(3) as three:
        config = config_of(tmp_path, three.url)
        with api_server.running(tmp_path, config=config) as server:
            server.network()
            for n in range(3):  # each in turn, so the one that answers, too
                three.kill(n)
                made = server.instance(f"web{n}", "lan")
                assert made.status == 200, made.body
                server.wait_for(f"/instances/{made.body['uuid']}", "created", 60)
                three.start(n)
                three.ready(n)
            with suppress(AssertionError):
                server.wait_for("/instances/web0", "created")
            invariants.check(server.services.store)
