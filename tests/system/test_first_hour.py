"""What a new user meets in the first hour, by the commands themselves."""

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli.cloud.api import Api
from cli.cloud.console import last_line
from cli.cloud.instance import COLUMNS as GUESTS
from cli.errors import Problem, exit_code
from cli.image.image import COLUMNS as IMAGES
from cli.main import sf
from cli.operate.caches import ROWS as CACHED
from cli.output import ago, show_list
from tests.api_server import Running, running

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A real server on the state directory that the commands know."""
    with running(tmp_path / "state") as found:
        monkeypatch.setenv("SF_API_URL", found.url)
        yield found


def disk(path: Path, seed: int) -> Path:
    boot = bytes(510) + b"\x55\xaa"
    path.write_bytes(boot + np.random.default_rng(seed).bytes(1 << 20)[512:])
    return path


def test_a_name_of_another_store_is_not_tagged_with_the_local_image_of_that_name(home: Path) -> None:
    """I1, I2"""
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


def test_an_image_of_a_remote_is_brought_here_by_its_name_alone_and_listed_where_it_is(home: Path) -> None:
    """I17, I18"""
    ok("image", "push", disk(home / "a", 1), "debian:12", "--store", home / "lab")
    ok("remote", "add", "lab", home / "lab")
    assert ok("image", "ls", "--format", "name") == ""
    assert ok("image", "ls", "lab", "--format", "name") == "debian:12\n"
    assert isinstance(refused("image", "ls", "lob", code=3), Problem)
    assert "debian:12" in ok("image", "pull", "lab/debian:12")
    assert ok("image", "ls", "--format", "name") == "debian:12\n"
    assert "0 B" in ok("image", "pull", "debian:12")
    there = json.loads(ok("image", "show", "lab/debian:12", "--format", "json"))
    assert json.loads(ok("image", "show", "debian:12", "--format", "json"))["digest"] == there["digest"]


def test_the_password_of_a_screen_is_shown_to_whoever_may_see_the_guest(server: Running) -> None:
    """I6"""
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "its-key"})
    uuid = server.instance("web").body["uuid"]
    server.wait_for(f"/instances/{uuid}", "created")
    refused("instance", "vnc", "web", code=3)
    seen = server.agent.seen[uuid]
    shown = replace(seen, vdi_port=5901, extra={"vdi_password": "s3cret"})
    asyncio.run_coroutine_threadsafe(
        server.services.controller.report(server.agent.node, [shown], []), server.loop
    ).result(30)
    told = json.loads(ok("instance", "vnc", "web", "--format", "json"))
    assert (told["address"], told["password"]) == ("127.0.0.1:5901", "s3cret")
    assert "password s3cret" in ok("instance", "show", "web")
    assert server.call("GET", f"/instances/{uuid}", namespace="shop", key="its-key").status == 404


def test_root_is_not_locked_out_by_one_word(server: Running, home: Path) -> None:
    """I7"""
    error = refused("key", "rm", "system", "local", code=5)
    assert "--force" in getattr(error, "hint", "")
    assert ok("instance", "ls", "--format", "name") == ""
    ok("key", "rm", "system", "local", "--force")
    refused("instance", "ls", code=4)


def test_another_keys_removal_asks_nobody_where_no_terminal_is(server: Running) -> None:
    """I7, its kind"""
    ok("namespace", "create", "shop")
    ok("key", "add", "shop", "laptop")
    ok("key", "rm", "shop", "laptop")
    ok("namespace", "delete", "shop")


def test_lists_say_whose_a_guest_is_when_there_are_several(server: Running) -> None:
    """I8, I9"""
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "its-key"})
    server.instance("web")
    assert "NAMESPACE" not in ok("instance", "ls")
    made = server.instance("web", namespace="shop")
    assert made.status == 200, made.body
    assert {"system", "shop"} <= set(ok("instance", "ls").split())
    assert json.loads(ok("instance", "show", "web", "--format", "json"))["namespace"] == "system"
    assert json.loads(ok("instance", "show", "shop/web", "--format", "json"))["namespace"] == "shop"


def test_a_guest_is_shown_whole(server: Running) -> None:
    """I23"""
    network = ("network", "create", "lan", "10.42.0.0/24")
    ok(*network)
    ok("instance", "create", "web", "--image", "debian:12", "--network", "lan", "--label", "team=shop")
    shown = ok("instance", "show", "web")
    link = json.loads(ok("instance", "show", "web", "--format", "json"))["interfaces"][0]
    for wanted in (link["macaddr"], "team=shop", "2.5 GiB", "created "):
        assert wanted in shown, shown
    assert str(time.localtime().tm_year) in shown


def test_create_says_when_nobody_will_reach_the_guest(server: Running, home: Path) -> None:
    """I19"""
    assert "no network" in run("instance", "create", "a", "--image", "debian:12").stderr
    ok("network", "create", "lan", "10.42.0.0/24")
    assert "no key" in run("instance", "create", "b", "--image", "debian:12", "--network", "lan").stderr
    (home / "key.pub").write_text("ssh-ed25519 AAAA me")
    more = ("--network", "lan", "--ssh-key", home / "key.pub")
    assert run("instance", "create", "c", "--image", "debian:12", *more).stderr == ""


def test_a_guest_is_made_from_a_file(server: Running, home: Path) -> None:
    """I16: the image is in the local store under the file's name; this server's resolver knows debian:12 alone."""
    error = refused("instance", "create", "web", "--image", disk(home / "My Disk.raw", 1), code=3)
    assert "no image my-disk:" in str(error)
    assert ok("image", "ls", "--format", "name").startswith("my-disk:")


def test_a_program_of_an_extra_that_is_not_installed_says_what_to_install(home: Path) -> None:
    """I10"""
    for words, missing in ((["serve"], "libvirt"), (["agent"], "httpx"), (["mirror", "serve"], "uvicorn")):
        program = f"import sys; sys.modules[{missing!r}] = None; from cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert "pip install 'sf-cloud[" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and missing in done.stderr


def test_the_others_are_done_only_where_there_are_others(home: Path) -> None:
    """I12"""
    (home / "list.toml").write_text(
        """[[source]]
        name = "debian"
        tags = ["12"]
        url = "http://127.0.0.1:1/x.qcow2"
        """
    )
    error = refused("mirror", "sync", "--sources", home / "list.toml", code=1)
    assert isinstance(error, Problem) and str(error) == "1 of 1 failed" and "others" not in error.hint


def test_a_guest_takes_one_line_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """I21"""
    links = [{"ipv4": "10.42.0.17"}]
    rows = [
        {"name": f"guest-number-{n}", "state": "created", "power_state": "on", "interfaces": links, "cpus": 2}
        | {"memory": 2048, "node": "server1", "namespace": namespace, "uuid": "0" * 36}
        for n, namespace in enumerate(("system", "shop"))
    ]
    assert len(drawn(monkeypatch, rows, GUESTS)) == 3
    cached = {"digest": "b3:" + "0" * 64, "size_bytes": 8 << 30, "used_bytes": 999 << 20, "complete": True}
    cached |= {"pinned": True, "readers": ["web-vda"], "used_s": time.time() - 50 * 60}
    assert len(drawn(monkeypatch, [cached], CACHED)) == 2
    image = {"name": "debian-of-us:12", "architecture": "aarch64", "size_bytes": 999 << 20, "present": "100%"}
    image |= {"digest": "b3:" + "0" * 64, "modified_s": time.time() - 50 * 60}
    assert len(drawn(monkeypatch, [image], IMAGES)) == 2


def drawn(monkeypatch: pytest.MonkeyPatch, rows: Any, columns: Any) -> list[str]:
    """The lines of a list on a terminal of 80 columns."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("COLUMNS", "80")
        show_list(rows, columns, "table")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    lines = [line for line in plain.splitlines() if line.strip()]
    assert all(len(line) <= 80 for line in lines), lines
    return lines


def test_times_in_lists_are_relative() -> None:
    assert [ago(time.time() - s) for s in (5, 300, 7300, 200000)] == [
        "5 s ago",
        "5 min ago",
        "2 h ago",
        "2 d ago",
    ]
    assert ago("") == ""


def test_the_bar_keeps_its_place_beside_all_there_is_to_say(tmp_path: Path) -> None:
    """I20: in a terminal of 80 columns."""
    program = tmp_path / "push.py"
    program.write_text(
        """import time, click
from cli.main import sf
from cli.output import progress
from imagestore import Progress
with click.Context(sf, obj={}), progress("debian-of-the-team:12-20261128") as tell:
    for step in range(30):
        tell(Progress("push", step << 24, 100 << 24, step << 23, step << 22, step << 21))
        time.sleep(0.1)
"""
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, str(program)]
    drawing = subprocess.Popen(command, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    seen = b""
    with contextlib.suppress(OSError):  # it has ended
        while part := os.read(parent, 65536):
            seen += part
    os.close(parent)
    assert drawing.wait(60) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    drawn = [line for line in re.split(r"[\r\n]+", plain) if " MiB new" in line]
    assert drawn
    for line in drawn:
        assert len(line) <= 80 and "━" in line and re.search(r"[\d-]:[\d-]{2} ", line), line
        assert "debian-of-the-team" in line


def test_who_waits_for_a_boot_sees_what_the_guest_says_last(server: Running) -> None:
    """I22"""
    uuid = server.instance("web").body["uuid"]
    found = server.wait_for(f"/instances/{uuid}", "created")
    server.agent.console_data = b"[ 0.1] Linux\r\n[ 9.8] \x1b[32mStarting\x1b[0m sshd...\r\n\r\n"
    with click.Context(sf, obj={}):
        assert last_line(Api(), found) == "[ 9.8] Starting sshd..."
        assert last_line(Api(), {**found, "state": "creating"}) == ""


def test_no_namespace_is_called_what_a_store_or_a_word_of_ours_is_called(server: Running) -> None:
    """I8, its kind: what stands before the slash means one thing."""
    for name in ("my", "all", "local"):
        refused("namespace", "create", name, code=5)
    ok("namespace", "create", "shop")


def test_help_has_its_short_form_everywhere() -> None:
    assert ok("instance", "create", "-h") == ok("instance", "create", "--help")


def test_what_is_not_there_yet_is_said_as_that(server: Running) -> None:
    uuid = server.instance("web").body["uuid"]
    server.wait_for(f"/instances/{uuid}", "created")
    error = refused("instance", "restore", "web", code=3)
    assert "web has no snapshot" in str(error) and "sf instance snapshot web" in getattr(error, "hint", "")
    error = refused("instance", "create", "x", "--image", "nowhere/x:1", code=3)
    assert "no remote or namespace is called nowhere" in str(error)


def test_a_guest_for_another_system_has_the_parts_and_the_boot_order_that_were_asked_for(
    server: Running,
) -> None:
    words = ("--disk", "20G,bus=sata", "--disk", "8G", "--cdrom", "debian:12,bus=scsi")
    ok("instance", "create", "pc", *words, "--secure-boot", "--tpm", "--cpu", "EPYC")
    made = server.get("/instances/pc")
    assert [(d["bus"], d["base"]) for d in made["disks"]] == [
        ("sata", None),
        ("virtio", None),
        ("scsi", "debian:12"),
    ]
    assert (made["uefi"], made["secure_boot"], made["tpm"], made["cpu_model"]) == (True, True, True, "EPYC")
    ok("instance", "create", "rescue", *words, "--boot", "cdrom")
    made = server.get("/instances/rescue")
    assert [d["bus"] for d in made["disks"]] == ["scsi", "sata", "virtio"]
    assert (made["uefi"], made["secure_boot"], made["tpm"], made["cpu_model"]) == (False, False, False, None)
    assert "not on bus 'nvme'" in str(refused("instance", "create", "a", "--disk", "8G,bus=nvme", code=2))
    assert "no processor" in str(refused("instance", "create", "a", "--disk", "8G", "--cpu", "a b", code=2))
    refused("instance", "create", "a", "--disk", "8G,cache=none", code=2)
