"""What comes out of a guest."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from cli.cloud.inside import _place, _taken


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
