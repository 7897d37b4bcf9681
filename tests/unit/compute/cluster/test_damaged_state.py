"""A state database that is none any more is refused with its path, and never taken for a new installation."""

import sqlite3
from pathlib import Path

import pytest

from compute.cluster.state.sqlite import SqliteStore
from compute.errors import ComputeError, Conflict, Unavailable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = SqliteStore(tmp_path / "sf.db")
    for number in range(200):
        store.commit({f"key/{number:03}": b"x" * 500}, expect={})
    store.close()
    with sqlite3.connect(tmp_path / "sf.db") as link:
        link.execute("pragma wal_checkpoint(truncate)")
    link.close()
    return tmp_path / "sf.db"


def test_an_empty_file_is_no_new_installation(path: Path) -> None:
    """A6: a database of 0 bytes was taken for a new installation, and every guest was destroyed."""
    path.write_bytes(b"")
    with pytest.raises(ComputeError, match=r"sf\.db is damaged: it is empty") as caught:
        SqliteStore(path)
    assert "put a copy of it in its place" in caught.value.hint
    assert path.read_bytes() == b""


@pytest.mark.parametrize("offset", [0, 60, 4096, 3 * 4096])
def test_damaged_pages_are_said_with_the_files_path_and_what_to_do(path: Path, offset: int) -> None:
    """A6: it ended with SQLite's words alone."""
    whole = bytearray(path.read_bytes())
    whole[offset : offset + 4096] = b"\xa5" * len(whole[offset : offset + 4096])
    path.write_bytes(whole)
    with pytest.raises(ComputeError, match=r"sf\.db is damaged") as caught:
        SqliteStore(path)
    assert caught.value.hint


def test_a_file_of_another_program_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    with pytest.raises(ComputeError, match="damaged"):
        SqliteStore(path)
    sqlite3.connect(path.with_name("other.db")).execute("create table t(x)").connection.close()
    with pytest.raises(ComputeError, match="damaged"):
        SqliteStore(path.with_name("other.db"))


def test_the_format_that_is_written_down_is_compared(path: Path) -> None:
    """A6: `meta.format` was written and never read."""
    with sqlite3.connect(path) as link:
        link.execute("update meta set format = 2")
    link.close()
    with pytest.raises(Conflict, match="has format 2"):
        SqliteStore(path)


def test_whoever_is_killed_while_making_it_leaves_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = path.with_name("new.db")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(Unavailable):
        SqliteStore(other)
    assert not other.exists()
    monkeypatch.undo()
    SqliteStore(other).close()
    assert other.stat().st_mode & 0o777 == 0o600
