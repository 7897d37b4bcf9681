"""Where settings come from, and whose key goes to which server."""

import json
from pathlib import Path

import pytest

from cli.errors import Problem
from cli.settings import Settings, add_remote, remove_remote, user_config

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
    user_config().write_text('store = "/from/file"\n')
    assert Settings().store_url == "/from/file"
    monkeypatch.setenv("SF_STORE", "/from/environment")
    assert Settings().store_url == "/from/environment"
    assert Settings({"store": "/from/flag"}).store_url == "/from/flag"


def test_the_default_store_is_under_the_state_directory(home: Path) -> None:
    assert Settings().store_url == f"file://{home}/state/store"
    assert Settings().store_is_default


def test_a_broken_file_is_a_usage_error_that_names_it(home: Path) -> None:
    user_config().write_text("store = \n")
    with pytest.raises(Problem, match=str(user_config())) as caught:
        Settings().get("store")
    assert caught.value.code == 2


def test_the_local_key_is_used_on_loopback_only(home: Path) -> None:
    path = home / "state" / "auth" / "local-key"
    path.parent.mkdir(parents=True)
    path.write_text("secret\n")
    assert Settings().access() == ("http://127.0.0.1:13000", "system", "secret")
    assert Settings({"api_url": "http://[::1]:9"}).access()[2] == "secret"
    for url in ("http://192.0.2.1:13000", "http://127.0.0.1.example:13000", "http://localhost.example"):
        assert Settings({"api_url": url}).access() == (url, "system", "")
    assert Settings({"namespace": "shop"}).access() == ("http://127.0.0.1:13000", "shop", "")


def test_the_configuration_of_shaken_fists_clients_is_honoured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"apiurl": "http://a.example:1", "namespace": "file", "key": "k1"}
    (home / ".shakenfist").write_text(json.dumps(file))
    assert Settings().access() == ("http://a.example:1", "file", "k1")
    monkeypatch.setenv("SHAKENFIST_API_URL", "http://b.example:2")
    monkeypatch.setenv("SHAKENFIST_NAMESPACE", "variable")
    monkeypatch.setenv("SHAKENFIST_KEY", "k2")
    assert Settings().access() == ("http://b.example:2", "variable", "k2")
    monkeypatch.setenv("SF_API_URL", "http://c.example:3")
    monkeypatch.setenv("SF_KEY", "k3")
    monkeypatch.setenv("SF_NAMESPACE", "ours")
    assert Settings().access() == ("http://c.example:3", "ours", "k3")


def test_a_key_that_stands_beside_one_url_is_not_sent_to_another(home: Path) -> None:
    file = {"apiurl": "http://a.example:1", "namespace": "file", "key": "k1"}
    (home / ".shakenfist").write_text(json.dumps(file))
    assert Settings({"api_url": "http://b.example:2"}).access() == ("http://b.example:2", "file", "")


def test_the_port_that_serve_listens_on_is_where_commands_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LISTEN", "127.0.0.1:27001")
    assert Settings().access()[0] == "http://127.0.0.1:27001"


def test_remotes_keep_their_order_and_the_rest_of_the_file_stays(home: Path) -> None:
    user_config().write_text('# mine\nstore = "/srv"\n')
    add_remote("official", {"url": "https://a.example/"})
    add_remote("b", {"url": "s3://bucket/x?region=y"})
    add_remote("c", {"url": '/with"quote'})
    assert list(Settings().remotes) == ["official", "b", "c"]
    assert Settings().remotes["c"]["url"] == '/with"quote'
    remove_remote("b")
    remove_remote("c")
    assert list(Settings().remotes) == ["official"]
    assert user_config().read_text().startswith('# mine\nstore = "/srv"\n')
    assert user_config().stat().st_mode & 0o777 == 0o600
    with pytest.raises(Problem, match="already"):
        add_remote("official", {"url": "/x"})
    with pytest.raises(Problem, match="no remote"):
        remove_remote("b")


@pytest.mark.parametrize("name", ["", "local", "a.b", "A", "-x", "a]\n[b", "a" * 64])
def test_a_remotes_name_cannot_break_the_file(name: str) -> None:
    with pytest.raises(Problem):
        add_remote(name, {"url": "/x"})
