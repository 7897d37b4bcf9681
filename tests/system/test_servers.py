"""Several servers on one etcd, as processes, over TLS, with played nodes: all equal, and any of them may die."""

import asyncio
import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import pytest
from websockets.sync.client import connect

from cli.cloud.api import Api
from cli.main import sf as cli
from compute.agent import link
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.opening import open_state
from compute.config import Config
from compute.errors import ComputeError
from tests import invariants
from tests.api_server import PlayedAgent, Running
from tests.drills import everything, seed
from tests.etcd import Members, members
from tests.servers import free_ports
from tests.unit.compute.test_remote import Wires

pytest.importorskip("etcd3gw")
SF = str(Path(sys.executable).with_name("sf"))


def within(limit_s: float, true: Any, what: str) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while True:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if true():
                return time.monotonic() - began
        assert time.monotonic() < began + limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.05)


class Servers:
    """s0, s1, … on the members' etcd, with one image store, where tiny:1 is."""

    def __init__(self, three: Members, directory: Path, count: int = 3) -> None:
        ports = free_ports(2 * count, first=26000)
        self.directory, self.three = directory, three
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self.environments = []
        for n in range(count):
            told = {
                "SF_STATE": three.url, "SF_STATE_DIR": str(directory / f"s{n}"), "SF_GUESTS": "no",
                "SF_STORE": (directory / "store").as_uri(), "SF_NODE_NAME": f"s{n}",
                "SF_LISTEN": f"127.0.0.1:{ports + 2 * n}", "SF_AGENT_LISTEN": f"127.0.0.1:{ports + 2 * n + 1}",
            }  # fmt: skip
            self.environments.append(os.environ | told)
        self.agents = ",".join(f"https://{told['SF_AGENT_LISTEN']}" for told in self.environments)
        disk = directory / "disk"
        disk.write_bytes(random.Random(1).randbytes(1 << 20))
        subprocess.run(
            [SF, "image", "push", "-q", "--input-format", "raw", disk, "tiny:1"],
            env=self.environments[0],
            check=True,
        )
        for n in range(count):
            self.start(n)
        self.key = (directory / "s0/auth/local-key").read_text()
        self.api = [self.running(n) for n in range(count)]

    def running(self, n: int) -> Running:
        url = f"http://{self.environments[n]['SF_LISTEN']}"
        return Running(url, (self.directory / "s0/auth/local-key").read_text(), None, None, None)  # type: ignore[arg-type]

    def start(self, n: int) -> None:
        with (self.directory / f"s{n}.log").open("ab") as log:
            command = [SF, "serve"]
            self.processes[n] = subprocess.Popen(command, env=self.environments[n], stdout=log, stderr=log)
        probe = (self.directory / f"s{n}/auth/local-key").exists
        within(60, probe, "it has its key")
        within(60, lambda: self.running(n).get("/nodes") is not None, f"s{n} answers")

    def kill(self, n: int) -> None:
        if (process := self.processes[n]) is not None:
            process.kill()
            process.wait()
        self.processes[n] = None


@contextmanager
def servers(directory: Path, count: int = 3, of_members: int = 3) -> Iterator[Servers]:
    with members(of_members) as three:
        made = None
        try:
            made = Servers(three, directory, count)
            yield made
        finally:
            for n in range(count) if made else ():
                made.kill(n)  # type: ignore[union-attr]


class Node:
    """A played node in a thread: real link, real TLS."""

    def __init__(self, made: Servers, name: str, number: int) -> None:
        token = made.api[0].call("POST", "/nodes/token").body["token"]
        self.directory = made.directory / name
        identity = asyncio.run(link.join(self.directory, made.agents.partition(",")[0], token, name))
        self.loop, self.name = asyncio.new_event_loop(), name
        ready = threading.Event()

        async def run() -> None:
            self.link = link.RemoteController(identity, self.directory, Wires())
            agent = PlayedAgent(self.link, name)  # type: ignore[arg-type]
            ready.set()

            async def acting() -> None:
                while True:
                    with suppress(ComputeError, OSError):
                        await agent.run()
                    await asyncio.sleep(0.2)

            async with asyncio.TaskGroup() as group:  # waits for the end of both, which `gather` does not
                group.create_task(self.link.run())
                group.create_task(acting())

        def thread() -> None:
            asyncio.set_event_loop(self.loop)
            self.task = self.loop.create_task(run())
            with suppress(asyncio.CancelledError):
                self.loop.run_until_complete(self.task)

        self.thread = threading.Thread(target=thread, daemon=True)
        self.thread.start()
        ready.wait(10)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)


@contextmanager
def nodes(made: Servers, *names: str) -> Iterator[list[Node]]:
    found = [Node(made, name, n) for n, name in enumerate(names)]
    try:
        api = made.api[0]
        states = lambda: {n["name"]: n["state"] for n in api.get("/nodes")}  # noqa: E731
        within(60, lambda: states() == dict.fromkeys(names, "created"), "all nodes are there")
        yield found
    finally:
        for node in found:
            node.stop()


def instance(api: Running, name: str, **more: Any) -> Any:
    body = {"name": name, "cpus": 1, "memory": 64, "disk": [{"base": "tiny:1"}], **more}
    return api.call("POST", "/instances", {**body, "network": [{"network_uuid": "lan"}]})


def console(api: Running, ref: str) -> Any:
    return api.call("GET", f"/instances/{ref}/consoledata", {"length": 100})


@pytest.mark.timeout(600)
def test_any_server_answers_sees_what_others_did_and_reaches_every_node(tmp_path: Path) -> None:
    with servers(tmp_path) as made, nodes(made, "n1", "n2"):
        one, two, three = made.api
        assert one.network()["name"] == "lan"
        for n, (maker, reader) in enumerate(((one, two), (two, three), (three, one))):
            uuid = instance(maker, f"web{n}").body["uuid"]
            assert reader.get(f"/instances/{uuid}")["name"] == f"web{n}", "a write that was answered is seen"
            reader.wait_for(f"/instances/{uuid}", "created")
        for n, api in enumerate((one, two, three)):
            asked = lambda a=api, m=n: console(a, f"web{m}").status == 200  # noqa: E731
            within(60, asked, "the node answers whoever asks: it was told of all by the one that it joined")
            token = api.login("system", made.key).body["access_token"]
            url = f"{api.url.replace('http', 'ws')}/instances/web0/streams/exec"
            with connect(url, additional_headers={"Authorization": f"Bearer {token}"}, proxy=None) as socket:
                socket.send(json.dumps({"argv": ["true"]}))
                assert json.loads(socket.recv(20))[0] == "exec"
                socket.send(b"there and back")
                assert socket.recv(20) == b"there and back"
        stranger = made.directory / "stranger"
        stranger.mkdir()
        (stranger / "installation.json").write_text('{"id": "0123abcd"}')
        (stranger / "node.json").write_text('{"machine": "m1", "epoch": "", "reached": 0}')
        told = made.environments[0] | {"SF_STATE_DIR": str(stranger), "SF_LISTEN": "127.0.0.1:0"}
        said = subprocess.run(
            [SF, "serve"], env=told | {"SF_AGENT_LISTEN": ""}, capture_output=True, text=True, timeout=60
        )
        assert said.returncode == 5 and "first server" in said.stderr


def test_a_server_with_its_records_in_a_file_starts_in_a_new_directory(tmp_path: Path) -> None:
    port, log = free_ports(1, first=26000), tmp_path / "log"
    told = os.environ | {
        "SF_STATE_DIR": str(tmp_path / "sf"),
        "SF_LISTEN": f"127.0.0.1:{port}",
        "SF_GUESTS": "no",
    }
    with log.open("wb") as file:
        process = subprocess.Popen([SF, "serve"], env=told, stdout=file, stderr=file)
    try:
        within(60, lambda: "serves" in log.read_text() or process.poll() is not None, "it starts")
        assert process.poll() is None, log.read_text()
        assert (tmp_path / "sf/installation.json").exists() and (tmp_path / "sf/sf.db").exists()
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.timeout(600)
def test_commands_go_on_with_another_server_where_the_first_is_dead(tmp_path: Path) -> None:
    with servers(tmp_path, 2, of_members=1) as made, click.Context(cli, obj={}):
        urls = ",".join(api.url for api in made.api)
        told = os.environ | {
            "HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path / "c"),
            "SF_KEY": made.key,
        }
        told |= {"SF_STATE_DIR": str(tmp_path / "none")}

        def sf(*words: str) -> str:
            done = subprocess.run([SF, *words], env=told, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stdout

        sf("login", urls, "--name", "both")
        del told["SF_KEY"]  # it is in the context, for both
        api = Api((urls, "system", made.key))
        assert api("POST", "networks", name="one", netblock="10.1.0.0/24")["name"] == "one"
        made.kill(0)
        # The connection to it is broken in the middle of a command, which goes on; the next one begins with the other.
        assert api("POST", "networks", name="two", netblock="10.2.0.0/24")["name"] == "two"
        sf("network", "create", "three", "10.3.0.0/24")
        assert {n["name"] for n in api("GET", "networks")} == {"one", "two", "three"}
        assert {line.split()[0] for line in sf("network", "ls", "--format", "name").splitlines()} >= {"three"}
        sf("image", "push", str(tmp_path / "disk"), "my/kept", "--input-format", "raw")
        assert "kept" in sf("image", "ls", "my/")


class Load:
    """Three clients that know three servers, move on with their Idempotency-Key, and create and delete guests."""

    def __init__(self, made: Servers, number: int) -> None:
        self.made, self.number = made, number
        self.stop, self.most = threading.Event(), 0
        self.done, self.gone = dict[str, str](), set[str]()

    def ask(self, verb: str, path: str, body: Any, key: str, which: int) -> Any:
        for attempt in range(60):
            api = self.made.api[(which + attempt) % 3]
            with suppress(OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
                answer = api.call(verb, path, body, headers={"Idempotency-Key": key})
                if answer.status != 503:
                    self.most = max(self.most, attempt)
                    return answer
            time.sleep(0.05)
        raise AssertionError("no server answers")

    def run(self, which: int) -> None:
        dice, mine = random.Random(seed() + 10 * self.number + which), list[str]()
        for step in range(100_000):
            if self.stop.is_set():
                return
            name = f"g{self.number}-{which}-{step}"
            body = {"name": name, "cpus": 1, "memory": 16, "disk": [{"base": "tiny:1"}]}
            body["network"] = [{"network_uuid": "lan"}]
            answer = self.ask("POST", "/instances", body, name, which)
            assert answer.status in (200, 507), answer.body
            if answer.status == 200:
                self.done[name] = answer.body["uuid"]
                mine.append(name)
            if mine and (answer.status == 507 or dice.random() < 0.8):
                victim = mine.pop(dice.randrange(len(mine)))
                gone = self.ask("DELETE", f"/instances/{self.done[victim]}", None, "d" + victim, which)
                assert gone.status in (200, 409), gone.body
                self.gone.add(victim)
            time.sleep(0.02)


def one_round(made: Servers, number: int, rng: random.Random, times: dict[str, list[float]]) -> None:
    load, probe = Load(made, number), f"probe-{number}"
    victim, member = rng.randrange(3), rng.randrange(3)
    near, far = [made.api[n] for n in range(3) if n != victim]

    def creates(name: str) -> float:
        return within(60, lambda: instance(near, name).status in (200, 409), "a guest can be created again")

    def asks() -> float:
        return within(60, lambda: console(far, probe).status == 200, "its node is asked again")

    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load.run, which) for which in range(3)]
        try:
            time.sleep(1)
            made.kill(victim)
            times["create after a server"].append(creates(probe))
            times["node after a server"].append(asks())
            made.three.kill(member)
            times["create after a member"].append(creates(f"{probe}-b"))
            times["node after a member"].append(asks())
            within(60, lambda: {n["state"] for n in far.get("/nodes")} == {"created"}, "both nodes live")
        finally:
            load.stop.set()
        for one in loads:
            one.result()
    made.three.start(member)
    made.three.ready(member)
    made.start(victim)
    there = {i["name"]: i for i in made.api[victim].get("/instances")}
    lost = {name for name in load.done if name not in load.gone and name not in there}
    assert not lost, f"answered, and not there: {lost}"
    assert not {name for name in load.gone if there.get(name, {}).get("state") == "created"}
    print(
        f"round {number}: {len(load.done)} created, {len(load.gone)} deleted, at most {load.most} servers more"
    )
    made.api[0].call("DELETE", "/instances", {"confirm": True})
    within(60, lambda: not made.api[1].get("/instances"), "all are deleted")
    with closing(open_state(Config(state=made.three.url))) as store:
        invariants.check(store)
        assert not store.list("interface/")
        named = [i.name for i in Transaction(store).list(Instance)]
        assert len(named) == len(set(named)), "one create, one guest"


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_a_server_and_a_member_are_killed_under_load_and_each_answer_was_true(tmp_path: Path) -> None:
    """Each create happens once, although clients ask the next server; nothing that was answered is lost or leaked."""
    rng, times = random.Random(seed()), defaultdict[str, list[float]](list)
    with servers(tmp_path) as made, nodes(made, "n1", "n2"):
        made.api[0].network(netblock="10.42.0.0/20")
        for number in range(10 if everything() else 1):
            one_round(made, number, rng, times)
    print("seconds until", {what: [round(one, 1) for one in found] for what, found in times.items()})


@pytest.mark.skipif(not everything(), reason="scripts/test --all")
@pytest.mark.timeout(600)
def test_a_router_moves_though_the_server_that_did_upkeep_dies_with_its_node(tmp_path: Path) -> None:
    with servers(tmp_path) as made, nodes(made, "n1", "n2") as both:
        lan = made.api[0].network()["uuid"]
        router = made.api[1].get(f"/networks/{lan}")["router_node"]
        made.kill(0)  # the first to start: it has the lease
        next(node for node in both if node.name == router).stop()
        took_s = within(
            90, lambda: made.api[2].get(f"/networks/{lan}")["router_node"] not in (router, ""), "it has moved"
        )
        print(f"a router moved after {took_s:.1f} s, with the server that did upkeep killed")


@pytest.mark.drill
@pytest.mark.skipif(not everything(), reason="a loss takes a minute: SF_TEST_ALL=1")
def test_a_fence_command_is_called_again_by_the_next_server_and_a_guest_goes_once_it_confirms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that called it is killed while it hangs; the word `well` is what it waits for."""
    command, calls = tmp_path / "fence", tmp_path / "calls"
    command.write_text(
        f"#!/bin/sh\n[ $1 = status ] && exit 2\necho $PPID $* >> {calls}\n[ -e {tmp_path}/well ] || exec sleep 600\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("SF_FENCE_COMMAND", str(command))
    with servers(tmp_path, 2, 1) as made, nodes(made, "n1", "n2") as both:
        made.api[0].network()
        web = instance(made.api[0], "web", placed_on="n1", on_node_loss="restart").body["uuid"]
        where = lambda: made.api[1].get(f"/instances/{web}")  # noqa: E731
        within(60, lambda: where()["state"] == "created", "it is there")
        both[0].stop()
        within(90, calls.exists, "the command is called")
        assert where()["node"] == "n1"
        made.kill(0)  # the first to start: it has the lease
        called = len(calls.read_text().splitlines())
        within(120, lambda: len(calls.read_text().splitlines()) > called, "the other one calls it")
        assert where()["node"] == "n1"
        (tmp_path / "well").touch()
        within(120, lambda: where()["node"] == "n2", "it is given to the other node")
        assert {line.split(maxsplit=1)[1] for line in calls.read_text().splitlines()} == {"off n1"}
