"""What a new user meets in the first hour, by the commands themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli.errors import Problem, exit_code
from cli.main import sf


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("SF_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object, **more: Any) -> Result:
    return CliRunner().invoke(sf, [*map(str, words)], obj={}, standalone_mode=False, **more)


def ok(*words: object) -> str:
    done = run(*words)
    assert done.exception is None, (words, done.exception)
    return done.stdout


def refused(*words: object, code: int) -> BaseException:
    error = run(*words).exception
    assert error is not None and exit_code(error) == code, (words, error)
    return error


def disk(path: Path, seed: int) -> Path:
    boot = bytes(510) + b"\x55\xaa"
    path.write_bytes(boot + np.random.default_rng(seed).bytes(1 << 20)[512:])
    return path


def test_a_name_of_another_store_is_not_tagged_with_the_local_image_of_that_name(home: Path) -> None:
    """I1"""
    ok("image", "push", disk(home / "a", 1), "debian:12")
    ok("image", "push", disk(home / "b", 2), "debian:12", "--store", home / "lab")
    ok("remote", "add", "lab", home / "lab")
    error = refused("image", "tag", "lab/debian:12", "debian:stable", code=3)
    assert isinstance(error, Problem) and "sf store copy" in error.hint
    refused("image", "tag", "nowhere/debian:12", "debian:stable", code=3)
    refused("image", "show", "debian:stable", code=3)
    ok("store", "copy", home / "lab", f"file://{home}/state/store", "debian:12")
    ok("image", "tag", "local/debian:12", "debian:stable")
    shown = [
        json.loads(ok("image", "show", n, "--format", "json")) for n in ("debian:stable", "lab/debian:12")
    ]
    assert shown[0]["digest"] == shown[1]["digest"]
