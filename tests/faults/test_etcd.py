"""etcd members that die, hang, are full or slow, and answers that never come: nothing half done, nothing twice."""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

pytest.importorskip("etcd3gw")

from compute import state_members
from compute.cluster.state.etcd import EtcdStore
from compute.cluster.state.protocol import ABSENT
from compute.config import Config
from compute.errors import ComputeError, Denied, NoSpace, Stale, Unavailable
from tests.drills import everything, seed
from tests.etcd import Members, members
from tests.linearizable import History, linearizable


@pytest.fixture(scope="module")
def one() -> Iterator[Members]:
    with members(1) as made:
        yield made


class Between(ThreadingHTTPServer):
    """Between a store and its member: takes requests on, and may keep answers, be slow, or hold requests back."""

    daemon_threads = True

    def __init__(self, member: str) -> None:
        super().__init__(("127.0.0.1", 0), _Carried)
        self.member, self.delay_s = member, 0.0
        self.lose = lambda path: False
        self.hold = lambda path: False
        self.held: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.server_address[1]}"

    def release(self) -> list[Any]:
        """What was held back reaches the member now; its answers, which nobody waits for."""
        return [requests.post(self.member + path, data=body, timeout=20).json() for path, body in self.held]


class _Carried(BaseHTTPRequestHandler):
    server: Between
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay_s)
        self.close_connection = True
        if self.server.hold(self.path):
            self.server.held.append((self.path, body))
            return
        answer = requests.post(self.server.member + self.path, data=body, timeout=20)
        if self.server.lose(self.path):
            return
        with suppress(OSError):
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def between(member: str) -> Iterator[Between]:
    server = Between(member)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_a_commit_whose_answer_is_lost_is_recognised_and_not_done_twice(one: Members, tmp_path: Path) -> None:
    with between(one.clients[0]) as way:
        store = EtcdStore(f"{way.url}{tmp_path}")
        revision = store.commit({"a": b"1"}, expect={"a": ABSENT})
        losses = iter([True, False])
        way.lose = lambda path: path.endswith("txn") and next(losses, False)
        second = store.commit({"a": b"2", "b": b"new"}, expect={"a": revision, "b": ABSENT})
        found = store.get("a")
        assert found is not None and (found.value, found.revision) == (b"2", second)
        with pytest.raises(Stale):
            store.commit({"a": b"3"}, expect={"a": revision})
        store.close()


def test_answers_lost_at_random_leave_a_counter_that_is_right(one: Members, tmp_path: Path) -> None:
    rng = random.Random(seed())
    with between(one.clients[0]) as way:
        store = EtcdStore(f"{way.url}{tmp_path}")
        way.lose = lambda path: path.endswith("txn") and rng.random() < 0.3

        def add(_: int) -> int:
            while True:
                found = store.get("n")
                before = int(found.value) if found else 0
                with suppress(Stale):
                    store.commit(
                        {"n": b"%d" % (before + 1)}, expect={"n": found.revision if found else ABSENT}
                    )
                    return before

        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(add, range(40)))
        assert sorted(taken) == list(range(40)), "each number was given once"
        store.close()


def test_a_commit_that_arrives_after_it_was_given_up_does_nothing(one: Members, tmp_path: Path) -> None:
    with between(one.clients[0]) as way:
        store = EtcdStore(f"{way.url}{tmp_path}")
        store.commit({"a": b"1"}, expect={})
        holds = iter([True])
        way.hold = lambda path: path.endswith("txn") and next(holds, False)
        store.commit({"a": b"2"}, expect={})
        store.commit({"a": None}, expect={})
        assert [answer.get("succeeded") for answer in way.release()] == [None]
        assert store.get("a") is None
        store.close()


def test_a_slow_etcd_is_no_error(one: Members, tmp_path: Path) -> None:
    with between(one.clients[0]) as way:
        way.delay_s = 0.2 if everything() else 0.1
        store = EtcdStore(f"{way.url}{tmp_path}")
        lease = store.grant(20)
        store.commit({"a": b"1", "b": b""}, expect={"a": ABSENT}, lease=lease, ephemeral=("b",))
        store.refresh(lease)
        store.commit({"a": b"2"}, expect={}, lease=lease)
        assert [(record.key, record.value) for record in store.list("")] == [("a", b"2"), ("b", b"")]
        store.close()


def test_a_full_etcd_says_so_and_guests_can_still_be_deleted() -> None:
    with members(1, "--quota-backend-bytes=16777216") as small:
        store, other = EtcdStore(f"{small.url}/mine"), EtcdStore(f"{small.url}/other")
        store.commit({"guest": b"here"}, expect={})
        with pytest.raises(NoSpace, match="full"):
            # etcd looks at its size ten times a second: slowly towards the end, or it is far beyond its limit.
            for n in range(2000):
                other.commit({f"big{n}": bytes(400_000 if n < 28 else 20_000)}, expect={})
                time.sleep(0 if n < 28 else 0.01)
        found = store.get("guest")
        assert found is not None
        store.commit({"guest": None, "event": b"it is deleted"}, expect={"guest": found.revision})
        assert store.get("guest") is None
        for store_ in (store, other):
            store_.close()


def test_a_user_of_etcds_own_is_who_we_are_and_others_are_refused() -> None:
    with members(1) as guarded:
        for path, body in (
            ("user/add", {"name": "root", "password": "pw:d"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("enable", {}),
        ):
            assert requests.post(f"{guarded.clients[0]}/v3/auth/{path}", json=body, timeout=20).ok
        store = EtcdStore(guarded.url, "", "", "", "root:pw:d")
        store.commit({"a": b"1"}, expect={"a": ABSENT})
        changes = store.watch("", 0, 5)
        assert [change.key for change in changes] == ["a"]
        store.close()
        for user, error in (("", Denied), ("root:wrong", Unavailable)):
            with pytest.raises(error, match="user"):
                EtcdStore(guarded.url, "", "", "", user)


def test_members_with_tls_are_known_by_their_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    more = ["-days", "2", "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"]
    for name in ("mine", "other"):
        files = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.crt")]
        subprocess.run([*made, *more, *files], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "other.crt"))
    options = [f"--cert-file={tmp_path}/mine.crt", f"--key-file={tmp_path}/mine.key"]
    with members(
        1, *options, "--client-cert-auth", f"--trusted-ca-file={tmp_path}/mine.crt", tls=tmp_path
    ) as safe:
        mine, url = (
            (str(tmp_path / "mine.crt"), str(tmp_path / "mine.key")),
            safe.url.replace("etcd:", "etcds:"),
        )
        store = EtcdStore(url, mine[0], *mine)
        store.commit({"a": b"1"}, expect={"a": ABSENT})
        store.close()
        monkeypatch.setattr("compute.cluster.state.gateway.PATIENCE_S", 0.5)
        with pytest.raises(Unavailable, match="certificate"):
            EtcdStore(url, str(tmp_path / "other.crt"), *mine)


def unhurt(three: Members, store: EtcdStore, n: int, rng: random.Random, hurt: bool) -> None:
    """Make a member unwell, or well again."""
    if hurt and rng.random() < 0.5:
        three.kill(n)
    elif hurt:
        three.signal(n, signal.SIGSTOP)
    elif three.processes[n] is None:
        three.start(n)
    else:
        three.signal(n, signal.SIGCONT)


@pytest.mark.drill
def test_one_of_three_members_is_killed_or_hangs_and_every_answer_was_true() -> None:
    """Registers and numbers that are given once, by writers and readers of three stores; judged afterwards."""
    with members(3) as three:
        for n in range(20 if everything() else 1):
            rng = random.Random(seed() + n)
            place, history, stop = f"/r{n}", History(), threading.Event()
            stores = [EtcdStore(three.url + place) for _ in range(3)]
            keys = ["name", "claims"]

            def act(which: int, n: int = n, stores: list[Any] = stores, history: History = history) -> None:
                rng, store = random.Random(seed() + 100 * n + which), stores[which % 3]
                while not stop.is_set():  # noqa: B023
                    key, value = rng.choice(keys), f"{which}-{rng.random()}"  # noqa: B023
                    with suppress(Unavailable, Stale):
                        if rng.random() < 0.5:
                            with history.read(key) as call:
                                found = store.get(key)
                                call.result = found.value.decode() if found else ""
                        else:
                            found = store.get(key)
                            expect = found.value.decode() if found else ""
                            with history.swap(key, expect, value) as call:
                                revision = found.revision if found else ABSENT
                                store.commit({key: value.encode()}, expect={key: revision})
                                call.result = "done"
                    time.sleep(rng.uniform(0.005, 0.03))

            with ThreadPoolExecutor(6) as pool:
                acting = [pool.submit(act, which) for which in range(6)]
                try:
                    for _ in range(2 if everything() else 1):
                        victim = rng.randrange(3)
                        time.sleep(0.5)
                        unhurt(three, stores[0], victim, rng, hurt=True)
                        time.sleep(rng.uniform(0.5, 4))
                        unhurt(three, stores[0], victim, rng, hurt=False)
                        three.ready(victim)
                finally:
                    stop.set()
                for one_ in acting:
                    one_.result()
            assert sum(call.result == "done" for call in history.calls) > 10
            assert linearizable(history.calls), f"a history that no order explains, round {n}"
            for store in stores:
                store.close()


@pytest.mark.skipif(not everything(), reason="scripts/test --all")
def test_without_a_majority_nothing_is_answered_and_then_all_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compute.cluster.state.gateway.PATIENCE_S", 0.5)
    monkeypatch.setattr("compute.cluster.state.gateway.ANSWER_S", 1.0)
    with members(3) as three:
        store = EtcdStore(three.url)
        store.commit({"a": b"1"}, expect={})
        for n in (1, 2):
            three.kill(n)
        for action in (lambda: store.get("a"), lambda: store.commit({"a": b"2"}, expect={})):
            with pytest.raises(Unavailable):
                action()
        for n in (1, 2):
            three.start(n)
        for n in range(3):
            three.ready(n)
        deadline = time.monotonic() + 60
        while True:
            with suppress(ComputeError):
                store.commit({"b": b"3"}, expect={})
                break
            assert time.monotonic() < deadline
        found = store.get("b")
        assert found is not None and found.value == b"3"
        store.close()


def test_the_doctor_says_of_a_member_that_it_is_slow_or_full(tmp_path: Path) -> None:
    with members(1, "--quota-backend-bytes=1048576") as small, between(small.clients[0]) as link:
        config = Config(state_dir=tmp_path, state=link.url)
        link.delay_s = 0.2
        ((seen, mend),) = state_members(config)
        assert ": answers in " in seen and mend.startswith("a faster disk")
        link.delay_s = 0
        put = {"key": "eA==", "value": "A" * (1 << 17)}
        for _ in range(100):
            if not requests.post(f"{small.clients[0]}/v3/kv/put", json=put, timeout=20).ok:
                break
        ((seen, mend),) = state_members(config)
        assert "NOSPACE" in seen and mend.startswith("etcdctl defrag")
