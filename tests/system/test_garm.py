"""contrib/garm, called as GARM calls an external provider, on a real server (its node is played)."""

import base64
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api_server import Running, running
from tests.system.test_first_hour import ROOT

PROVIDER = ROOT / "contrib/garm/garm-provider-sf"
CONTROLLER, POOL = "f9286791-1589-4f39-a106-5b68c2a18af4", "9dcf590a-1192-4a9c-b3e4-e0902974c2c0"
SUM = "147c14700c6cb997421b9a239c012197f11ea9854cd901ee88ead6fe73a72c74"

pytestmark = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="needs the system's Python 3.11"
)


def bootstrap(name: str, **more: Any) -> dict[str, Any]:
    """GARM's BootstrapInstance, as its documentation shows it."""
    url = (
        "https://github.com/actions/runner/releases/download/v2.299.1/actions-runner-linux-x64-2.299.1.tar.gz"
    )
    tool = {"os": "linux", "architecture": "x64", "download_url": url, "sha256_checksum": SUM}
    known = {
        "name": name,
        "tools": [{**tool, "os": "osx", "download_url": "https://github.com/osx"}, tool],
        "repo_url": "https://github.com/example/scripts",
        "callback-url": "https://garm.example.com/api/v1/callbacks",
        "metadata-url": "https://garm.example.com/api/v1/metadata",
        "instance-token": "super secret JWT token",
        "extra_specs": {},
        "ca-cert-bundle": None,
        "github-runner-group": "",
        "os_type": "linux",
        "arch": "amd64",
        "flavor": "small",
        "image": "debian:12",
        "labels": ["ubuntu", f"runner-controller-id:{CONTROLLER}"],
        "pool_id": POOL,
    }
    return known | more


class Garm:
    """Calls the provider with nothing in its environment but what GARM sets, and checks what it prints as GARM does."""

    def __init__(self, config: Path, controller: str = CONTROLLER) -> None:
        self.config, self.controller = config, controller

    def call(self, command: str, given: Any = None, code: int = 0, **more: str) -> Any:
        environment = {
            "GARM_COMMAND": command,
            "GARM_CONTROLLER_ID": self.controller,
            "GARM_INTERFACE_VERSION": "v0.1.0",
        }
        environment |= {"GARM_PROVIDER_CONFIG_FILE": str(self.config), **more}
        text = json.dumps(given) if given is not None else None
        options: dict[str, Any] = {"env": environment, "input": text, "capture_output": True, "text": True}
        done = subprocess.run([PROVIDER], timeout=120, **options)
        assert done.returncode == code, (command, done)
        if code:
            assert done.stderr
            return done.stderr
        return json.loads(done.stdout) if done.stdout else None

    def create(self, name: str, pool: str = POOL, **more: Any) -> Any:
        return self.checked(self.call("CreateInstance", bootstrap(name, **more), GARM_POOL_ID=pool))

    def listed(self, pool: str = POOL) -> list[str]:
        return sorted(self.checked(one)["name"] for one in self.call("ListInstances", GARM_POOL_ID=pool))

    @staticmethod
    def checked(found: Any) -> Any:
        """validateResult of GARM's external.go."""
        assert found["provider_id"] and found["name"]
        assert found["status"] in ("running", "stopped", "error", "unknown")
        base64.b64decode(found["provider_fault"], validate=True)
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "state") as found:
        found.network("runners", "10.50.0.0/24")
        yield found


@pytest.fixture
def config(server: Running, tmp_path: Path) -> Path:
    settings = tmp_path / "sf.toml"
    settings.write_text(f"""
sf = "{ROOT}/.venv/bin/sf"
networks = ["runners"]
[flavors.small]
cpus = 2
memory = "2G"
disk = "4G"
[environment]
HOME = "{tmp_path}"
SF_STATE_DIR = "{tmp_path}/state"
SF_API_URL = "{server.url}"
SF_TEST_SESSION = "{os.environ["SF_TEST_SESSION"]}"
""")
    return settings


def test_garm_makes_sees_stops_starts_and_deletes_its_runners_and_no_others(
    server: Running, config: Path
) -> None:
    garm = Garm(config)
    made = garm.create("garm-one")
    assert (made["os_name"], made["os_version"], made["os_type"]) == ("debian", "12", "linux")
    guest = server.get(f"/instances/{made['provider_id']}")
    assert (guest["cpus"], guest["memory"], guest["disks"][0]["size"]) == (2, 2048, 4)
    assert base64.b64decode(guest["user_data"]).startswith(b"#!/bin/bash\ncallback=https://garm.example.com/")
    assert garm.create("garm-one")["provider_id"] == made["provider_id"], "asked again, it is the same"
    server.wait_for("/instances/garm-one", "created")
    seen = garm.checked(garm.call("GetInstance", GARM_INSTANCE_ID="garm-one"))
    assert seen["status"] == "running" and seen["pool_id"] == POOL
    assert seen["addresses"] == [{"address": guest["interfaces"][0]["ipv4"], "type": "private"}]
    server.instance("web", metadata={"garm-pool": POOL})
    assert Garm(config, "another").listed() == [] and garm.listed() == ["garm-one"]
    named = {"GARM_INSTANCE_ID": made["provider_id"]}
    garm.call("Stop", **named)
    assert garm.call("GetInstance", **named)["status"] == "stopped"
    garm.call("Start", **named)
    assert server.wait_for("/instances/garm-one", "created")["power"] == "on"
    garm.create("garm-two", "other")
    garm.call("DeleteInstance", **named)
    assert server.get("/instances/garm-two")["name"] == "garm-two"
    garm.call("DeleteInstance", **named)
    assert "no runner" in garm.call("GetInstance", code=30, **named)
    garm.call("DeleteInstance", GARM_INSTANCE_ID="web")
    garm.call("RemoveAllInstances")
    assert [one["name"] for one in server.get("/instances")] == ["web"]


def test_what_cannot_be_made_is_said_and_leaves_nothing(server: Running, config: Path) -> None:
    garm = Garm(config)
    for more, said in (
        ({"flavor": "huge"}, "no flavor 'huge'"),
        ({"arch": "riscv64"}, "no runner for linux on riscv64"),
        ({"image": "debian:99"}, "did you mean debian:12?"),
    ):
        assert said in garm.call("CreateInstance", bootstrap("garm-x", **more), code=1, GARM_POOL_ID=POOL)
    assert server.get("/instances") == []


@contextmanager
def github_and_garm(runner: bytes) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """URL of a server that has the runner, and takes and answers what a guest asks GARM; and what it was told."""
    told: list[tuple[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(runner if self.path == "/runner.tar.gz" else f"<{self.path}>".encode())

        def do_POST(self) -> None:
            told.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.answer(b"")

        def answer(self, body: bytes) -> None:
            allowed = self.path == "/runner.tar.gz" or self.headers["Authorization"] == "Bearer it's secret"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", told
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("jit", [False, True])
def test_the_guest_installs_the_runner_tells_garm_and_runs_one_job(
    server: Running, config: Path, tmp_path: Path, jit: bool
) -> None:
    """The script that cloud-init would run, on a runner that writes down how it is called."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in (
            ("config.sh", 'printf "%s\\n" "$@" > asked; echo \'{"agentId": 42}\' > .runner'),
            ("run.sh", "echo ran > done"),
        ):
            entry, data = tarfile.TarInfo(name), f"#!/bin/bash\n{text}\n".encode()
            entry.mode, entry.size = 0o755, len(data)
            archive.addfile(entry, io.BytesIO(data))
    runner = packed.getvalue()
    home = tmp_path / "runner home"
    with github_and_garm(runner) as (url, told):
        digest = hashlib.sha256(runner).hexdigest()
        tool = {
            "os": "linux",
            "architecture": "x64",
            "download_url": f"{url}/runner.tar.gz",
            "sha256_checksum": digest,
        }
        odd = "a label; touch $(echo pwned) `id`"
        more = {
            "callback-url": f"{url}/callbacks",
            "metadata-url": f"{url}/metadata",
            "instance-token": "it's secret",
        }
        asked = {
            "labels": [odd],
            "tools": [tool],
            "jit_config_enabled": jit,
            "github-runner-group": "my group",
            **more,
        }
        made = Garm(config).create("garm-one", **asked)
        script = base64.b64decode(server.get(f"/instances/{made['provider_id']}")["user_data"])
        environment = {"PATH": os.environ["PATH"], "RUNNER_HOME": str(home), "RUNNER_END": "true"}
        ran = subprocess.run(
            ["bash", "-s"], input=script, env=environment, cwd=tmp_path, capture_output=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        assert [one["status"] for _, one in told] == ["installing", "installing", "idle"]
        assert {path for path, _ in told} == {"/callbacks/status"}
        assert (home / "done").read_text() == "ran\n" and not (home / "pwned").exists()
        if jit:
            assert (home / ".credentials").read_text() == "</metadata/credentials/credentials>"
            assert not (home / "asked").exists()
        else:
            said = (home / "asked").read_text().splitlines()
            assert (
                said[said.index("--labels") + 1] == odd
                and said[said.index("--runnergroup") + 1] == "my group"
            )
            assert said[said.index("--token") + 1] == "</metadata/runner-registration-token/>"
            assert told[-1][1]["agent_id"] == 42
        told.clear()
        broken = subprocess.run(
            ["bash", "-s"],
            input=script.replace(digest.encode(), SUM.encode()),
            env=environment,
            capture_output=True,
        )
        assert broken.returncode and told[-1][1]["status"] == "failed"
