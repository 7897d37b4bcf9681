"""Small files that several processes write."""

import subprocess
import sys
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
