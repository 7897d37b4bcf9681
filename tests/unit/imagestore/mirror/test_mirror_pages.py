"""The mirror's application over ASGI: what may be kept, odd requests, and the pages for people."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.formats.digest import Digest
from imagestore.formats.keys import KINDS, Check
from imagestore.mirror import signing
from imagestore.mirror.content import compute_sums
from imagestore.mirror.serve import make_app
from imagestore.push import push
from imagestore.store.store import Store
from imagestore.store.trust import tree

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(np.random.default_rng(1).bytes(1 << 20))
    store = Store.init(Directory(tmp_path / "store"))
    result = push(store, disk, "debian", "12", architecture="x86_64", os_name="debian", format_="raw")
    compute_sums(store, result.digest)
    return store


def ask(store: Store, path: str, *, method: str = "GET", query: str = "", **headers: str) -> Answer:
    """One request, its path as it stands: no client tidies it first."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        requests = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        named = [(key.replace("_", "-").encode(), value.encode("latin-1")) for key, value in headers.items()]
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
            "headers": [(b"host", b"mirror.example"), *named], "scheme": "https", "server": ("mirror.example", 443),
            "client": ("127.0.0.1", 1), "root_path": "", "http_version": "1.1",
        }  # fmt: skip
        await make_app(store)(scope, receive, send)

    asyncio.run(run())
    told = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:])


def test_only_what_its_name_proves_may_be_kept_for_ever(store: Store) -> None:
    """H7."""
    proven = {kind.tree for kind in KINDS if not kind.changes}
    assert proven == {kind.tree for kind in KINDS if kind.check in (Check.NAME, Check.FOOTER, Check.HEAD)}
    seen = set()
    for stat in store.backend.list(""):
        status, headers, _ = ask(store, f"/{stat.key}")
        if status == 200:
            tree = stat.key.partition("/")[0]
            seen.add(tree)
            assert ("immutable" in headers["cache-control"]) == (tree in proven), stat.key
    assert {"packs", "manifests", "layouts", "names", "sums"} <= seen
    configs = Path(__file__).resolve().parents[4] / "mirror-config"
    for file in ("nginx/sf-mirror.conf", "caddy/Caddyfile"):
        assert (
            f"({'|'.join(kind.tree for kind in KINDS if kind.tree in proven)})/"
            in (configs / file).read_text()
        )


@pytest.mark.parametrize(
    "path",
    [
        "/names/../store.json",
        "/names/debian/../../store.json",
        "/names/debian/\0",
        "/names/debian/12/",
        "//store.json",
        "/packs/../../../../etc/passwd",
        "/images/../debian/12/amd64",
        "/images/debian/12/amd64/../../../store.json",
        "/images/debian/\0/amd64/disk.raw",
        "/images/debian/12/amd64/\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "/names/" + "a" * 9000 + "/b",
        "/leases/x",
    ],
)
def test_a_path_that_is_no_object_is_not_found(store: Store, path: str) -> None:
    """H6."""
    for method in ("GET", "HEAD"):
        assert ask(store, path, method=method)[0] == 404


@pytest.mark.parametrize("path", ["/store.json", "/images/debian/12/amd64/disk.raw"])
def test_numbers_of_thousands_of_digits_are_no_error_of_ours(store: Store, path: str) -> None:
    """H5."""
    many = "9" * 5000
    for header in (
        f"bytes={many}-",
        f"bytes=-{many}",
        f"bytes=0-{many}",
        f"bytes={many}-{many}",
        "bytes=²-³",
    ):
        assert ask(store, path, range=header)[0] in (200, 206, 416)
        assert ask(store, path, content_length=many, if_modified_since=many, if_range=many)[0] == 200


def test_a_page_is_asked_for_by_head_as_well(store: Store) -> None:
    """I11."""
    image = "/images/debian/12/amd64"
    for path in ("/", "/livez", "/metrics", "/streams/v1/index.json", "/streams/v1/images.json", f"{image}/"):
        assert ask(store, path, method="HEAD")[0] == 200
    for file in ("SHA256SUMS", "incus.tar.xz", "disk.qcow2", "disk.raw"):
        assert ask(store, f"{image}/{file}", method="HEAD")[0] == 200
    assert ask(store, "/", method="POST")[0] == 405


def test_the_command_on_an_images_page_makes_a_guest_that_can_be_reached(store: Store) -> None:
    """I13."""
    _, headers, page = ask(store, "/images/debian/12/amd64/")
    for words in (
        "--network lan",
        "--ssh-key",
        "sf network create lan",
        "sf instance ssh web -l debian",
        "password",
    ):
        assert words in page.decode()
    nonce = headers["content-security-policy"].partition("'nonce-")[2].partition("'")[0]
    assert nonce and f'nonce="{nonce}"' in page.decode() and "unsafe-inline'; script" not in str(headers)


def test_a_signer_who_brought_nonsense_hides_nobody_elses_images(store: Store, tmp_path: Path) -> None:
    keys = signing.Keyring(tmp_path / "keys")
    signing.init(store, keys)
    signing.Publisher(store, keys).publish()
    for data in (b"nonsense", b"{}"):
        other = tree(Digest.of(data))
        store.backend.put(f"{other}timestamp.json", data)
        store.backend.put(f"{other}1.targets.json", data)
    status, _, page = ask(store, "/")
    assert status == 200 and b"debian" in page


def test_many_images_come_in_pages_that_keep_the_search(store: Store) -> None:
    """I15."""
    digest = store.names.get("debian", "12").digest("x86_64")
    for number in range(250):
        store.names.set("many", f"v{number:03}", "x86_64", digest)
    seen: list[str] = []
    for number in (1, 2, 3):
        page = ask(store, "/", query=f"q=many&page={number}")[2].decode()
        seen += [line for line in page.splitlines() if 'data-name="Image"' in line]
        assert "q=many&amp;page=" in page
    assert len(seen) == len(set(seen)) == 250
    for odd in ("0", "99", "-1", "x", "9" * 5000):
        assert ask(store, "/", query=f"page={odd}")[0] == 200
