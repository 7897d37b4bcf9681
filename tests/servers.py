"""Real servers for tests: SeaweedFS, moto_server and `rclone serve s3`, each as a context manager, on loopback."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import boto3
import botocore.exceptions
from botocore.config import Config

KEY, SECRET = "AKSFTEST", "sf-test-secret"


def tool(name: str) -> str | None:
    """A program of the virtual environment or the machine."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def free_ports(count: int = 1, first: int = 22000) -> int:
    """The first of `count` (at most ten) adjoining free ports; each half of `scripts/test --again` has its own."""
    while True:
        base = first + (2 * secrets.randbelow(48) + (os.environ.get("SF_TEST_HALF") == "rest")) * 10
        with contextlib.ExitStack() as held:
            try:
                for port in range(base, base + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return base


@dataclass
class Server:
    """A server that can be killed and started again on the same data."""

    command: list[str]
    endpoint: str
    environment: dict[str, str] = field(default_factory=dict)
    log: Path = Path("/dev/null")
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        self.wait()

    def wait(self) -> None:
        """Until a bucket can be made: an open port proves nothing."""
        client = self.client()
        deadline = time.monotonic() + 60
        while True:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-2000:]
            with contextlib.suppress(botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="x", Body=b"x")
                return
            assert time.monotonic() < deadline, f"{self.command[0]} does not become ready"
            time.sleep(0.1)

    def kill(self) -> None:
        """As a power cut would: no chance to write anything."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> "boto3.client":
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=config,
        )

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f"sf-{secrets.token_hex(8)}"
        self.client().create_bucket(Bucket=name)
        return name

    def url(self, prefix: str = "") -> str:
        """The URL of a store in a new bucket."""
        return f"s3://{self.bucket()}/{prefix}?endpoint_url={quote(self.endpoint, safe='')}&region=us-east-1"


def credentials() -> dict[str, str]:
    """What boto3 needs in the environment to talk to these servers."""
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def seaweedfs(directory: Path) -> Iterator[Server]:
    """SeaweedFS with all its parts in one process; its defaults would bind every interface and keep telemetry on."""
    weed = tool("weed")
    assert weed is not None
    port = free_ports(10)
    names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port"]
    names += ["volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port"]
    ports = [f"-{name}={port + at}" for at, name in enumerate(names)]
    flags = [
        *["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"],
        *["-volume.max=1000", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"],
        *["-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false"],
    ]
    data = directory / "seaweedfs"
    data.mkdir(parents=True, exist_ok=True)
    command = [weed, "-logtostderr=true", "mini", f"-dir={data}", *flags, *ports]
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": "300MiB"}
    with _running(Server(command, f"http://127.0.0.1:{port}", environment, directory / "weed.log")) as server:
        yield server


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[Server]:
    """moto_server: a second opinion on conditional writes; nothing survives a restart."""
    command = tool("moto_server")
    assert command is not None
    port = free_ports()
    with _running(
        Server(
            [command, "-H", "127.0.0.1", "-p", str(port)],
            f"http://127.0.0.1:{port}",
            {},
            directory / "moto.log",
        )
    ) as server:
        yield server


@contextlib.contextmanager
def rclone(directory: Path, password: str = "") -> Iterator[Server]:
    """`rclone serve s3`: it ignores If-None-Match and answers 200, so it has no conditional writes.

    password: what it keeps is encrypted, names and contents (a crypt remote over the directory).
    """
    command = tool("rclone")
    assert command is not None
    port = free_ports()
    data = directory / "rclone"
    data.mkdir(parents=True, exist_ok=True)
    flags = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"]
    flags += ["--vfs-cache-mode", "off", "--no-checksum"]
    told = {}
    if password:
        hidden = subprocess.run([command, "obscure", password], capture_output=True, text=True, check=True)
        told = {"TYPE": "crypt", "REMOTE": str(data), "PASSWORD": hidden.stdout.strip()}
    environment = {f"RCLONE_CONFIG_SECRET_{name}": value for name, value in told.items()}
    served = "secret:" if password else str(data)
    server = Server([command, "serve", "s3", served, *flags], f"http://127.0.0.1:{port}", environment)
    server.log = directory / "rclone.log"
    with _running(server):
        yield server
