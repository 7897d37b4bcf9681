"""The server's state kept elsewhere and put back: in files, directories and buckets, whatever is killed meanwhile."""

import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import imagestore
from compute import back_up_state, restore_state, state_backups
from compute.cluster import state_backup
from compute.cluster.records.epochs import Epoch
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import Conflict, Denied
from imagestore import Corrupt, open_store
from tests import api_server, servers
from tests.drills import rounds, seed
from tests.ending import killed


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The state directory of a server that made a network and a guest, and was stopped."""
    place = tmp_path / "sf"
    with api_server.running(place) as server:
        lan = server.network()["uuid"]
        made = server.instance("web", lan).body
        server.wait_for(f"/instances/{made['uuid']}", "created")
    (place / "installation.json").write_text('{"id": "0123abcd"}')
    (place / "node.json").write_text(json.dumps({"machine": "m1", "epoch": "", "reached": 0}))
    return place


def names(place: Path) -> set[str]:
    with closing(SqliteStore(place / "sf.db")) as store:
        return {one.name for one in Transaction(store).list(Instance)}


def epoch(place: Path) -> Epoch:
    with closing(SqliteStore(place / "sf.db")) as store:
        return Transaction(store).get(Epoch, "state")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_a_file_or_a_store_keeps_comes_back_on_a_new_machine_in_a_new_epoch(
    server: Path, tmp_path: Path
) -> None:
    before = epoch(server)
    for where in (str(tmp_path / "kept"), (tmp_path / "store").as_uri()):
        made = back_up_state(server, where)
        assert (made.installation, made.instances, made.trouble) == ("0123abcd", 1, "")
        assert [one for one, _ in state_backups(where)] == [made]
        fresh = tmp_path / f"new-{Path(where).name}"
        fresh.mkdir()
        restore_state(fresh, where)
        for name in ("sf.db", "node.json", "auth/local-key"):
            assert mode(fresh / name) == 0o600, name
        assert (fresh / "auth/local-key").read_text() == (server / "auth/local-key").read_text()
        assert names(fresh) == {"web"}
        now = epoch(fresh)
        assert now.number != before.number and now.former[0] == before.number
        assert now.waiting == ("node1",) and made.name in now.why
        assert not list(fresh.glob(".restore*"))
        # A server starts on it, its node says what runs there, and then things begin again.
        with api_server.running(fresh) as again:
            assert again.get("/instances")[0]["name"] == "web"
            assert again.instance("db").status == 503
            assert again.call("PATCH", "/instances/web", {"cpus": 2}).status == 503
    assert mode(next((tmp_path / "store/state").iterdir())) == 0o600


def test_a_backup_beside_a_server_that_writes_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "sf"
    with api_server.running(place) as server:
        (place / "installation.json").write_text('{"id": "0123abcd"}')
        for number in range(5):
            server.network(f"lan{number}", f"10.{number}.0.0/24")
            assert back_up_state(place, str(tmp_path / "kept")).trouble == ""
    restored = tmp_path / "new"
    restored.mkdir()
    restore_state(restored, str(tmp_path / "kept"))
    with api_server.running(restored) as server:
        assert len(server.get("/networks")) == 5


def test_put_back_over_a_state_that_went_on_the_newer_one_is_kept_beside_it(
    server: Path, tmp_path: Path
) -> None:
    back_up_state(server, str(tmp_path / "kept"))
    with api_server.running(server) as running:
        running.call("DELETE", "/instances/web")
        running.network("later", "10.9.0.0/24")
    restore_state(server, str(tmp_path / "kept"))
    assert names(server) == {"web"}
    (aside,) = server.glob("sf.db.2*")
    with closing(sqlite3.connect(aside)) as old:
        assert old.execute("select count(*) from kv where key like 'network/%'").fetchone() == (2,)


def test_a_directory_of_another_installation_is_refused_and_stays_as_it_is(
    server: Path, tmp_path: Path
) -> None:
    back_up_state(server, str(tmp_path / "kept"))
    (server / "installation.json").write_text('{"id": "fedcba98"}')
    before = {path: path.read_bytes() for path in server.rglob("*") if path.is_file()}
    with pytest.raises(Conflict, match="another installation"):
        restore_state(server, str(tmp_path / "kept"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_changed_bit_anywhere_is_noticed_and_an_older_backup_can_be_named(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (tmp_path / "store").as_uri()
    first = back_up_state(server, where)
    store = open_store(where)
    later = store.backend.now() + 5
    monkeypatch.setattr(type(store.backend), "now", lambda self: later)
    newest = back_up_state(server, where)
    path = tmp_path / "store" / "state" / newest.name
    whole = path.read_bytes()
    rng = random.Random(seed())
    for at in (0, 11, 75, *(rng.randrange(len(whole)) for _ in range(20))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        assert [bool(one.trouble) for one, _ in state_backups(where)] == [True, False]
        fresh = tmp_path / "new"
        fresh.mkdir()
        with pytest.raises(Corrupt):
            restore_state(fresh, where)
        assert not (fresh / "sf.db").exists() and not (fresh / "installation.json").exists()
        shutil.rmtree(fresh)
    for cut in (0, 5, 76, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert next(state_backups(where))[0].trouble
    fresh.mkdir()
    restore_state(fresh, where, first.name)
    assert names(fresh) == {"web"}


def test_a_small_file_that_means_endless_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    from imagestore import Digest

    monkeypatch.setattr(state_backup, "_MOST_BYTES", 1 << 20)
    body = zstandard.compress(bytes(64 << 20))
    (tmp_path / "bomb").write_bytes(b"sf-state 1 " + Digest.of(body).hex().encode() + b"\n" + body)
    assert "more than 1 MiB" in next(state_backups(str(tmp_path / "bomb")))[0].trouble


def test_a_published_store_takes_no_state_and_no_store_shows_one_to_its_readers(
    server: Path, tmp_path: Path
) -> None:
    from imagestore import STATES
    from imagestore.mirror.tree import public

    kept = tmp_path / "kept"
    name = back_up_state(server, kept.as_uri()).name
    assert (kept / "state" / name).is_file() and public(f"/state/{name}") is None
    assert mode(kept / "state" / name) == 0o600
    with pytest.raises(imagestore.Denied, match="state of a server"):
        open_store(kept.as_uri()).check_public()
    store = open_store((tmp_path / "store").as_uri(), create=True)
    store.backend.put(f"tuf/{'0' * 64}/1.root.json", b"{}")
    with pytest.raises(Denied, match="published"):
        back_up_state(server, str(tmp_path / "store"))
    assert not list(store.objects(STATES))


def test_the_server_backs_up_when_it_is_due_and_the_oldest_go(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (tmp_path / "store").as_uri()
    config = Config(state_dir=server, state_backup=where, state_backup_every_s=3600, state_backup_keep=2)
    assert "was backed up" in state_backup._when_due(config)
    assert state_backup._when_due(config) == ""
    backend = type(open_store(where).backend)
    for hour in range(1, 4):
        for path in (tmp_path / "store/state").iterdir():
            os.utime(path, (path.stat().st_mtime - 3600,) * 2)
        now = time.time() + hour
        monkeypatch.setattr(backend, "now", lambda self, now=now: now)
        assert "was backed up" in state_backup._when_due(config)
    assert len(list(state_backups(where))) == 2
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("no directory")
    assert "was not backed up" in state_backup._when_due(config)


def test_a_bucket_keeps_so_many_and_gives_the_newest(
    server: Path, tmp_path: Path, seaweedfs: servers.Server
) -> None:
    where = seaweedfs.url("home")
    for number in range(2):
        with api_server.running(server) as running:
            running.network(f"lan{number}", f"10.{number}.0.0/24")
        time.sleep(1.1)  # the names, and the times of S3, are whole seconds
        made = back_up_state(server, where, 1)
    assert [bool(one.trouble) for one, _ in state_backups(where)] == [False]
    fresh = tmp_path / "new"
    fresh.mkdir()
    assert restore_state(fresh, where).name == made.name
    with api_server.running(fresh) as running:
        assert {network["name"] for network in running.get("/networks")} >= {"lan0", "lan1"}


KILLED = """
import sys, pathlib
from compute import back_up_state, restore_state
verb, place, where = sys.argv[1:]
print("ready", flush=True)
(back_up_state if verb == "backup" else restore_state)(pathlib.Path(place), where)
"""


@pytest.mark.drill
def test_killed_at_any_moment_a_backup_is_whole_or_none_and_a_restore_is_the_old_state_or_the_new_one(
    server: Path, tmp_path: Path
) -> None:
    rng, where = random.Random(seed()), (tmp_path / "store").as_uri()
    back_up_state(server, where)
    began = time.monotonic()
    fresh = tmp_path / "timed"
    fresh.mkdir()
    restore_state(fresh, where)
    took_s = 3 * (time.monotonic() - began) + 0.05
    for turn in range(rounds(full=40)):
        verb = ("backup", "restore")[turn % 2]
        place = tmp_path / f"turn{turn}"
        shutil.copytree(server, place)
        if verb == "restore":
            with closing(SqliteStore(place / "sf.db")) as store:  # it went on
                store.commit({"node/late": b'{"uuid": "u", "name": "late"}'}, expect={})
        argv = [sys.executable, "-c", KILLED, verb, str(place), where]
        with killed(subprocess.Popen(argv, stdout=subprocess.PIPE)) as running:
            assert running.stdout and running.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, took_s))
            running.send_signal(signal.SIGKILL)
        assert all(not one.trouble for one, _ in state_backups(where))
        assert names(place) == {"web"}
        restore_state(place, where)
        assert names(place) == {"web"} and epoch(place).waiting == ("node1",)
        assert not list(place.glob(".restore*"))
        with closing(SqliteStore(place / "sf.db")) as store:
            assert store.get("node/late") is None
        back_up_state(place, where)
