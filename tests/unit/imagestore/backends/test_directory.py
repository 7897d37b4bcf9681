import errno
import os
import time
from pathlib import Path

import pytest

from imagestore.backends.directory import Directory
from imagestore.errors import Conflict, Denied, NoSpace, Unavailable


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, Unavailable), (errno.EROFS, Denied)],
)
def test_an_error_of_the_disk_says_its_kind_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    store = Directory(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    store.put("a/b", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind):
        store.put("a/b", b"new")
    monkeypatch.undo()
    assert store.get("a/b").data == b"old"
    assert files(tmp_path) == [".lock", "a/b"]


def test_a_refused_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    store.put("a/b", b"x")
    with pytest.raises(Conflict):
        store.put("a/b", b"y", if_none_match=True)
    assert files(tmp_path) == [".lock", "a/b"]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    dead, alive = Directory(tmp_path), Directory(tmp_path)
    path, descriptor = dead._temporary()
    living, held = alive._temporary()
    for each in (path, living):
        os.utime(each, (time.time() - 3600,) * 2)
    os.close(descriptor)
    Directory(tmp_path).put("a/b", b"x")
    assert not path.exists()
    assert living.exists()
    os.close(held)


def test_symbolic_links_and_hidden_files_are_not_listed(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    store.put("a/b", b"x")
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    (tmp_path / "a" / ".hidden").write_text("x")
    assert [stat.key for stat in store.list("")] == ["a/b"]


def test_reading_makes_no_directory(tmp_path: Path) -> None:
    store = Directory(tmp_path / "none")
    assert list(store.list("")) == []
    assert not (tmp_path / "none").exists()
