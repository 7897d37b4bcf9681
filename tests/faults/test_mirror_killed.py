"""`sf mirror sync` and `publish` killed at any moment: clients never see a name that does not verify."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.formats.digest import Digest
from imagestore.mirror.content import compute_sums
from imagestore.mirror.signing import Keyring, Publisher, init
from imagestore.mirror.sources import load
from imagestore.mirror.sync import sync
from imagestore.pull import pull
from imagestore.store.store import Store
from imagestore.store.trust import open_signed
from imagestore.verify import verify_store
from tests import web
from tests.drills import rounds, seed

_MIRROR = """
import sys
from pathlib import Path
from imagestore.backends.directory import Directory
from imagestore.mirror.content import compute_sums
from imagestore.mirror.signing import Keyring, Publisher
from imagestore.mirror.sources import load
from imagestore.mirror.sync import sync
from imagestore.store.store import Store
print("started", flush=True)
path = Path(sys.argv[1])
store = Store.open(Directory(path / "store"))
outcome = sync(store, load(path / "sources.toml"), path / "work")[0]
assert outcome.result != "failed", outcome.message
for record in store.names.list():
    for digest in record.images.values():
        compute_sums(store, digest)
Publisher(store, Keyring(path / "keys")).publish()
"""


def new_version(path: Path, number: int) -> str:
    """Another build upstream; the SHA-256 of its disk."""
    rng = np.random.default_rng(number)
    disk = path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(24 << 20)
        file.seek(1 << 20)
        file.write(np.random.default_rng(0).bytes(6 << 20) + rng.bytes(4 << 20))
    image = path / "upstream" / "image.qcow2"
    subprocess.run(["qemu-img", "convert", "-q", "-O", "qcow2", disk, image], check=True)
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    (path / "upstream" / "SHA256SUMS").write_text(f"{digest}  image.qcow2\n")
    return hashlib.sha256(disk.read_bytes()).hexdigest()


def seen_by_a_client(path: Path, fingerprint: Digest) -> str:
    """SHA-256 of the disk that the signed name gives now."""
    store = open_signed(Directory(path / "store"), fingerprint)
    digest = store.names.get("debian", "12").digest("x86_64")
    pull(store, digest, path / "out.raw", format_="raw", durable=False)
    return hashlib.sha256((path / "out.raw").read_bytes()).hexdigest()


def mirror(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _MIRROR, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"started\n"
    return process


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_a_mirror_killed_at_any_moment_shows_the_former_publication_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SF_TRUST_DIR", str(tmp_path / "client"))
    (tmp_path / "upstream").mkdir()
    store, keys = Store.init(Directory(tmp_path / "store")), Keyring(tmp_path / "keys")
    fingerprint = init(store, keys)
    with web.nginx(tmp_path / "upstream", tmp_path / "nginx") as url:
        (tmp_path / "sources.toml").write_text(
            f'[[source]]\nname = "debian"\ntags = ["12"]\narchitectures = {{ x86_64 = "amd64" }}\n'
            f'url = "{url}/image.qcow2"\nchecksums = "{url}/SHA256SUMS"\n'
        )
        before = new_version(tmp_path, 1)
        began = time.monotonic()
        assert sync(store, load(tmp_path / "sources.toml"), tmp_path / "work")[0].result == "new"
        compute_sums(store, store.names.get("debian", "12").digest("x86_64"))
        Publisher(store, keys).publish()
        whole_s = time.monotonic() - began
        random_, killed = random.Random(seed()), 0
        for number in range(rounds(50)):
            after = new_version(tmp_path, 2 + number)
            process = mirror(tmp_path)
            time.sleep(random_.uniform(0, whole_s))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            assert seen_by_a_client(tmp_path, fingerprint) in (before, after)
            again = mirror(tmp_path)
            assert again.wait() == 0, again.stderr and again.stderr.read().decode()
            assert seen_by_a_client(tmp_path, fingerprint) == after
            before = after
        assert list(verify_store(store, full=True).problems) == []
    assert killed
    assert list((tmp_path / "work").iterdir()) == []
