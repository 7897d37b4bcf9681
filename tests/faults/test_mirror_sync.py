"""`sf mirror sync` against stand-ins for upstreams: every layout they use, and all that can be wrong with them."""

import fcntl
import hashlib
import http.server
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.backends.web import is_public
from imagestore.durable import opened
from imagestore.errors import Conflict, Corrupt, Denied, NotFound, Unavailable
from imagestore.formats.digest import Digest
from imagestore.mirror.download import Downloader
from imagestore.mirror.sources import Source
from imagestore.mirror.sync import check_signature, read_provenance, sync
from imagestore.store.names import name_key
from imagestore.store.store import Store
from tests import web


def disk(seed: int, size: int = 3 << 20) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def qcow2(path: Path, seed: int) -> bytes:
    raw = path.with_suffix(".raw")
    raw.write_bytes(disk(seed))
    subprocess.run(["qemu-img", "convert", "-q", "-c", "-O", "qcow2", raw, path], check=True)
    raw.unlink()
    return path.read_bytes()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.init(Directory(tmp_path / "store"))


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "upstream"
    root.mkdir()
    with web.nginx(root, tmp_path / "nginx") as url:
        yield root, url


def source(url: str, **fields: object) -> Source:
    known: dict[str, object] = {
        "name": "debian",
        "tags": ("12", "bookworm"),
        "architectures": {"x86_64": "amd64"},
    }
    return Source(url=url, **(known | fields))  # type: ignore[arg-type]


def test_dated_directories_with_one_checksum_file(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    wanted = source(
        url + "/{build}/debian-12-{arch}.qcow2",
        checksums=url + "/{build}/SHA512SUMS",
        build={"page": url + "/", "pattern": r'href="(\d{8}-\d+)/"'},
        keep=2,
    )
    digests = []
    for number, build in enumerate(("20250101-1", "20250201-1", "20250301-10")):
        (root / build).mkdir()
        data = qcow2(root / build / "debian-12-amd64.qcow2", number)
        (root / build / "SHA512SUMS").write_text(
            f"{hashlib.sha512(data).hexdigest()}  debian-12-amd64.qcow2\n"
        )
        outcome = sync(store, [wanted], tmp_path / "work")[0]
        assert (outcome.result, outcome.message) == ("new", "")
        assert outcome.digest is not None
        digests.append(outcome.digest)
        assert sync(store, [wanted], tmp_path / "work")[0].result == "unchanged"
    images = {record.tag: record.images["x86_64"] for record in store.names.list()}
    assert images == {"12": digests[2], "bookworm": digests[2], "12-20250201-1": digests[1]}
    provenance = read_provenance(store, digests[2])
    assert provenance.build == "20250301-10" and provenance.algorithm == "sha512"
    assert list((tmp_path / "work").iterdir()) == []


def test_a_checksum_file_beside_each_image_in_bsd_form(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    data = qcow2(root / "Rocky-9-Base.x86_64.qcow2", 1)
    sums = f"# Rocky: {len(data)} bytes\nSHA256 (Rocky-9-Base.x86_64.qcow2) = {hashlib.sha256(data).hexdigest()}\n"
    (root / "Rocky-9-Base.x86_64.qcow2.CHECKSUM").write_text(sums)
    wanted = source(
        url + "/Rocky-9-Base.{arch}.qcow2",
        name="rocky",
        architectures={"x86_64": "x86_64"},
        checksums=url + "/{file}.CHECKSUM",
    )
    assert sync(store, [wanted], tmp_path / "work")[0].result == "new"


def test_without_checksums_the_etag_says_that_nothing_changed(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    qcow2(root / "current.img", 1)
    wanted = source(url + "/current.img")
    assert sync(store, [wanted], tmp_path / "work")[0].result == "new"
    assert sync(store, [wanted], tmp_path / "work")[0].result == "unchanged"
    qcow2(root / "current.img", 2)
    os.utime(root / "current.img", (1e9, 1e9))  # nginx makes its ETag of time and size
    assert sync(store, [wanted], tmp_path / "work")[0].result == "new"


def test_who_is_killed_over_an_update_knows_whence_the_image_is_and_has_set_all_its_names(
    store: Store, upstream: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("imagestore.updates.making._parts", killed)
    (root, url), wanted = upstream, source(upstream[1] + "/it.qcow2", format="")
    qcow2(root / "it.qcow2", 1)
    assert sync(store, [wanted], tmp_path / "work")[0].result == "new"
    qcow2(root / "it.qcow2", 2)
    os.utime(root / "it.qcow2", (1, 1))  # another ETag
    with pytest.raises(KeyboardInterrupt):
        sync(store, [wanted], tmp_path / "work")
    first, second = (store.names.get("debian", tag).digest("x86_64") for tag in ("12", "bookworm"))
    assert first == second and read_provenance(store, first).url == url + "/it.qcow2"


def test_as_many_versions_keep_a_name_where_upstream_names_no_builds(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    digests = []
    for number in range(4):
        qcow2(root / "current.img", number)
        os.utime(root / "current.img", (1e9 + number, 1e9 + number))
        digests.append(sync(store, [source(url + "/current.img", keep=2)], tmp_path / "work")[0].digest)
    records = list(store.names.list())
    assert {record.images["x86_64"] for record in records} == {digests[3], digests[2]}
    assert len(records) == 3


def test_a_bad_source_stops_no_other(store: Store, upstream: tuple[Path, str], tmp_path: Path) -> None:
    root, url = upstream
    qcow2(root / "good.img", 1)
    (root / "bad.img").write_bytes(b"not an image at all" * 1000)
    wanted = [
        source(url + "/missing.img", name="missing"),
        source(url + "/bad.img", name="bad"),
        source(url + "/good.img", name="good"),
        source("http://127.0.0.1:1/x.img", name="away"),
    ]
    results = {outcome.name.split()[0]: outcome for outcome in sync(store, wanted, tmp_path / "work")}
    assert [results[f"{name}:12"].result for name in ("missing", "bad", "good", "away")] == [
        "failed", "failed", "new", "failed",
    ]  # fmt: skip
    assert "404" in results["missing:12"].message
    assert {record.name for record in store.names.list()} == {"good"}


def test_a_file_that_cannot_be_written_stops_no_other(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    wanted = [source(f"{url}/{name}.img", name=name) for name in ("stuck", "good")]
    qcow2(root / "stuck.img", 1), qcow2(root / "good.img", 2)
    part = tmp_path / "work" / f"{Digest.of(wanted[0].url.encode()).hex()[:24]}.part"
    part.mkdir(parents=True)
    first, second = sync(store, wanted, tmp_path / "work")
    assert (first.result, second.result) == ("failed", "new") and "Is a directory" in first.message


def test_one_sync_at_a_time_downloads_and_what_was_left_long_ago_goes(
    store: Store, upstream: tuple[Path, str], tmp_path: Path
) -> None:
    root, url = upstream
    qcow2(root / "good.img", 1)
    work, old = tmp_path / "work", time.time() - 30 * 86400
    work.mkdir()
    (work / "new.part").touch(), (work / "old.part").touch()
    os.utime(work / "old.part", (old, old))
    with opened(work, os.O_RDONLY) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another sync"):
            sync(store, [source(url + "/good.img")], work)
        assert sync(store, [source(url + "/good.img")], work, dry_run=True)[0].result == "new"
    assert sync(store, [source(url + "/good.img")], work)[0].result == "new"
    assert [path.name for path in work.iterdir()] == ["new.part"]


def test_a_damaged_name_stops_no_other(store: Store, upstream: tuple[Path, str], tmp_path: Path) -> None:
    root, url = upstream
    qcow2(root / "good.img", 1)
    store.backend.put(name_key("spoilt", "12"), b"damaged")
    wanted = [source(url + "/good.img", name=name) for name in ("spoilt", "good")]
    first, second = sync(store, wanted, tmp_path / "work")
    assert (first.result, second.result) == ("failed", "new"), first.message


def test_a_checksum_that_fails_once_is_fetched_again_and_one_that_always_fails_is_an_error(
    store: Store, tmp_path: Path
) -> None:
    good = qcow2(tmp_path / "good.qcow2", 1)
    sums = f"{hashlib.sha256(good).hexdigest()}  image.qcow2\n".encode()
    asked = []

    def flaky(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(1)
        web.body(good if len(asked) > 1 else good[:-1] + b"x")(handler)

    answers = {"/a/image.qcow2": flaky, "/a/SUMS": web.body(sums)}
    answers |= {"/b/image.qcow2": web.body(good[:-1] + b"y"), "/b/SUMS": web.body(sums)}
    with web.misbehaving(answers) as url:
        wanted = [
            source(f"{url}/{letter}/image.qcow2", checksums=f"{url}/{letter}/SUMS", name=letter)
            for letter in ("a", "b")
        ]
        first, second = sync(store, wanted, tmp_path / "work")
    assert (first.result, len(asked)) == ("new", 2)
    assert second.result == "failed" and "3 times" in second.message
    assert {record.name for record in store.names.list()} == {"a"}


def test_a_download_goes_on_where_it_was_cut_off_unless_the_file_changed(tmp_path: Path) -> None:
    data = disk(7, 5 << 20)
    cut = 3 << 20
    ranges: list[str | None] = []
    state = {"etag": '"one"', "cut": True}

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        ranges.append(handler.headers.get("Range"))
        resume = handler.headers.get("If-Range") == state["etag"] and ranges[-1]
        start = int(str(ranges[-1])[6:-1]) if resume else 0
        handler.send_response(206 if resume else 200)
        if resume:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("ETag", str(state["etag"]))
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start:cut] if state["cut"] else data[start:])
        handler.close_connection = True

    out = tmp_path / "file"
    with web.misbehaving({"/file": answer}) as url, closing(Downloader(trusted=True)) as downloader:
        with pytest.raises(Unavailable):
            downloader.fetch(url + "/file", out, limit_bytes=1 << 30)
        state["cut"] = False
        assert downloader.fetch(url + "/file", out, limit_bytes=1 << 30)
        assert out.read_bytes() == data and ranges[-1] is not None and ranges[-1] != "bytes=0-"
        state["cut"] = True
        with pytest.raises(Unavailable):
            downloader.fetch(url + "/file", out, limit_bytes=1 << 30)
        state.update(cut=False, etag='"two"')
        downloader.fetch(url + "/file", out, limit_bytes=1 << 30)
    assert out.read_bytes() == data


def test_a_file_that_grows_for_ever_is_cut_off(tmp_path: Path) -> None:
    with web.misbehaving({"/file": web.endless}) as url, closing(Downloader(trusted=True)) as downloader:
        with pytest.raises(Corrupt, match="limit"):
            downloader.fetch(url + "/file", tmp_path / "file", limit_bytes=8 << 20)
        with pytest.raises(Corrupt, match="limit"):
            downloader.small(url + "/file")
    assert not (tmp_path / "file").exists()


def test_a_redirect_to_a_private_address_is_refused_and_a_strangers_url_may_not_start_there(
    tmp_path: Path,
) -> None:
    with web.misbehaving({"/file": web.body(b"secret")}) as inside:
        targets = {
            "/loopback": inside + "/file",
            "/link-local": "http://169.254.169.254/latest/meta-data",
            "/private": "http://10.0.0.1/file",
            "/mapped": "http://[::ffff:127.0.0.1]/file",
            "/other-scheme": "file:///etc/passwd",
            "/name": inside.replace("127.0.0.1", "localhost") + "/file",
        }
        answers = {path: web.redirect(to) for path, to in targets.items()} | {
            "/own": web.redirect("/file"),
            "/file": web.body(b"fine"),
        }
        with web.misbehaving(answers) as url:
            with closing(Downloader(trusted=True)) as downloader:
                assert downloader.small(url + "/own") == b"fine"
                for path in targets:
                    with pytest.raises(Denied):
                        downloader.small(url + path)
            with closing(Downloader(trusted=False)) as downloader:
                for address in (
                    url + "/file",
                    "http://localhost/x",
                    "http://169.254.169.254/",
                    "http://[::1]/",
                ):
                    with pytest.raises(Denied, match="no public address"):
                        downloader.small(address)


def test_public_addresses_are_told_from_private_ones() -> None:
    for private in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1", "0.0.0.0"):
        assert not is_public(private)
    for hidden in ("::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "224.0.0.1", "100.64.0.1"):
        assert not is_public(hidden)
    assert is_public("151.101.2.132") and is_public("2a04:4e42::644")


def test_a_redirect_loop_ends(tmp_path: Path) -> None:
    with (
        web.misbehaving({"/a": web.redirect("/b"), "/b": web.redirect("/a")}) as url,
        closing(Downloader(trusted=True)) as downloader,
        pytest.raises(Unavailable, match="redirects"),
    ):
        downloader.small(url + "/a")


@pytest.fixture(scope="module")
def gnupg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A home with a key and the keyring that has it."""
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)
    base = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run([*base, "--quick-gen-key", "upstream@example.org", "ed25519", "sign", "never"], check=True)
    keyring = home / "upstream.gpg"
    keyring.write_bytes(subprocess.run([*base, "--export"], check=True, capture_output=True).stdout)
    yield home, keyring
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)


def sign(home: Path, text: bytes, *how: str) -> bytes:
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", *how]
    return subprocess.run(command, input=text, check=True, capture_output=True).stdout


def test_a_signature_is_checked_and_a_wrong_one_refused(gnupg: tuple[Path, Path]) -> None:
    home, keyring = gnupg
    text = b"aa  image\n"
    assert check_signature(text, sign(home, text, "--armor", "--detach-sign"), keyring)[0] == text
    clear = sign(home, text, "--clear-sign")
    signed, signer = check_signature(b"ff  unsigned line before\n" + clear, b"", keyring)
    assert signed.strip() == text.strip() and "upstream@example.org" in signer
    for changed, signature in (
        (b"bb  image\n", sign(home, text, "--detach-sign")),
        (clear.replace(b"aa", b"bb"), b""),
        (text, b""),
    ):
        with pytest.raises(Denied, match="wrong"):
            check_signature(changed, signature, keyring)


def test_a_binary_signature_is_taken_and_so_is_a_list_of_any_bytes(gnupg: tuple[Path, Path]) -> None:
    """H3."""
    home, keyring = gnupg
    text = b"aa  image-of-\xe9\xff.img\n"
    assert check_signature(text, sign(home, text, "--detach-sign"), keyring)[0] == text


def test_one_known_signer_of_two_is_enough_while_the_other_is_only_unknown(
    gnupg: tuple[Path, Path], tmp_path: Path
) -> None:
    """H3."""
    home, keyring = gnupg
    base = ["gpg", "--homedir", str(home), "--batch", "--quiet"]
    subprocess.run(
        [*base, "--passphrase", "", "--quick-gen-key", "second@example.org", "ed25519", "sign", "never"],
        check=True,
    )
    both = tmp_path / "both.gpg"
    both.write_bytes(subprocess.run([*base, "--export"], check=True, capture_output=True).stdout)
    text, users = b"aa  image\n", ("-u", "second@example.org", "-u", "upstream@example.org")
    detached, clear = (sign(home, text, *users, how) for how in ("--detach-sign", "--clear-sign"))
    for known in (keyring, both):
        signed, signer = check_signature(text, detached, known)
        assert signed == text and "example.org" in signer
        assert check_signature(clear, b"", known)[0].strip() == text.strip()
        with pytest.raises(Denied):
            check_signature(b"bb  image\n", detached, known)
        with pytest.raises(Denied):
            check_signature(clear.replace(b"aa", b"bb"), b"", known)
    # A good signature beside a bad one by a known key shows that somebody meddled.
    other = sign(home, b"bb  image\n", "-u", "second@example.org", "--detach-sign")
    with pytest.raises(Denied):
        check_signature(text, sign(home, text, "-u", "upstream@example.org", "--detach-sign") + other, both)


def test_a_checksum_file_with_a_wrong_signature_stops_its_source(
    store: Store, upstream: tuple[Path, str], tmp_path: Path, gnupg: tuple[Path, Path]
) -> None:
    root, url = upstream
    home, keyring = gnupg
    data = qcow2(root / "image.qcow2", 1)
    sums = f"{hashlib.sha256(data).hexdigest()}  image.qcow2\n"
    (root / "SUMS").write_text(sums)
    (root / "SUMS.gpg").write_bytes(sign(home, b"something else", "--armor", "--detach-sign"))
    wanted = source(
        url + "/image.qcow2", checksums=url + "/SUMS", signature=url + "/SUMS.gpg", keyring=str(keyring)
    )
    outcome = sync(store, [wanted], tmp_path / "work")[0]
    assert outcome.result == "failed" and "signature" in outcome.message
    (root / "SUMS.gpg").write_bytes(sign(home, sums.encode(), "--detach-sign"))
    outcome = sync(store, [wanted], tmp_path / "work")[0]
    assert outcome.result == "new" and "upstream@example.org" in outcome.message
    missing = replace(wanted, keyring=str(tmp_path / "none"))
    assert "not checked" in sync(store, [missing], tmp_path / "work")[0].message
    with pytest.raises(NotFound):
        store.names.get("nothing")
