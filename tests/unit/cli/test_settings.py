"""Where settings come from, and whose key goes to which server."""

import json
from pathlib import Path

import click
import pytest

from cli.command import pairs
from cli.errors import Problem, exit_code
from cli.settings import access, add_remote, forget
from imagestore import Invalid, Settings
from tests.unit.cli.test_mirror_commands import run

VARIABLES = (
    "SF_STORE",
    "SF_API_URL",
    "SF_NAMESPACE",
    "SF_KEY",
    "SF_LISTEN",
    "SF_STATE_DIR",
    "XDG_CONFIG_HOME",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*VARIABLES, *(f"SHAKENFIST_{n}" for n in ("API_URL", "NAMESPACE", "KEY"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("SF_STATE_DIR", str(tmp_path / "state"))
    return tmp_path


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Settings().user_file.write_text('store = "/from/file"\n')
    assert Settings().store_url == "/from/file"
    monkeypatch.setenv("SF_STORE", "/from/environment")
    assert Settings().store_url == "/from/environment"
    assert Settings({"store": "/from/flag"}).store_url == "/from/flag"


def test_the_default_store_is_under_the_state_directory(home: Path) -> None:
    assert Settings().store_url == f"file://{home}/state/store"
    assert Settings().store_is_default


def test_a_context_that_somebody_wrote_by_hand_is_listed(home: Path) -> None:
    Settings().user_file.write_text('[contexts.lab]\nurl = "https://lab:1"\n')
    (row,) = json.loads(run("context", "ls", "--format", "json").stdout)
    assert row == {"name": "lab", "url": "https://lab:1", "namespace": "system"}


@pytest.mark.parametrize("text", ["rack", ""])
def test_what_is_not_key_and_value_is_said_instead_of_taken_for_an_empty_value(text: str) -> None:
    assert pairs(["a=b", "c="]) == {"a": "b", "c": ""}
    with pytest.raises(click.UsageError, match="KEY=VALUE"):
        pairs(["a=b", text])


def test_a_store_without_a_backup_of_the_state_is_no_success(home: Path) -> None:
    run("store", "init", home / "backups")
    run("state", "check", home / "backups", code=3)


def test_a_broken_file_is_a_usage_error_that_names_it(home: Path) -> None:
    Settings().user_file.write_text("store = \n")
    with pytest.raises(Invalid, match=str(Settings().user_file)) as caught:
        Settings().get("store")
    assert exit_code(caught.value) == 2


def test_the_local_key_is_used_on_loopback_only(home: Path) -> None:
    path = home / "state" / "auth" / "local-key"
    path.parent.mkdir(parents=True)
    path.write_text("secret\n")
    assert access(Settings()) == ("http://127.0.0.1:13000", "system", "secret")
    assert access(Settings({"api_url": "http://[::1]:9"}))[2] == "secret"
    for url in ("http://192.0.2.1:13000", "http://127.0.0.1.example:13000", "http://localhost.example"):
        assert access(Settings({"api_url": url})) == (url, "system", "")
    assert access(Settings({"namespace": "shop"})) == ("http://127.0.0.1:13000", "shop", "")


def test_the_configuration_of_shaken_fists_clients_is_honoured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"apiurl": "http://a.example:1", "namespace": "file", "key": "k1"}
    (home / ".shakenfist").write_text(json.dumps(file))
    assert access(Settings()) == ("http://a.example:1", "file", "k1")
    monkeypatch.setenv("SHAKENFIST_API_URL", "http://b.example:2")
    monkeypatch.setenv("SHAKENFIST_NAMESPACE", "variable")
    monkeypatch.setenv("SHAKENFIST_KEY", "k2")
    assert access(Settings()) == ("http://b.example:2", "variable", "k2")
    monkeypatch.setenv("SF_API_URL", "http://c.example:3")
    monkeypatch.setenv("SF_KEY", "k3")
    monkeypatch.setenv("SF_NAMESPACE", "ours")
    assert access(Settings()) == ("http://c.example:3", "ours", "k3")


def test_a_key_that_stands_beside_one_url_is_not_sent_to_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"apiurl": "http://a.example:1", "namespace": "file", "key": "k1"}
    (home / ".shakenfist").write_text(json.dumps(file))
    assert access(Settings({"api_url": "http://b.example:2"})) == ("http://b.example:2", "file", "")
    urls = "https://c.example:3,https://d.example:4"
    Settings().user_file.write_text(f'api_url = "{urls}"\nnamespace = "shop"\nkey = "k2"\n')
    assert access(Settings()) == (urls, "shop", "k2")
    assert access(Settings({"namespace": "x"})) == (urls, "x", "k2")
    assert access(Settings({"api_url": "https://d.example:4"})) == ("https://d.example:4", "shop", "k2")
    assert access(Settings({"api_url": "https://e.example:5"})) == ("https://e.example:5", "shop", "")
    monkeypatch.setenv("SF_API_URL", "https://e.example:5")
    assert access(Settings())[2] == ""
    monkeypatch.setenv("SF_KEY", "k3")
    assert access(Settings()) == ("https://e.example:5", "shop", "k3")


def test_the_port_that_serve_listens_on_is_where_commands_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LISTEN", "127.0.0.1:27001")
    assert access(Settings())[0] == "http://127.0.0.1:27001"


def test_remotes_keep_their_order_and_the_rest_of_the_file_stays(home: Path) -> None:
    Settings().user_file.write_text('# mine\nstore = "/srv"\n')
    add_remote("official", "https://a.example/")
    add_remote("b", "s3://bucket/x?region=y")
    add_remote("c", '/with"quote')
    assert list(Settings().remotes) == ["official", "b", "c"]
    assert Settings().remotes["c"] == '/with"quote'
    forget("remote", "b")
    forget("remote", "c")
    assert list(Settings().remotes) == ["official"]
    assert Settings().user_file.read_text().startswith('# mine\nstore = "/srv"\n')
    assert Settings().user_file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Problem, match="already"):
        add_remote("official", "/x")
    with pytest.raises(Problem, match="no remote"):
        forget("remote", "b")


@pytest.mark.parametrize("name", ["", "local", "a.b", "A", "-x", "a]\n[b", "a" * 64])
def test_a_remotes_name_cannot_break_the_file(name: str) -> None:
    with pytest.raises(Problem):
        add_remote(name, "/x")
