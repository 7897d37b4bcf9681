"""`sf mirror`, by its commands: what it says before it starts, and what it does not do when there is nothing to do."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.cloud.create import attachment
from cli.errors import Problem, exit_code
from cli.main import sf
from imagestore.mirror import sources
from tests import web

DATA = bytes(510) + b"\x55\xaa" + b"x" * (1 << 20)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("SF_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    return tmp_path


def run(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(sf, [*map(str, words)], obj={}, standalone_mode=False)
    assert (0 if done.exception is None else exit_code(done.exception)) == code, (words, done.exception)
    return done


def listed(path: Path, url: str, *names: str, checked: bool = False) -> Path:
    entry = '[[source]]\nname = "{0}"\ntags = ["1", "one"]\nurl = "{1}/{0}"\nformat = "raw"\n'
    sums = 'checksums = "{1}/SUMS"\n' if checked else ""
    path.write_text("".join((entry + sums).format(name, url) for name in names))
    return path


def test_a_pattern_that_matches_nothing_is_not_found_and_nothing_is_published(home: Path) -> None:
    """H2."""
    run("mirror", "init")
    with web.misbehaving({"/a": web.body(DATA)}) as url:
        given = listed(home / "list.toml", url, "a")
        for patterns in (["b:*"], ["a:*", "b"], ["a:2"]):
            run("mirror", "sync", "--sources", given, *patterns, code=3)
        run("mirror", "export", home / "disk", "b:*", code=3)
        run("mirror", "sync", "--from", home / "state" / "store", "b:*", code=3)
        assert json.loads(run("mirror", "status", "--format", "json").stdout)["expires_s"] is None
        run("mirror", "sync", "--sources", given, "a:one")
    assert json.loads(run("mirror", "status", "--format", "json").stdout)["names"] == 3


def test_all_sources_are_fetched_only_after_it_was_said_how_much_that_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I12."""
    sums = "".join(f"{hashlib.sha256(DATA).hexdigest()}  {name}\n" for name in "ab").encode()
    with web.misbehaving({"/a": web.body(DATA), "/b": web.body(DATA), "/SUMS": web.body(sums)}) as url:
        monkeypatch.setattr(sources, "SHIPPED", listed(home / "list.toml", url, "a", "b", checked=True))
        looked = run("mirror", "sync", "--dry-run", "--format", "name")
        assert looked.stdout.split() == ["a:1", "x86_64", "b:1", "x86_64"]
        assert "2 of 2 images are new: 2.0 MiB" in looked.stderr
        assert "2 of 2 images are new: 2.0 MiB" in run("mirror", "sync").stderr
        assert "0 of 2 images are new" in run("mirror", "sync", "--dry-run").stderr


def test_when_all_have_failed_nobody_says_that_the_others_are_done(home: Path) -> None:
    """I10."""
    with web.misbehaving({"/a": web.body(DATA)}) as url:
        for names, hint in ((("no", "none"), "reason"), (("no", "a"), "others are done")):
            given = listed(home / "list.toml", url, *names)
            done = CliRunner().invoke(
                sf, ["mirror", "sync", "--sources", str(given)], obj={}, standalone_mode=False
            )
            assert hint in getattr(done.exception, "hint", "")


def test_a_port_that_is_taken_is_a_conflict_and_an_address_of_others_bad_input() -> None:
    """I9."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run("mirror", "serve", "--port", taken.getsockname()[1], code=5)
    run("mirror", "serve", "--host", "192.0.2.1", code=2)
    run("mirror", "serve", "--port", 70000, code=2)


@pytest.mark.parametrize("option", ["--workers=0", "--requests=0", "--rate=-1"])
def test_a_mirror_that_would_answer_nobody_is_not_served(option: str) -> None:
    run("mirror", "serve", option, code=2)


def test_an_option_that_would_count_for_nothing_is_refused(home: Path) -> None:
    root = home / "1.root.json"
    root.write_text("{}")
    run("mirror", "sync", "--from", "/srv/other", "--sources", home, code=2)
    run("image", "pull", "x", "--as", "raw", code=2)
    for seed in ("x", "x=nothing", "x=."):
        run("image", "pull", "x", "-o", home / "x.raw", "--seed", seed, code=2)
    other = f"b3:{'0' * 64}"
    run("remote", "add", "x", "https://images.example/", "--root", root, "--fingerprint", other, code=2)
    for text in ("lan,float=no", "lan,address", "lan,mac=", "lan,color=red"):
        with pytest.raises(Problem, match="not an option of --network"):
            attachment(lambda *_: {"uuid": "u"}, text)  # type: ignore[arg-type]
    assert attachment(lambda *_: {"uuid": "u"}, "lan,float,rules=web") == {  # type: ignore[arg-type]
        "network_uuid": "u", "float": True, "rules": "web",
    }  # fmt: skip
