"""The image service gives up root, but not what root's settings say: here, where a signer's word is kept."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compute.agent.image_service import ServedImages, Settings
from imagestore.backends.directory import Directory
from imagestore.cache.imaged import unprivileged
from imagestore.cache.images import ImageCache
from imagestore.mirror import signing
from imagestore.push import push
from imagestore.store.open import open_store
from imagestore.store.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives up root")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """Unlike pytest's own directory: in that one the service keeps the right to read everything."""
    path = Path(tempfile.mkdtemp(prefix="sf-service-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_signed_store_is_read_by_the_service_though_root_named_its_own_file_and_home(
    open_to_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4, its kind: what the server's settings say reaches its service."""
    home = tmp_path / "home"
    (home / ".config" / "sf").mkdir(parents=True)
    home.chmod(0o700)
    (home / "own.toml").write_text(f'trust_dir = "{open_to_all}/trust"\n')
    (home / "own.toml").chmod(0o600)
    for name in [name for name in os.environ if name.startswith(("SF_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SF_CONFIG", str(home / "own.toml"))
    state, path = open_to_all / "state", open_to_all / "disk"
    path.write_bytes(bytes(510) + b"\x55\xaa" + np.random.default_rng(1).bytes(1 << 20))
    store = Store.init(Directory(open_to_all / "store"))
    digest = push(store, path, "debian", cache=tmp_path / "hints").digest
    keys = signing.Keyring(tmp_path / "keys")
    signer = signing.init(store, keys)
    signing.Publisher(store, keys).publish()
    url = f"{(open_to_all / 'store').as_uri()}#{signer}"
    open_store(url).backend.close()
    if unprivileged(state, [url])[1] is not None:
        pytest.skip("Python itself is closed to other users here")

    async def boot() -> int:
        images = ServedImages(ImageCache(state / "cache", {}), state, Settings(lambda: (url,)))
        try:
            return (await images.backing("web-vda", str(digest))).size_bytes
        finally:
            await images.tell("leave")

    assert asyncio.run(asyncio.wait_for(boot(), 60)) == path.stat().st_size
