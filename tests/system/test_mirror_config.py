"""The shipped web server configurations, started for real over a real store, read by our own client and by curl."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from imagestore.formats.keys import KINDS
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.open import open_store
from tests.servers import free_ports

CONFIG = Path(__file__).resolve().parents[2] / "mirror-config"
Server = Callable[[Path, Path], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def running(argv: list[str | Path], port: int, **environment: str) -> Iterator[str]:
    process = subprocess.Popen(
        argv, env=environment or None, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, trust_env=False)
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def nginx(root: Path, state: Path) -> Iterator[str]:
    port = free_ports(1, 26000)
    shipped = (CONFIG / "nginx/sf-mirror.conf").read_text()
    server = shipped.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("/srv/sf/store", str(root))
    assert server.count(str(root)) == 2
    places = "".join(
        f"{kind}_temp_path {state}/t; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (state / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {state}/pid; error_log {state}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {places}\n{server} }}\n"
    )
    with running(["nginx", "-e", state / "error.log", "-c", state / "nginx.conf"], port) as url:
        yield url


@contextlib.contextmanager
def caddy(root: Path, state: Path) -> Iterator[str]:
    port = free_ports(1, 26000)
    shipped = (CONFIG / "caddy/Caddyfile").read_text()
    site = shipped.replace("images.example {", f"http://127.0.0.1:{port} {{").replace(
        "/srv/sf/store", str(root)
    )
    (state / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + site)
    argv: list[str | Path] = ["caddy", "run", "--adapter", "caddyfile", "--config", state / "Caddyfile"]
    with running(argv, port, HOME=str(state), PATH="/usr/bin:/bin") as url:
        yield url


SERVERS = [
    pytest.param(
        server, id=server.__name__, marks=pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}")
    )
    for server, name in ((nginx, "nginx"), (caddy, "caddy"))
]


@pytest.mark.parametrize("server", SERVERS)
def test_a_store_behind_the_shipped_configuration_is_a_mirror_and_shows_nothing_else(
    server: Server, tmp_path: Path, tiny_image: Path
) -> None:
    root, state = tmp_path / "store", tmp_path / "state"
    state.mkdir()
    store = open_store(root.as_uri(), create=True)
    digest = push(store, tiny_image, "tiny", "1").digest
    (root / "leases").mkdir(exist_ok=True)
    (root / "leases/secret").write_text("not for readers")
    # nginx's workers and Caddy may be other users than who wrote the store
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    with server(root, state) as url, httpx.Client(base_url=url, trust_env=False) as client:
        mirror = open_store(url)
        assert mirror.names.get("tiny", "1").images
        pull(mirror, digest, tmp_path / "out.qcow2")
        compared = subprocess.run(
            ["qemu-img", "compare", tiny_image, tmp_path / "out.qcow2"], capture_output=True
        )
        assert compared.returncode == 0

        pack = next(path for path in (root / "packs").rglob("*") if path.is_file()).relative_to(root)
        part = client.get(f"/{pack}", headers={"Range": "bytes=5-9"})
        assert (part.status_code, len(part.content)) == (206, 5)
        assert "immutable" in part.headers["cache-control"]
        assert client.get("/store.json").headers["cache-control"] == "no-cache"
        assert client.get("/names/tiny/1").headers["cache-control"] == "no-cache"
        for hidden in (
            "/leases/secret",
            "/",
            "/packs/",
            "/names/",
            "/../state/Caddyfile",
            "/%2e%2e/state/nginx.conf",
        ):
            assert client.get(hidden).status_code in (400, 403, 404), hidden
        assert client.put("/names/tiny/1", content=b"x").status_code in (403, 404, 405)
        assert client.delete(f"/{pack}").status_code in (403, 404, 405)
        assert (root / pack).exists()


def served(configuration: str) -> list[set[str]]:
    """Trees that are good for ever, and trees that are asked for again."""
    places = re.findall(r"\^/\(([^)]*)\)", (CONFIG / configuration).read_text())
    return [{word.strip("/").replace(r"\.json$", ".json") for word in place.split("|")} for place in places]


def test_the_configurations_and_the_mirror_service_agree_on_what_is_served() -> None:
    public = [kind for kind in KINDS if kind.public]
    kinds = [{kind.tree for kind in public if kind.changes == changes} for changes in (False, True)]
    assert served("nginx/sf-mirror.conf") == served("caddy/Caddyfile") == kinds
