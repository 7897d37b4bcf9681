"""Into a guest through the API: a bulk copy beside the direct path, a command beside virsh, echo, 50 streams at once.

Two machines, the guest (the tiny one) on the second; whoever types is on the first, and reaches the API by loopback.
The direct path is ssh from inside the guest's network; virsh asks the same agent on the guest's own node.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._harness import ROOT, Bench
from tests.system.cluster import Cluster
from tests.system.machine import Machine, within

_INSIDE = """
import json, sys, time
import click
from cli.cloud.api import Api
from cli.cloud.stream import Stream
from cli.main import sf
what, rounds = sys.argv[1], int(sys.argv[2])
with click.Context(sf, obj={}):
    api = Api()
    api.token()
    took = []
    if what == "exec":
        for _ in range(rounds):
            began = time.perf_counter()
            with Stream(api, "web", "exec", argv=["true"]) as stream:
                while isinstance(said := stream.receive(), bytes):
                    pass
                assert said == {"exit": 0}, said
            took.append(time.perf_counter() - began)
    elif what == "echo":
        with Stream(api, "web", "console") as stream:
            stream.receive()
            time.sleep(2)
            for number in range(rounds):
                key = b"abcdefghij"[number % 10 : number % 10 + 1]
                began = time.perf_counter()
                stream.send(key)
                while key not in stream.receive():
                    pass
                took.append(time.perf_counter() - began)
            stream.send(b"\\x15")
    else:
        streams = [Stream(api, "web", "console") for _ in range(rounds)]
        for stream in streams:
            stream.receive()
        print("open", flush=True)
        sys.stdin.readline()
    print(json.dumps(took), flush=True)
"""


def run(bench: Bench) -> None:
    os.environ.setdefault("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))
    image = Path(bench.run([ROOT / "scripts/build-image", "tiny", "--cached"]).strip())
    with ExitStack() as stack:
        cluster = Cluster(stack, bench.dir("cluster"), image, ("n1", "n2"))
        server, node = cluster.server, cluster.nodes["n2"]
        server.sf("network", "create", "lan", "10.42.0.0/24")
        cluster.create("web", "n2", "lan")
        within(240, lambda: server.instance("web")["agent_state"] == "ready", "the agent is there")
        (domain,) = node.host.virsh("list", "--name").stdout.split()
        bench.note(
            "software emulation, a guest with one processor; machine of " + str(os.cpu_count()) + " cores"
        )
        _commands(bench, server, node, domain)
        _bulk(bench, cluster)
        _fifty(bench, server)


def _timed(machine: Machine, what: str, rounds: int) -> float:
    """The median, in ms."""
    argv = machine.argv("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", _INSIDE, what, str(rounds))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return 1000 * statistics.median(json.loads(done.stdout.splitlines()[-1]))


def _agent(node: Machine, domain: str, asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        node.host.virsh("qemu-agent-command", domain, json.dumps(asked)).stdout
    )
    return dict(found["return"])


def _commands(bench: Bench, server: Machine, node: Machine, domain: str) -> None:
    took = []
    for _ in range(30):
        began = time.perf_counter()
        asked = {"execute": "guest-exec", "arguments": {"path": "/bin/true", "capture-output": True}}
        said = node.host.virsh("qemu-agent-command", domain, json.dumps(asked)).stdout
        asked = {"execute": "guest-exec-status", "arguments": {"pid": json.loads(said)["return"]["pid"]}}
        while not json.loads(node.host.virsh("qemu-agent-command", domain, json.dumps(asked)).stdout)[
            "return"
        ]["exited"]:
            pass
        took.append(time.perf_counter() - began)
    virsh = bench.number("virsh_exec_p50", 1000 * statistics.median(took), "ms")
    ours = bench.number("sf_exec_p50", _timed(server, "exec", 30), "ms")
    bench.number("sf_exec_above_virsh", ours - virsh, "ms", at_most=50)
    bench.number("console_echo_p50", _timed(server, "echo", 60), "ms", at_most=20)


def _bulk(bench: Bench, cluster: Cluster) -> None:
    server, data = cluster.server, bench.dir("bulk") / "data"
    data.write_bytes(os.urandom(1 << 20) * 200)
    vni = server.listed("network", "show", "lan")["vxlan_id"]
    router = cluster.nodes[cluster.router()]
    (space,) = [
        s for s in router.host.run(["ip", "netns", "list"]).stdout.split() if s.endswith(f"-{vni:06x}")
    ]
    address = server.instance("web")["interfaces"][0]["ipv4"]
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    ssh = ["ssh", "-i", str(cluster.key), *(word for o in options for word in ("-o", o))]
    direct = router.argv("ip", "netns", "exec", space, *ssh, f"root@{address}", "cat > /dev/null")
    proxy = ["-o", "ProxyCommand=sf instance connect %h %p"]
    ours = server.argv(*ssh, *proxy, "root@web", "cat > /dev/null")

    def copy(argv: list[str]) -> float:
        began = time.perf_counter()
        with data.open("rb") as given:
            subprocess.run(argv, stdin=given, check=True, timeout=600)
        return 200 / (time.perf_counter() - began)

    rates: tuple[list[float], list[float]] = [], []
    for _ in range(3):
        for which, argv in enumerate((direct, ours)):
            rates[which].append(copy(argv))
            bench.say(f"{('direct', 'connect')[which]}: {rates[which][-1]:.1f} MiB/s")
    there, through = map(statistics.median, rates)
    bench.number("direct_mib_s", there, "MiB/s")
    bench.number("connect_mib_s", through, "MiB/s")
    bench.ratio("connect_of_direct", through, there, at_least=0.5)


def _fifty(bench: Bench, server: Machine) -> None:
    found = server.host.run(["pgrep", "-f", "bin/sf serve$"]).stdout.split()
    pid = found[-1]

    def figures() -> tuple[float, float]:
        status = server.host.run(["cat", f"/proc/{pid}/status", f"/proc/{pid}/stat"]).stdout
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        fields = status.splitlines()[-1].rpartition(")")[2].split()
        return rss / 1024, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    argv = server.argv("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", _INSIDE, "many", "50")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as many:
        assert many.stdin and many.stdout and many.stdout.readline() == "open\n"
        before, began = figures()[1], time.perf_counter()
        script = "i=0; while [ $i -lt 3000 ]; do echo line $i of a flood on the console > /dev/ttyS0; i=$((i+1)); done"
        server.sf("instance", "exec", "web", "--", "sh", "-c", script)
        rss, after = figures()
        seconds = time.perf_counter() - began
        many.stdin.write("\n")
        many.stdin.flush()
        many.stdout.read()
    bench.number("server_rss_with_50_streams", rss, "MiB", at_most=300)
    bench.number("server_cores_with_50_streams", (after - before) / seconds, "cores", at_most=1)
