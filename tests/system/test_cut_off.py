"""Three machines with a server, a member of etcd and a node each, in namespaces: each is killed or cut off, under load.

The nodes' guests are played; their links, leases and fences are real, and so is the client that the load asks with.
"""

import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import click
import pytest

from cli.errors import CAPACITY, CONFLICT, MISSING, TIMEOUT, UNREACHABLE, Problem
from cli.main import sf as cli
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.opening import open_state
from compute.config import Config
from tests import invariants
from tests.drills import everything, seed
from tests.system.machine import within
from tests.system.three import NAMES, STATE, Three

pytest.importorskip("etcd3gw")
pytestmark = [pytest.mark.system, pytest.mark.drill, pytest.mark.timeout(3600)]


class Load:
    """A client that knows all servers: it creates, floats, snapshots and deletes guests, and asks again what failed."""

    def __init__(self, three: Three, which: int, stop: threading.Event) -> None:
        self.three, self.which, self.stop = three, which, stop
        self.dice = random.Random(seed() + which)
        self.there, self.floated, self.gone = dict[str, str](), dict[str, str](), set[str]()
        self.asked, self.again, self.most = 0, 0, 0
        self.longest_s = 0.0

    def ask(self, *path: str, **body: Any) -> Any:
        """The answer, or the refusal that it is (None)."""
        began, self.asked = time.monotonic(), self.asked + 1
        for attempt in range(10):
            try:
                return self.api(*path, **body)
            except Problem as problem:
                if problem.code not in (UNREACHABLE, TIMEOUT):
                    assert problem.code in (CAPACITY, CONFLICT, MISSING), problem
                    return None
                self.again, self.most = self.again + 1, max(self.most, attempt + 1)
                print(f"{time.monotonic() - began:5.1f} s {path[:2]}: {problem}")
            finally:
                self.longest_s = max(self.longest_s, time.monotonic() - began)
        raise AssertionError(f"no server answers {path}")

    def run(self) -> None:
        with self.three.outside(), click.Context(cli, obj={}):
            self.api = self.three.api()
            for step in range(100_000):
                if self.stop.is_set():
                    return
                self.step(f"g{self.which}-{step}")
                time.sleep(0.05)

    def step(self, name: str) -> None:
        wanted = {"name": name, "cpus": 1, "memory": 16, "disk": [{"base": "tiny:1"}]}
        self.ask("POST", "instances", **wanted, network=[{"network_uuid": "lan"}])
        found = self.ask("GET", "instances", name)  # one that was asked for twice was made once
        if found is not None:
            self.there[name] = found["uuid"]
            if self.dice.random() < 0.3:
                self.ask("POST", "interfaces", found["interfaces"][0]["uuid"], "float")
            if self.dice.random() < 0.2:
                self.ask("POST", "instances", found["uuid"], "snapshot")
        if len(self.there) - len(self.gone) > 6 or self.dice.random() < 0.5:
            for victim in self.dice.sample(sorted(self.there.keys() - self.gone), 1):
                self.ask("DELETE", "instances", self.there[victim])
                self.gone.add(victim)


def timed(limit_s: float, true: Callable[[], object], what: str) -> float:
    began = time.monotonic()

    def holds() -> object:
        with suppress(Problem, KeyError, TypeError):
            return true()
        return False

    within(limit_s, holds, what)
    return time.monotonic() - began


def one_fault(three: Three, what: str, name: str, number: int, times: dict[str, list[float]]) -> None:
    api = three.api(name if what in ("server", "link") else "")
    mine = [n["uuid"] for n in api("GET", "networks") if n["router_node"] == name]
    three.kill(what, name)
    body = {"name": f"probe-{number}-{what}", "netblock": f"10.{100 + number}.0.0/24"}
    times[f"a network is made after: {what}"].append(timed(90, lambda: api("POST", "networks", **body), what))
    if what in ("link", "agent") and mine:

        def moved() -> bool:
            return all(set(three.routes(one)) - {name} for one in mine)

        times[f"its routers are elsewhere after: {what}"].append(timed(90, moved, f"routers after {what}"))
        if what == "link":  # who was cut off fenced itself before anybody else began
            assert not (three.nodes[name].home / "node/routes").read_text(), "two routers"
    three.mend(what, name)
    times[f"all nodes live after its end: {what}"].append(timed(120, three.all_live, "all live"))
    timed(90, lambda: three.api()("DELETE", "networks", body["name"]) or True, "the probe goes")


@pytest.mark.skipif(not everything(), reason="scripts/test --all")
def test_server_member_agent_and_link_of_each_are_killed_and_every_answer_was_true(tmp_path: Path) -> None:
    rng, times, stop = random.Random(seed()), defaultdict[str, list[float]](list), threading.Event()
    with ExitStack() as stack:
        three = Three(stack, tmp_path)
        stack.enter_context(three.outside())
        stack.enter_context(click.Context(cli, obj={}))
        api = three.api()
        api("POST", "networks", name="lan", netblock="10.42.0.0/20")
        for n in range(5):
            api("POST", "networks", name=f"net{n}", netblock=f"10.{50 + n}.0.0/24")
        loads = [Load(three, which, stop) for which in range(2)]
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(load.run) for load in loads]
            try:
                for number in range(int(os.environ.get("SF_TEST_ROUNDS", "10"))):
                    for what in rng.sample(("server", "member", "agent", "link"), 4):
                        name = rng.choice(NAMES)
                        print(f"round {number}: {what} of {name}", flush=True)
                        one_fault(three, what, name, number, times)
                        assert not [one.exception() for one in running if one.done()]
            finally:
                stop.set()
            for one in running:
                one.result(120)
        api = three.api()
        there = {i["name"]: i["state"] for i in api("GET", "instances")}
        for load in loads:
            lost = {name for name in load.there.keys() - load.gone if name not in there}
            assert not lost, f"answered, and not there: {lost}"
            assert not {name for name in load.gone if there.get(name) == "created"}
            print(
                f"client {load.which}: {load.asked} requests, {len(load.there)} guests, {len(load.gone)} deleted,"
                f" {load.again} asked again, at most {load.most} times, {load.longest_s:.1f} s at most"
            )
        api("DELETE", "instances", confirm=True)
        timed(120, lambda: not api("GET", "instances"), "all are deleted")
        with closing(open_state(Config(state=STATE))) as store:
            invariants.check(store)
            assert not store.list("interface/")
            named = [i.name for i in Transaction(store).list(Instance)]
            assert len(named) == len(set(named)), "one create, one guest"
        for what, found in sorted(times.items()):
            print(f"{what}: {' '.join(f'{one:.1f}' for one in sorted(found))}")
        assert max(load.most for load in loads) <= 1
