"""`sf image push` of URLs and packed files: checked, fetched once, and again only when the server has another file."""

import hashlib
import http.server
import json
import lzma
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import web
from tests.unit.cli.test_mirror_commands import home, run

__all__ = ["home"]  # a fixture
DATA = bytes(510) + b"\x55\xaa" + b"x" * (1 << 20)
PACKED = lzma.compress(DATA)
SHA256 = hashlib.sha256(PACKED).hexdigest()


def push(*words: object, code: int = 0) -> dict[str, object]:
    done = run("image", "push", *words, "--format", "json", code=code)
    return json.loads(done.stdout) if not code else {}


def shown(name: str) -> dict[str, object]:
    return json.loads(run("image", "show", name, "--format", "json").stdout)


def asked(url: str, home: Path) -> list[str]:
    """What was asked of nginx. It writes that down some time after its answer, so a question of ours comes last."""
    log = home / "nginx" / "access.log"
    ours = (before := log.read_text()).count("/ours")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{url}/ours", timeout=30)
    while (text := log.read_text()).count("/ours") == ours:
        assert text.startswith(before)
    return [" ".join(line.split()[:3]) for line in text.splitlines() if "/ours" not in line]


def test_a_url_is_the_disk_in_it_and_is_fetched_again_only_when_it_changed(home: Path) -> None:
    root = home / "root"
    root.mkdir()
    (root / "x.img.xz").write_bytes(PACKED)
    (home / "disk.raw").write_bytes(DATA)
    with web.nginx(root, home / "nginx") as url:
        made = push(f"{url}/x.img.xz", "x:1", "--label", "team=shop")
        push(home / "disk.raw", "y:1")
        assert made["result"] == "new" and shown("x:1")["disk_id"] == shown("y:1")["disk_id"]
        assert push(f"{url}/x.img.xz", "x:1")["result"] == "unchanged"
        assert asked(url, home)[-1] == "GET /x.img.xz 304"
        (root / "x.img.xz").write_bytes(lzma.compress(DATA + DATA))
        assert push(f"{url}/x.img.xz", "x:1")["digest"] != made["digest"]
    assert "sha256" in shown("x:1")["source"] and not list((home / "hints" / "downloads").iterdir())


def test_a_checksum_that_is_given_or_lies_beside_is_compared(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    root = home / "root"
    root.mkdir()
    (root / "x.xz").write_bytes(PACKED)
    with web.nginx(root, home / "nginx") as url:
        assert push(f"{url}/x.xz", "x:1", "--checksum", f"sha256:{SHA256}")["result"] == "new"
        assert push(f"{url}/x.xz", "x:1", "--checksum", SHA256.upper())["result"] == "unchanged"
        before = asked(url, home)
        push(f"{url}/x.xz", "z:1", "--checksum", f"sha256:{'0' * 64}", code=1)
        assert asked(url, home)[len(before) :] == ["GET /x.xz 200"] * 3
        (root / "SHA256SUMS").write_text(f"{'0' * 64}  x.xz\n{SHA256}  y.xz\n")
        push(f"{url}/x.xz", "z:1", code=1)
        (root / "SHA256SUMS").write_text(f"{SHA256} *x.xz\n")
        push(f"{url}/x.xz", "z:1")
        run("image", "show", "z:1")
        for wrong in ("sha256:12", "crc32:00000000", "x" * 64):
            push(f"{url}/x.xz", "z:1", "--checksum", wrong, code=2)
    (home / "x.xz").write_bytes(PACKED)
    push(home / "x.xz", "f:1", "--checksum", f"sha256:{SHA256}")
    push(home / "x.xz", "f:2", "--checksum", f"sha256:{'0' * 64}", code=1)
    run("image", "show", "f:2", code=3)


def test_an_answer_that_is_wrong_once_is_fetched_again(home: Path) -> None:
    times = []

    def flaky(handler: http.server.BaseHTTPRequestHandler) -> None:
        times.append(1)
        web.body(PACKED if len(times) > 1 else b"other" + PACKED)(handler)

    with web.misbehaving({"/x.xz": flaky}) as url:
        assert push(f"{url}/x.xz", "x:1", "--checksum", SHA256)["result"] == "new"
    assert len(times) == 2


def test_what_is_no_disk_or_no_address_leaves_no_name_and_no_file(home: Path) -> None:
    with web.misbehaving({"/text": web.body(b"hello\n" * 1000)}) as url:
        push(f"{url}/text", "x:1", code=2)
        push(f"{url}/nothing", "x:1", code=3)
    push("ftp://127.0.0.1/x", "x:1", code=2)
    push("https:///x", "x:1", code=2)
    push(f"{url}/text", "x:1", "--sparsify", code=2)
    run("image", "show", "x:1", code=3)
    assert not list((home / "hints" / "downloads").iterdir())
