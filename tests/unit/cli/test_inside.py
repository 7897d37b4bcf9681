"""What comes out of a guest."""

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.sync.server import serve

from cli.cloud import inside
from cli.cloud.inside import _place, _taken
from cli.cloud.stream import Stream
from cli.errors import Problem
from tests.unit.cli.test_mirror_commands import run


def _packed(*members: tuple[str, bytes, int, str]) -> io.BytesIO:
    """(name, type, mode, link)"""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, kind, mode, link in members:
            one = tarfile.TarInfo(name)
            one.type, one.mode, one.linkname, one.uid, one.uname = kind, mode, link, 12345, "nobody"
            one.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(one, io.BytesIO(b"data"))
    data.seek(0)
    return data


def test_of_what_a_guest_packs_only_files_and_directories_below_are_taken(tmp_path: Path) -> None:
    file, directory, link = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE
    beside = tmp_path / "beside"
    evil = (
        ("log", directory, 0o755, ""), ("log/kept", file, 0o4755, ""), ("log/out", link, 0o777, "/etc"),
        ("log/out/passwd", file, 0o644, ""), ("../up", file, 0o644, ""), ("/abs", file, 0o644, ""),
        ("log/../../up", file, 0o644, ""), (str(tmp_path / "abs"), file, 0o644, ""),
        (f"/{tmp_path}/twice", file, 0o644, ""), (f"//{tmp_path}/thrice", file, 0o644, ""),
        ("log/hard", tarfile.LNKTYPE, 0o644, "/etc/passwd"), ("log/null", tarfile.CHRTYPE, 0o666, ""),
        ("log/pipe", tarfile.FIFOTYPE, 0o666, ""),
    )  # fmt: skip
    with tarfile.open(fileobj=_packed(*evil)) as archive:
        archive.extractall(beside, _taken(archive))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["beside", "beside/log", "beside/log/kept", "beside/log/out", "beside/log/out/passwd"]
    kept = (beside / "log/kept").stat()
    assert kept.st_mode & 0o7777 == 0o755 and kept.st_uid == os.getuid()
    assert not (beside / "log/out").is_symlink()


@pytest.mark.parametrize("text", ["./a:b", "/a:b", "a"])
def test_a_place_is_in_a_guest_where_a_name_stands_before_a_colon(text: str) -> None:
    assert _place(text) == ("", text)
    assert _place("web:/opt") == ("web", "/opt") and _place("shop/web:") == ("shop/web", ".")


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of this machine in which the commands for a guest run, and the only one that `cp` knows."""

    def here(_: object, name: str, *argv: str, stdin: Any = None, out: Any = None) -> int:
        assert name == "web"
        return subprocess.run(argv, stdin=stdin, stdout=out, cwd=place).returncode

    place = tmp_path / "guest"
    (place / "etc").mkdir(parents=True)
    (place / "etc" / "a").write_text("a")
    (place / "b").write_text("b")
    monkeypatch.setattr(inside, "run", here)
    monkeypatch.setattr(inside, "Api", lambda: None)
    monkeypatch.chdir(tmp_path)
    return place


def test_several_sources_go_into_a_directory_and_none_over_another(guest: Path, tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).write_text(name)
    run("instance", "cp", "x", "y", f"web:{guest}/new")
    assert {path.name: path.read_text() for path in (guest / "new").iterdir()} == {"x": "x", "y": "y"}
    run("instance", "cp", f"web:{guest}/b", f"web:{guest}/etc/a", "new", code=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["{}/etc/", "{}/etc", "etc", "./etc/"])
def test_what_is_copied_out_is_called_as_in_the_guest(guest: Path, tmp_path: Path, path: str) -> None:
    run("instance", "cp", f"web:{path.format(guest)}", ".")
    assert (tmp_path / "etc" / "a").read_text() == "a"
    run("instance", "cp", f"web:{path.format(guest)}/nothing", ".", code=3)


def test_a_console_that_is_followed_is_never_typed_into(monkeypatch: pytest.MonkeyPatch) -> None:
    class Played(ExitStack):
        def __init__(self, *_: object) -> None:
            super().__init__()

        def data(self) -> Iterator[bytes]:
            yield b"booted\n"  # and a node says that this is the end

    monkeypatch.setattr(inside, "Api", lambda: None)
    monkeypatch.setattr(inside, "Stream", Played)
    assert run("instance", "console", "web", "-f").output == "booted\n"


def test_what_a_server_calls_a_guest_is_no_option_of_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setenv("SF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(inside, "Api", lambda: lambda *_: {"uuid": "-oLocalCommand=evil"})
    monkeypatch.setattr(os, "execvp", lambda _, argv: given.extend(argv))
    run("instance", "ssh", "web", "uptime")
    assert given[-3:] == ["--", "-oLocalCommand=evil", "uptime"]


@pytest.mark.parametrize("ports", ["8080:99999", "99999", "80:0", "x", "80:", "²", ""])
def test_what_is_no_port_is_refused_before_anything_is_forwarded(ports: str) -> None:
    run("instance", "forward", "web", ports, code=2)


def test_options_of_a_console_or_screen_that_would_count_for_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {"uuid": "u", "video": {"vdi": "spice"}, "vdi_port": 5900, "vdi_password": "p", "node": "n"}
    monkeypatch.setattr(inside, "Api", lambda: lambda *_: seen | {"ip": "10.0.0.1"})
    assert "10.0.0.1:5900" in run("instance", "vnc", "web").output
    run("instance", "vnc", "web", "--listen", 5901, code=2)
    run("instance", "console", "web", "-f", "--log", code=2)


@pytest.mark.parametrize("said", ["[1]", "1", "null", "what?", "[" * 100_000])
def test_what_no_server_of_ours_says_ends_a_stream_with_an_error(said: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serve(lambda socket: socket.send(said), "127.0.0.1", 0))
        stack.callback(server.shutdown)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        api: Any = SimpleNamespace(url=url, tls=None, token=lambda: "t")
        stream = stack.enter_context(Stream(api, "web", "console"))
        with pytest.raises(Problem, match="no stream of sf"):
            stream.receive()
