"""The console's log, cut while somebody appends to it."""

from pathlib import Path
from typing import Any

from compute.agent.guest.console import ConsoleLog


def test_a_log_is_cut_to_its_newest_part_and_never_grows_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, limit_bytes=1000)
    said = b""
    with path.open("ab", buffering=0) as qemu:
        for number in range(400):
            line = b"line %d\n" % number
            qemu.write(line)
            said += line
            log.cut()
            assert sum(f.stat().st_size for f in tmp_path.glob("console.log*")) <= 1100
    kept = log.tail(-1)
    assert said.endswith(kept) and len(kept) >= 250
    assert log.tail(10) == said[-10:]


def test_clearing_forgets_what_was_said_and_not_what_comes(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path)
    with path.open("ab", buffering=0) as qemu:
        qemu.write(b"secret")
        log.clear()
        assert log.tail(-1) == b""
        qemu.write(b"new")
    assert log.tail(-1) == b"new"


def test_a_log_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    log = ConsoleLog(tmp_path / "console.log")
    assert log.tail(10) == b"" and not log.cut()
    log.clear()


def test_a_log_that_is_deleted_while_it_is_cut_is_gone(tmp_path: Path) -> None:
    class Going(type(tmp_path)):  # type: ignore[misc]
        def open(self, *how: Any, **more: Any) -> Any:
            self.unlink()
            return super().open(*how, **more)

    (tmp_path / "console.log").write_bytes(bytes(600))
    assert not ConsoleLog(Going(tmp_path / "console.log"), limit_bytes=1000).cut()


def test_files_that_virtlogd_rolled_over_are_removed(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"now")
    (tmp_path / "console.log.0").write_bytes(b"before")
    ConsoleLog(tmp_path / "console.log").cut()
    assert not (tmp_path / "console.log.0").exists()


def test_a_guest_is_up_when_this_boot_shows_a_login_prompt(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, limit_bytes=1000)
    assert not log.up()
    with path.open("ab", buffering=0) as qemu:
        qemu.write(b"Loading Linux 6.1 ...\r\n")
        assert not log.up()
        qemu.write(b"\r\nDebian GNU/Linux 12 web ttyS0\r\n\r\nweb login: ")
        assert log.up()
        log.begin()
        qemu.write(b"\r\nThe system is going down\r\n")
        assert not log.up()
        qemu.write(b"SF-GUEST-READY 0 web -\r\n")
        assert log.up()
        qemu.write(b"x" * 1000)
        log.begin()
        assert log.cut() and not log.up()
        qemu.write(b"web login: ")
        assert log.up()
