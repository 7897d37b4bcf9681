"""A disk that fills up, in a mount namespace of its own: what a server must still be able to do on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compute.agent.guest.console import ConsoleLog
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import NoSpace, Unavailable
from tests.api_server import running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


def on_a_small_disk(name: str, tmp_path: Path) -> None:
    """Run a function of this module in a process whose `tmp_path` is 12 MiB."""
    script = f"mount -t tmpfs -o size=12m small {tmp_path} && exec {sys.executable} -m {__name__} {name} {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def fill(directory: Path) -> Path:
    """Take the last byte."""
    ballast = directory / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for piece in (b"x" * 65536, b"x" * 512, b"x"):
            try:
                while True:
                    file.write(piece)
            except OSError:
                continue
    return ballast


def test_on_a_full_disk_guests_can_be_deleted_and_the_server_starts(tmp_path: Path) -> None:
    """D1"""
    on_a_small_disk("state", tmp_path)


def state(directory: Path) -> None:
    store = SqliteStore(directory / "sf.db")
    store.commit({f"instance/{n}": b"x" * 500 for n in range(100)}, expect={})
    ballast = fill(directory)
    for n in range(100):
        store.commit({f"instance/{n}": None}, expect={})
        if n % 25 == 0:
            fill(directory)  # whoever filled the disk goes on doing so
    assert store.list("instance/") == []
    try:
        for n in range(100):
            store.commit({f"large/{n}": b"x" * 500_000}, expect={})
        raise AssertionError("12 MiB hold more than expected")
    except NoSpace as err:
        assert "full" in str(err)
    kept = len(store.list("large/"))
    assert store.get("large/0") is not None
    store.close()
    fill(directory)
    again = SqliteStore(directory / "sf.db")
    assert len(again.list("large/")) == kept
    again._reserve.next_s = 0
    ballast.unlink()
    again.commit({"small": b"x"}, expect={})
    assert (directory / "sf.reserve").stat().st_blocks * 512 >= 4 << 20
    again.close()


def test_a_guest_that_floods_its_console_on_a_full_disk_gives_the_room_back(tmp_path: Path) -> None:
    """D2"""
    on_a_small_disk("console", tmp_path)


def console(directory: Path) -> None:
    path = directory / "console.log"
    with path.open("ab", buffering=0) as log:
        fill_with = b"flood\n" * 10_000
        try:
            while True:
                log.write(fill_with)
        except OSError:
            pass
        assert ConsoleLog(path, 4 << 20).cut()
        assert path.stat().st_size == 0
        log.write(b"login:")
    assert ConsoleLog(path, 4 << 20).tail(6) == b"login:"
    assert {p.name for p in directory.iterdir()} == {"console.log"}


def test_what_is_sent_to_a_server_whose_disk_is_full_is_refused_for_that_and_the_server_goes_on(
    tmp_path: Path,
) -> None:
    on_a_small_disk("sent", tmp_path)


def sent(directory: Path) -> None:
    with running(directory / "state") as server:
        uuid = server.call("POST", "/upload").body["uuid"]
        ballast = fill(directory)
        for path in (f"/upload/{uuid}", "/stores/system/packs/00"):
            verb = "POST" if path.startswith("/upload/") else "PUT"
            answer = server.call(verb, path, bytes(3 << 20))
            assert (answer.status, answer.body["error"]) == (507, "the server's disk is full"), answer
        ballast.unlink()
        server.call("POST", f"/upload/{uuid}/truncate/0")
        assert server.call("POST", f"/upload/{uuid}", b"x" * 1000).body == 1000


def test_a_damaged_page_is_an_error_of_the_store_and_never_an_absence(tmp_path: Path) -> None:
    """E4"""
    store = SqliteStore(tmp_path / "sf.db")
    store.commit({"a": b"x"}, expect={})
    store.close()
    for call in (lambda: store.get("a"), lambda: store.list("a")):
        with pytest.raises(Unavailable, match="cannot read"):
            call()


if __name__ == "__main__":
    {"state": state, "console": console, "sent": sent}[sys.argv[1]](Path(sys.argv[2]))
