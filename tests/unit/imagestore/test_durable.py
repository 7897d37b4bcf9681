"""Small files that several processes write."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from imagestore import durable

WRITER = (
    "import sys; from pathlib import Path; from imagestore import durable\n"
    "for _ in range(200): durable.write(Path(sys.argv[1]), sys.argv[2].encode() * 50_000)"
)


def test_of_several_that_write_a_file_at_once_none_fails_and_none_publishes_half_of_anothers(
    tmp_path: Path,
) -> None:
    """F8"""
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 50_000 and len(set(data)) == 1
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        durable.write(tmp_path / "file", b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_who_is_killed_before_all_is_written_leaves_nothing(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_WRONLY | os.O_TMPFILE))
    except OSError:
        pytest.skip("no files without a name here")
    killed = (
        "import os, sys; from pathlib import Path; from imagestore import durable\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "durable.write(Path(sys.argv[1]), b'x' * 50_000)"
    )
    done = subprocess.run([sys.executable, "-c", killed, tmp_path / "file"], check=False)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["open", "link"])
def test_where_files_without_a_name_are_missing_it_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = getattr(os, missing)

    def refuse(place: Path, *more: int, **options: int) -> int:
        if missing == "link" or more[0] & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError
        result: int = real(place, *more, **options)
        return result

    monkeypatch.setattr(os, missing, refuse)
    for data in (b"x", b"yy"):
        durable.write(tmp_path / "file", data, 0o640)
        assert (tmp_path / "file").read_bytes() == data
    assert [(entry.name, entry.stat().st_mode & 0o777) for entry in tmp_path.iterdir()] == [("file", 0o640)]


def test_what_a_killed_process_left_in_scratch_goes_and_what_another_uses_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    works = """
import time
from imagestore import durable
with durable.scratch("test") as place:
    (place / "disk").write_bytes(bytes(100))
    print(place, flush=True)
    time.sleep(600)
"""
    with ExitStack() as stack:
        placed = list[Path]()
        for _ in range(2):
            one = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", works], stdout=subprocess.PIPE, text=True)
            )
            stack.callback(one.kill)
            assert one.stdout is not None
            placed.append(Path(one.stdout.readline().strip()))
            os.utime(placed[-1], (0, 0))  # as if it had begun long ago
        one.kill()
        one.wait()
        (tmp_path / "sf-test-others").mkdir()  # has begun just now
        with durable.scratch("test") as place:
            assert place.is_dir() and [path.exists() for path in placed] == [True, False]
            assert (placed[0] / "disk").stat().st_size == 100 and (tmp_path / "sf-test-others").exists()
        assert not place.exists()


def test_a_reserve_is_no_link_and_who_may_not_cut_another_users_deletes_it(tmp_path: Path) -> None:
    """A store's directory may be another user's, who is no friend; or several users' who push in turn."""
    other, path = tmp_path / "other", tmp_path / ".reserve"
    other.write_bytes(b"precious")
    path.symlink_to(other)
    reserve = durable.Reserve(path)
    reserve.keep()
    assert reserve.spend() and not reserve.spend()  # the link itself is all that goes
    assert other.read_bytes() == b"precious" and not path.is_symlink()
    reserve.next_s = 0
    reserve.keep()
    assert path.stat().st_size == 4 << 20
    if os.geteuid():
        pytest.skip("needs root")
    tmp_path.chmod(0o777)
    for above in list(tmp_path.parents)[:2]:
        above.chmod(0o711)
    os.seteuid(65534)
    try:
        assert durable.Reserve(path).spend() and not durable.Reserve(path).spend()
    finally:
        os.seteuid(0)
    assert not path.exists()
