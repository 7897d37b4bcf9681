"""Commands and a server elsewhere: certificates, keys, contexts. No guests: the node is played."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.requests import Request

from compute.api.context import address_of
from compute.cluster.certificates import authority
from compute.config import Config
from compute.errors import Denied
from imagestore import Digest
from tests.api_server import running
from tests.machines import SF


@dataclass
class Laptop:
    """Somebody without any of the server's files."""

    home: Path

    def sf(self, *words: str, key: str = "", code: int = 0) -> str:
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "NO_COLOR": "1"}
        environment["SF_STATE_DIR"] = str(self.home / "none")
        done = subprocess.run(
            [SF, *words], env=environment, input=key + "\n", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, f"sf {words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    (tmp_path / "laptop").mkdir()
    return Laptop(tmp_path / "laptop")


def _config(directory: Path) -> Config:
    return Config(state_dir=directory, node_name="node1", tls=True)


def _fingerprint(directory: Path) -> str:
    (directory / "auth").mkdir(parents=True, exist_ok=True)
    return str(Digest.of(authority(directory / "auth")[1]))


def test_a_login_pins_the_authority_and_outlives_the_servers_certificate(
    tmp_path: Path, laptop: Laptop
) -> None:
    state = tmp_path / "state"
    port_of = lambda server: server.url.rpartition(":")[2]  # noqa: E731
    with running(state, config=_config(state)) as server:
        laptop.sf("login", server.url, "--fingerprint", _fingerprint(state), "--name", "lab", key=server.key)
        assert "lab" in laptop.sf("context", "ls") and "in use" in laptop.sf("context", "ls")
        assert "system" in laptop.sf("namespace", "ls", "--format", "name")
        shown = (state / "auth/api.crt").read_bytes()
    file = laptop.home / ".config/sf/config.toml"
    assert file.stat().st_mode & 0o777 == 0o600
    with running(state, config=_config(state)) as again:
        assert (state / "auth/api.crt").read_bytes() != shown
        file.write_text(file.read_text().replace(port_of(server), port_of(again)))
        assert "system" in laptop.sf("namespace", "ls", "--format", "name")
    laptop.sf("context", "rm", "lab")
    laptop.sf("context", "use", "lab", code=3)
    assert again.key not in file.read_text()


def test_a_server_of_another_authority_learns_no_key(tmp_path: Path, laptop: Laptop) -> None:
    state, other = tmp_path / "state", tmp_path / "other"
    with running(state, config=_config(state)) as server:
        wrong = ("login", server.url, "--fingerprint", _fingerprint(other))
        assert "another authority" in laptop.sf(*wrong, key=server.key, code=4)
        assert "vouches for" in laptop.sf("login", server.url, key=server.key, code=4)
        right = _fingerprint(state)
        laptop.sf("login", server.url, "--fingerprint", right, key="wrong key", code=4)
        assert laptop.sf("context", "ls", "--format", "name") == ""
        laptop.sf("login", server.url, "--fingerprint", right, "--name", "lab", key=server.key)
    file = laptop.home / ".config/sf/config.toml"
    with running(other, config=_config(other)) as impostor:
        file.write_text(file.read_text().replace(server.url, impostor.url))
        assert "vouches for" in laptop.sf("namespace", "ls", code=4)


def test_no_key_is_sent_or_taken_over_plain_http_from_elsewhere(laptop: Laptop) -> None:
    said = laptop.sf("login", "http://192.0.2.1:13000", key="secret", code=2)
    assert "https" in said
    (laptop.home / ".shakenfist").write_text(
        json.dumps({"apiurl": "http://192.0.2.1:13000", "namespace": "shop", "key": "secret"})
    )
    assert "no key goes over plain HTTP" in laptop.sf("namespace", "ls", code=4)
    scope = {"type": "http", "scheme": "http", "method": "POST", "path": "/auth", "headers": []}
    scope |= {"server": ("10.0.0.1", 13000), "query_string": b""}
    for host in ("192.0.2.1", "2001:db8::1"):
        with pytest.raises(Denied, match="plain HTTP"):
            address_of(Request({**scope, "client": (host, 1)}))
        assert address_of(Request({**scope, "client": (host, 1), "scheme": "https"}))
    assert address_of(Request({**scope, "client": ("127.0.0.1", 1)})) == "127.0.0.1"
