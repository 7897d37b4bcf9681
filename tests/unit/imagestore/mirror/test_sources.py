"""Source lists are checked when they are read, and what upstreams publish is understood in each of its forms."""

from pathlib import Path

import pytest

from imagestore.errors import Corrupt, Invalid, NotFound
from imagestore.mirror import sources

GOOD = {"name": "debian", "tags": ["12"], "url": "https://example.org/debian-{arch}.qcow2"}
A, B = "a" * 64, "b" * 128


def test_every_list_that_comes_with_the_project_loads() -> None:
    loaded = sources.load(sources.SHIPPED)
    names = {source.name for source in loaded}
    assert {"debian", "ubuntu", "rocky", "fedora", "centos-stream", "cirros", "alpine"} <= names
    assert {"almalinux", "arch", "flatcar", "freebsd", "opensuse"} <= names
    for source in loaded:
        assert source.checksums, f"{source.title} is not checked against anything"
        location = sources.locate(source, next(iter(source.architectures)), "20260101-1")
        assert "{" not in location.url + location.checksums


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nmae": "x"}, "unknown keys: nmae"),
        ({"name": "De bian"}, "not a valid name"),
        ({"tags": []}, "tags"),
        ({"url": "file:///etc/passwd"}, "not a web address"),
        ({"build": {"page": "https://example.org/", "pattern": "(a)(b)"}}, "one group"),
        ({"build": {"page": "https://example.org/", "pattern": "("}}, "regular expression"),
        ({"build": {"page": "https://example.org/", "pattern": "(a)"}}, "go together"),
        ({"signature": "inline"}, "go together"),
        ({"keep": 0}, "keep"),
        ({"labels": 3}, "labels"),
        ({"architectures": {"X!": "amd64"}}, "architecture"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(change: dict[str, object], words: str) -> None:
    with pytest.raises(Invalid, match=words):
        sources.parse({**GOOD, **change})


def test_two_sources_for_one_name_are_refused(tmp_path: Path) -> None:
    entry = '[[source]]\nname = "a"\nurl = "https://example.org/a"\n'
    (tmp_path / "a.toml").write_text(entry + entry)
    with pytest.raises(Invalid, match="two sources"):
        sources.load(tmp_path)
    with pytest.raises(NotFound):
        sources.load(tmp_path / "nothing")


def test_checksums_are_found_in_every_form_and_the_strongest_wins() -> None:
    gnu = f"{A}  debian.qcow2\n{'c' * 64} *other.qcow2\n{B} *./debian.qcow2\n"
    assert sources.find_checksum(gnu, "debian.qcow2") == ("sha512", B)
    bsd = f"# debian.qcow2: 4 bytes\nSHA256 (debian.qcow2) = {A}\n"
    assert sources.find_checksum(bsd, "debian.qcow2") == ("sha256", A)
    assert sources.find_checksum(f"{B}\n", "debian.qcow2") == ("sha512", B)
    with pytest.raises(NotFound):
        sources.find_checksum(gnu, "debian")


def test_a_digest_of_another_hash_is_not_taken_for_sha_because_it_is_as_long() -> None:
    """H4."""
    other, b3 = "d" * 128, "c" * 128
    gentoo = f"# BLAKE2B HASH\n{other}  disk.qcow2\n# SHA512 HASH\n{B}  disk.qcow2\n"
    assert sources.find_checksum(gentoo, "disk.qcow2") == ("sha512", B)
    assert sources.find_checksum(f"# BLAKE2B HASH\n{other}  disk.qcow2\n", "disk.qcow2") == ("blake2b", other)
    tagged = f"BLAKE2b (disk.qcow2) = {other}\nSHA3-512 (disk.qcow2) = {b3}\nSHA512 (disk.qcow2) = {B}\n"
    assert sources.find_checksum(tagged, "disk.qcow2") == ("sha512", B)
    assert sources.find_checksum(f"{other}  disk.qcow2\n", "disk.qcow2", "B2SUMS") == ("blake2b", other)
    assert sources.find_checksum(f"{B}  disk-b2.img\n", "disk-b2.img", "disk-b2.img.SHA512") == ("sha512", B)
    for unknown in ("# WHIRLPOOL HASH", "SHA3-512:", "whirlpool"):
        with pytest.raises(NotFound):
            sources.find_checksum(f"{unknown}\n{other}  disk.qcow2\n", "disk.qcow2")
    with pytest.raises(Corrupt):
        sources.find_checksum(f"{other}  disk.qcow2\n{B}  disk.qcow2\n", "disk.qcow2")


def test_the_newest_build_is_found_by_number() -> None:
    page = '<a href="20250901-9/">x</a> <a href="20251010-2259/">y</a> <a href="20251010-300/">z</a>'
    assert sources.newest(page, r'"(\d{8}-\d+)/"', "amd64") == "20251010-2259"
    with pytest.raises(NotFound):
        sources.newest("nothing", r"(\d+)", "amd64")


def test_old_versions_beyond_the_number_to_keep_lose_their_tag() -> None:
    tags = ["12", "12-20250101-1", "12-20250301-2", "12-20250201-9", "12-extra", "13-20240101-1"]
    assert sources.tags_to_drop(tags, "12", 1) == ["12-20250101-1", "12-20250201-9"]
    assert sources.tags_to_drop(tags, "12", 3) == []
    assert sources.old_tag("12", "20251010-2259") == "12-20251010-2259"
