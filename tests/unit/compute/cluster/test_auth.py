"""Who logs in, and what it costs whom: counted in bcrypts, never in seconds."""

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from compute.cluster import auth
from compute.cluster.auth import Authority, create_namespace, hash_key, set_key
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import ComputeError, Unauthenticated, Unavailable


def _namespace(store: SqliteStore, name: str, key_name: str, key: str) -> None:
    transact(store, lambda txn: create_namespace(txn, name, {key_name: hash_key(key)}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    found = SqliteStore(tmp_path / "a.db")
    _namespace(found, "shop", "first", "one")
    transact(found, lambda txn: set_key(txn, "shop", "second", hash_key("two"), must_exist=False))
    yield found
    found.close()


class Counted:
    """bcrypt.checkpw that counts, and waits while `held` is set."""

    def __init__(self) -> None:
        self.real, self.count, self.go = auth.bcrypt.checkpw, 0, threading.Event()
        self.go.set()

    def __call__(self, key: bytes, hashed: bytes) -> bool:
        self.count += 1
        assert self.go.wait(60)
        return self.real(key, hashed)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(auth.bcrypt, "checkpw", counted)
    return counted


def as_in_0_1(store: SqliteStore) -> None:
    """Keys as version 0.1 left them."""

    def action(txn: Transaction) -> None:
        found = txn.get(Namespace, "shop")
        txn.update(replace(found, keys={k: replace(v, lookup="") for k, v in found.keys.items()}))

    transact(store, action)


def test_a_login_costs_one_bcrypt_whichever_key_it_is_and_none_the_second_time(
    store: SqliteStore, checks: Counted
) -> None:
    """E6."""
    authority = Authority(store)
    for key, cost in (("two", 1), ("two", 1), ("one", 2), ("one", 2)):
        assert authority.caller(f"Bearer {authority.login('shop', key)['access_token']}").namespace == "shop"
        assert checks.count == cost


def test_wrong_keys_cost_no_bcrypt(store: SqliteStore, checks: Counted) -> None:
    """E6: but for the one in 65,536 that the cheap hash lets through."""
    authority = Authority(store)
    for n in range(20):
        for namespace in ("shop", "nowhere"):
            with pytest.raises(Unauthenticated):
                authority.login(namespace, f"wrong{n}")
    assert checks.count <= 1


def test_wrong_keys_at_once_keep_no_right_one_out(store: SqliteStore) -> None:
    """E5: from the same address."""
    authority = Authority(store)
    keys = ["wrong"] * 24 + ["two", "one"]
    outcomes: dict[str, set[str]] = {"one": set(), "two": set(), "wrong": set()}

    def attempt(key: str) -> None:
        try:
            authority.login("shop", key, "10.0.0.1")
            outcomes[key].add("in")
        except ComputeError as err:
            outcomes[key].add(type(err).__name__)

    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(attempt, keys))
    assert outcomes == {"one": {"in"}, "two": {"in"}, "wrong": {"Unauthenticated"}}


def test_keys_of_0_1_are_hashed_cheaply_when_they_are_next_used(store: SqliteStore, checks: Counted) -> None:
    """E6."""
    as_in_0_1(store)
    authority = Authority(store)
    with pytest.raises(Unauthenticated):
        authority.login("shop", "wrong")
    assert checks.count == 2
    authority.login("shop", "two")
    authority.login("shop", "one")
    keys = Transaction(store).get(Namespace, "shop").keys
    assert all(len(known.lookup) == 4 for known in keys.values())
    count = checks.count
    Authority(store).login("shop", "two")
    assert checks.count == count + 1


def test_wrong_keys_for_a_namespace_of_0_1_keep_nobody_else_waiting(
    store: SqliteStore, checks: Counted
) -> None:
    """E5: guesses stand in a short line of their own."""
    _namespace(store, "bar", "k", "right")
    as_in_0_1(store)
    authority = Authority(store)
    checks.go.clear()
    with ThreadPoolExecutor(41) as pool:
        guesses = [pool.submit(authority.login, "shop", "wrong", f"10.0.0.{n}") for n in range(40)]
        done, _ = wait(guesses, return_when=FIRST_COMPLETED, timeout=60)
        assert {type(guess.exception()) for guess in done} == {Unavailable}, "the line is short"
        sure = pool.submit(authority.login, "bar", "right")
        checks.go.set()
        assert sure.result(60)["access_token"]
        assert {type(guess.exception(60)) for guess in guesses} == {Unauthenticated, Unavailable}


def test_too_many_wrong_keys_are_refused_for_that_address_and_namespace_alone(
    store: SqliteStore, checks: Counted
) -> None:
    """E5."""
    _namespace(store, "bar", "k", "right")
    authority = Authority(store)
    authority.login("shop", "one", "10.0.0.1")
    seen = set()
    for _ in range(200):
        with pytest.raises(ComputeError) as caught:
            authority.login("shop", "wrong", "10.0.0.1")
        seen.add(type(caught.value))
    assert seen == {Unauthenticated, Unavailable}
    with pytest.raises(Unavailable, match="too many wrong keys"):
        for _ in range(40):
            authority.login("shop", "guess", "10.0.0.1")
    assert authority.login("shop", "one", "10.0.0.1"), "who was let in before is known"
    assert authority.login("shop", "two", "10.0.0.2")
    assert authority.login("bar", "right", "10.0.0.1")


def test_a_right_key_is_let_in_even_where_its_cheap_hash_cannot_be_written(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_in_0_1(store)
    authority = Authority(store)

    def full(*_: object, **__: object) -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(store, "commit", full)
    assert authority.login("shop", "two")["access_token"]
