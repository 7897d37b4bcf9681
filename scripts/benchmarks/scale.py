"""1,000 instances and 200 networks: the API's times, a node's desired state, a burst of creates, memory, the database.

The real `sf serve` (a process of its own that runs no guests) over HTTP, with SQLite and with one and three real etcd
members that sync to disk. Nodes join over TLS; what is played is the hypervisor below them, for 1,000 guests do not fit
on two cores: each polls for its desired state, decodes all of it and reports what it is told as done. At the end the
state is looked at (tests/invariants: claims, addresses and names are summed and compared).

Last, a private machine with 20 tiny guests that do nothing: what server, agent and image service use.

`records` is what of it the records cost: the CPU of this process alone, which other work on the machine hardly changes.

SF_BENCH_SCALE names what is measured (records, sqlite, etcd1, etcd3, idle; all of them unless told),
SF_BENCH_INSTANCES, SF_BENCH_NETWORKS and SF_BENCH_NODES how many there are, SF_BENCH_PROFILE=FILE writes the server's
profile.
"""

import asyncio
import http.client
import json
import os
import statistics
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from private_libvirtd import PrivateHost

from benchmarks._harness import ROOT, Bench, Failed
from compute.agent import link
from compute.cluster import desired
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Want
from compute.cluster.records.networks import Network, create_network
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.scheduler import create_instance
from compute.cluster.state.opening import open_state
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import ComputeError
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import DiskSpec, InstanceState, InstanceStatus, NodeDesired, NodeFacts
from tests import invariants
from tests.etcd import members
from tests.servers import free_ports
from tests.system.machine import Machine

INSTANCES = int(os.environ.get("SF_BENCH_INSTANCES", "1000"))
NETWORKS = int(os.environ.get("SF_BENCH_NETWORKS", "200"))
NODES = int(os.environ.get("SF_BENCH_NODES", "4"))
ENGINES = os.environ.get("SF_BENCH_SCALE", "records sqlite etcd1 etcd3 idle").split()
PROFILE = os.environ.get("SF_BENCH_PROFILE", "")
BURST = {"sqlite": 100, "etcd1": 30, "etcd3": 30}
"""Creates within one second."""
ROUNDS, CLIENTS, IDLE = 31, 32, 20


class Client:
    """Requests over connections that stay open, one for each thread."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._mine = port, threading.local()
        self._token = ""
        self._token = self("POST", "/auth", namespace="system", key=key)["access_token"]

    def __call__(self, verb: str, path: str, **body: Any) -> Any:
        if time.monotonic() - getattr(self._mine, "used_s", -9.0) > 3:  # the server ends what nobody uses
            self._mine.link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            self._mine.link.connect()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        self._mine.link.request(verb, path, json.dumps(body) if body else None, headers)
        answer = self._mine.link.getresponse()
        said = json.loads(answer.read() or b"null")
        self._mine.used_s = time.monotonic()
        if answer.status >= 400:
            raise Failed(f"{verb} {path}: {answer.status} {said}")
        return said

    def instance(self, number: int, network: str, name: str = "guest") -> Any:
        nets = [{"network_uuid": network}]
        return self(
            "POST", "/instances", name=f"{name}-{number}", cpus=1, memory=16, disk=[{"size": 1}], network=nets
        )


class Played:
    """One node's agent, but for the hypervisor: over TLS, with the node's own identity."""

    def __init__(self, identity: link.Identity, address: str) -> None:
        self.identity, self.address = identity, address
        self.seen: dict[str, InstanceStatus] = {}
        self.moments: dict[tuple[str, str, bool], float] = {}
        """(guest, its power, whether it is to go) → when the node knew that it is to be so."""
        self.waits = self.bytes = 0

    async def run(self) -> None:
        facts = NodeFacts(cpus=16, memory_mib=1 << 20, address=self.address, accel="tcg")
        async with link._client(self.identity) as client:
            await link._ask(client, "POST", "register", json={"facts": to_plain(facts)})
            await asyncio.gather(self._renew(client), self._follow(client))

    async def _renew(self, client: Any) -> None:
        while True:
            try:
                await link._ask(client, "POST", "renew")
            except ComputeError as err:
                print(f"renew: {err}", flush=True)
            await asyncio.sleep(2)

    async def _follow(self, client: Any) -> None:
        revision = 0
        while True:
            try:
                answer = await client.get("desired", params={"after": revision, "wait": 20}, timeout=60)
                answer.raise_for_status()
                told = from_plain(NodeDesired, answer.json())
            except Exception as err:  # noqa: BLE001 - the server is ended first
                print(f"desired: {err!r}", flush=True)
                await asyncio.sleep(1)
                continue
            now, revision, self.bytes = time.perf_counter(), told.revision, len(answer.content)
            said = []
            for spec in told.instances:
                self.moments.setdefault((spec.uuid, str(spec.power), spec.delete), now)
                state, power = (
                    (InstanceState.DELETED, "off")
                    if spec.delete
                    else (InstanceState.CREATED, str(spec.power))
                )
                status = InstanceStatus(spec.uuid, state, power, "", accel="tcg")
                if self.seen.get(spec.uuid) != status:
                    self.seen[spec.uuid] = status
                    said.append(status)
            for at in range(0, len(said), 25):
                body = {"statuses": to_plain(tuple(said[at : at + 25])), "events": []}
                await link._ask(client, "POST", "report", 60, json=body)


def run(bench: Bench) -> None:
    for engine in ENGINES:
        if engine in ("idle", "records"):
            {"idle": _idle, "records": _records}[engine](bench)
            continue
        with ExitStack() as stack:
            url = ""
            if engine != "sqlite":
                url = stack.enter_context(members(int(engine[-1]), safe=True)).url
            _measure(bench, engine, url, stack)


def _measure(bench: Bench, engine: str, url: str, stack: ExitStack) -> None:
    state, port = bench.dir(engine), free_ports(2, first=27000)
    agents = port + 1
    env = {
        **os.environ, "SF_STATE_DIR": str(state), "SF_LISTEN": f"127.0.0.1:{port}", "SF_CONFIG": "/dev/null",
        "SF_CACHE_DIR": str(bench.dir("hints")), "SF_STATE": url, "SF_GUESTS": "no", "SF_CPU_RATIO": "1000",
        "SF_AGENT_LISTEN": f"127.0.0.1:{agents}", "SF_NODE_NAME": "server",
    }  # fmt: skip
    argv = [bench.sf, "serve"]
    if PROFILE:
        argv = [bench.python, "-m", "cProfile", "-o", PROFILE, bench.sf, "serve"]
    with (bench.dir("log") / engine).open("wb") as log:
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=ROOT)
    try:
        client = _client(server, state, port, bench.dir("log") / engine)
        nodes = _nodes(client, bench, engine, agents)
        _api(bench, engine, client, nodes, server.pid, state)
    finally:
        server.terminate()
        server.wait(60)
    with closing(open_state(Config(state_dir=state, state=url))) as store:
        invariants.check(store)
    bench.say(f"{engine}: claims, addresses and names are summed right")


def _client(server: subprocess.Popen[bytes], state: Path, port: int, log: Path) -> Client:
    deadline = time.monotonic() + 60
    while True:
        try:
            return Client(port, (state / "auth/local-key").read_text())
        except (OSError, Failed) as err:
            if server.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"sf serve does not answer: {err}\n{log.read_text()[-2000:]}") from err
            time.sleep(0.1)


def _nodes(client: Client, bench: Bench, engine: str, agents: int) -> list[Played]:
    """Joined, and polling in a thread of their own."""
    made: list[Played] = []
    ready = threading.Event()

    async def follow() -> None:
        for number in range(NODES):
            token = client("POST", "/nodes/token")["token"]
            place = bench.dir(f"{engine}-node{number}")
            identity = await link.join(place, f"https://127.0.0.1:{agents}", token, f"node{number}")
            made.append(Played(identity, f"127.0.1.{number + 1}"))
        ready.set()
        await asyncio.gather(*(one.run() for one in made))

    threading.Thread(target=lambda: asyncio.run(follow()), daemon=True).start()
    if not ready.wait(60):
        raise Failed("the nodes did not join")
    while any(n["state"] != "created" for n in client("GET", "/nodes")):
        time.sleep(0.05)
    return made


def _settled(client: Client, count: int, limit_s: float) -> float:
    """Seconds until so many are created."""
    began = time.perf_counter()
    while sum(i["state"] == "created" for i in client("GET", "/instances")) < count:
        if time.perf_counter() - began > limit_s:
            raise Failed(f"{count} instances are not created after {limit_s:.0f} s")
        time.sleep(0.5)
    return time.perf_counter() - began


def _timed(call: Any, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds each."""
    times = []
    for n in range(rounds):
        began = time.perf_counter()
        call(n)
        times.append(1000 * (time.perf_counter() - began))
    return times


def _api(bench: Bench, engine: str, client: Client, nodes: list[Played], pid: int, state: Path) -> None:
    nets = [
        client("POST", "/networks", name=f"net{n}", netblock=f"10.{n // 250}.{n % 250}.0/24")["uuid"]
        for n in range(NETWORKS)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        made = [
            i["uuid"] for i in pool.map(lambda n: client.instance(n, nets[n % NETWORKS]), range(INSTANCES))
        ]
    took_s = time.perf_counter() - began
    _settled(client, INSTANCES, 600)
    bench.number(f"{engine}_fill", INSTANCES / took_s, "creates/s by 4 clients")
    time.sleep(3)

    bench.say(f"{engine}: {INSTANCES} instances made in {took_s:.0f} s")

    def figure(name: str, call: Any, most: float | None) -> None:
        used_s = _cpu_s(pid)
        times = _timed(call)
        bench.number(f"{engine}_{name}_cpu", 1000 * (_cpu_s(pid) - used_s) / ROUNDS, "ms of the server's CPU")
        say(name, times, most)

    def say(name: str, times: list[float], most: float | None) -> None:
        bench.say(f"{engine}: {name} {statistics.median(times):.1f} ms")
        bench.number(f"{engine}_{name}_p50", statistics.median(times), "ms", at_most=most)
        bench.number(f"{engine}_{name}_p95", statistics.quantiles(times, n=20)[-1], "ms")

    figure("list", lambda n: client("GET", "/instances"), 50)
    figure("list_networks", lambda n: client("GET", "/networks"), None)
    figure("show", lambda n: client("GET", f"/instances/{made[n * 7 % len(made)]}"), 10)
    more: list[str] = []

    def create(n: int) -> None:
        more.append(client.instance(n, nets[n % NETWORKS], "one")["uuid"])

    times = []
    for n in range(ROUNDS):
        times += _timed(lambda _, n=n: create(n), 1)  # type: ignore[misc]
        time.sleep(0.3)  # what follows a create is measured below
    say("create", times, 100)
    _settled(client, INSTANCES + ROUNDS, 120)
    waits = []
    for n in range(ROUNDS):
        uuid = made[n * 13 % len(made)]
        began = time.perf_counter()
        client("POST", f"/instances/{uuid}/poweroff")
        key = (uuid, "off", False)
        while not (found := [one.moments[key] for one in nodes if key in one.moments]):
            if time.perf_counter() - began > 30:
                raise Failed("a node was not told to switch a guest off")
            time.sleep(0.001)
        waits.append(1000 * (found[0] - began))
        time.sleep(0.3)
    say("desired", waits, 100)
    bench.number(f"{engine}_desired_size", max(one.bytes for one in nodes) / 1024, "KiB a node")
    _burst(bench, engine, client, nets)
    time.sleep(5)
    used_s, began = _cpu_s(pid), time.perf_counter()
    time.sleep(20)
    share = (_cpu_s(pid) - used_s) / (time.perf_counter() - began)
    bench.number(f"{engine}_idle", 100 * share, "% of a core, the server with played nodes")
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    bench.number(f"{engine}_server_peak", peak / 1024, "MiB", at_most=300)
    if engine == "sqlite":
        size = sum(path.stat().st_size for path in state.glob("sf.db*")) / (1 << 20)
        bench.number("sf.db", size, "MiB", at_most=62)


def _burst(bench: Bench, engine: str, client: Client, nets: list[str]) -> None:
    """So many creates in one second, evenly, whatever became of those before."""
    count, before = BURST[engine], len(client("GET", "/instances"))
    began = time.perf_counter()
    asked: list[tuple[float, Future[Any]]] = []
    ended: list[float] = []

    def one(n: int) -> None:
        client.instance(n, nets[n % len(nets)], "burst")
        ended.append(time.perf_counter())

    with ThreadPoolExecutor(CLIENTS) as pool:
        for n in range(count):
            time.sleep(max(0.0, began + n / count - time.perf_counter()))
            asked.append((time.perf_counter(), pool.submit(one, n)))
        for _, future in asked:
            future.result()
    bench.number(f"{engine}_burst_placed", max(ended) - began, f"s until {count} are placed", at_most=10)
    _settled(client, before + count, 300)
    bench.number(f"{engine}_burst_created", time.perf_counter() - began, "s until their nodes said so")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _idle(bench: Bench) -> None:
    """Real guests, libvirt and networks; nobody asks for anything."""
    tiny = bench.run([ROOT / "scripts/build-image", "tiny", "--cached"]).strip()
    with PrivateHost() as host:
        machine = Machine(host, bench.dir("home"), SF_CPU_RATIO="1000", SF_LISTEN="127.0.0.1:13000")
        machine.sf("image", "push", tiny, "tiny:1", "-q")
        machine.start()
        try:
            for n in range(4):
                machine.sf("network", "create", f"net{n}", f"10.9{n}.0.0/24")
            for n in range(IDLE):
                flags = ["--memory", "96", "--image", "tiny:1", "--network", f"net{n % 4}"]
                machine.sf("instance", "create", f"g{n}", *flags)
            deadline = time.monotonic() + 600
            while not all(machine.ready_line(f"g{n}") for n in range(IDLE)):
                if time.monotonic() > deadline:
                    raise Failed(f"{IDLE} guests are not up: {machine.said()}")
            time.sleep(30)
            ours = host.run(["pgrep", "-f", "bin/sf serve|imaged"]).stdout.split()
            before, began = {pid: _inside(host, pid) for pid in ours}, time.perf_counter()
            time.sleep(60)
            took_s = time.perf_counter() - began
            shares = {pid: 100 * (_inside(host, pid) - before[pid]) / took_s for pid in ours}
            bench.note(
                f"of {', '.join(host.run(['ps', '-o', 'pid=,args=', *ours]).stdout.splitlines())}: {shares}"
            )
            bench.number("idle_20_guests", sum(shares.values()), "% of a core", at_most=0.5)
            machine.sf("instance", "delete", *(f"g{n}" for n in range(IDLE)), "--force")
            time.sleep(10)
        finally:
            machine.signal(15)


def _inside(host: PrivateHost, pid: str) -> float:
    fields = host.run(["cat", f"/proc/{pid}/stat"]).stdout.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _records(bench: Bench) -> None:
    for engine in ("sqlite", "etcd1"):
        with ExitStack() as stack:
            url = "" if engine == "sqlite" else stack.enter_context(members(1, safe=True)).url
            config = Config(state_dir=bench.dir(f"records-{engine}"), state=url)
            _records_of(bench, engine, stack.enter_context(closing(open_state(config))))


def _records_of(bench: Bench, engine: str, store: StateStore) -> None:
    """One create, one list, one node's desired state; and creates at once."""
    usable = {f"node{n}": "" for n in range(NODES)}
    nets = []
    for n, name in enumerate(usable):
        facts = NodeFacts(cpus=16, memory_mib=1 << 20, address=f"127.0.1.{n + 1}")
        node = Node(uuid=new_uuid(), name=name, facts=to_plain(facts))
        transact(store, partial(Transaction.create, value=node))
        transact(store, partial(Transaction.create, value=Claims(name=name)))
    for n in range(NETWORKS):
        block = f"10.{n // 250}.{n % 250}.0/24"
        net = Network(uuid=new_uuid(), name=f"net{n}", namespace="system", netblock=block, vni=0)
        put = partial(create_network, network=net, excluded=(), router_nodes=[f"node{n % NODES}"])
        nets.append(transact(store, put).uuid)

    def create(n: int, **queued: bool) -> None:
        size: Any = {"cpus": 1, "memory_mib": 16, "disks": (DiskSpec("vda", "", "", 1 << 30),)}
        one = Instance(uuid=new_uuid(), name=f"g{n}", namespace="system", node="", **size)
        told: Any = {"limits": Config(cpu_ratio=1000.0), "usable": usable, "used": lambda _: None}
        put = partial(create_instance, instance=one, **told)
        transact(store, partial(put, wants=[Want(nets[n % len(nets)])]), **queued)

    def node_of(n: int) -> None:
        desired.read(Transaction(store), "node1", "0123abcd", list(usable))

    for n in range(INSTANCES):
        create(n)
    lists = partial(Transaction(store).list, Instance)
    for name, call in {"create": create, "list": lambda n: lists(), "desired": node_of}.items():
        call(10_000)
        began = time.process_time()
        for n in range(ROUNDS):
            call(10_001 + n)
        cpu_ms = 1000 * (time.process_time() - began) / ROUNDS
        bench.number(f"{engine}_records_{name}_cpu", cpu_ms, "ms of CPU")
    began, count = time.perf_counter(), BURST[engine]
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [pool.submit(create, 20_000 + n, queued=True) for n in range(count)]
    failed = sum(one.exception() is not None for one in done)
    bench.number(f"{engine}_records_burst", time.perf_counter() - began, f"s for {count} at once")
    bench.number(f"{engine}_records_burst_failed", failed, f"of {count}", at_most=0)
    invariants.check(store)
