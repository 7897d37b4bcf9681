"""A namespace's store is complete: nothing that happens to the server's own takes anything from it, nor the reverse."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from compute.cluster.holding import Holds
from imagestore.cache.images import ImageCache
from imagestore.gc import collect
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.open import open_store
from imagestore.store.store import Store
from imagestore.verify import verify_store
from tests.api_server import INSTALLATION, running
from tests.drills import rounds
from tests.unit.imagestore.images import make_raw

SNAPSHOTS = max(10, rounds(50))
MACHINE = os.uname().machine


def changed(disk: bytearray, number: int) -> bytes:
    """What became of the base: a few blocks are others."""
    for at in range(3):
        offset = (number * 7919 + at * 104_729) % (len(disk) // 4096) * 4096
        disk[offset : offset + 4096] = hashlib.shake_128(b"%d/%d" % (number, at)).digest(4096)
    return bytes(disk)


def read(store: Store, name: str, out: Path) -> bytes:
    digest = store.names.get("web", name).digest(MACHINE)
    pull(store, digest, out, format_="raw", durable=False)
    return out.read_bytes()


def test_snapshots_outlive_the_removal_and_repack_of_their_base_and_the_shared_store_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    base = make_raw(tmp_path / "base.raw", size_bytes=3 << 20)
    other = make_raw(tmp_path / "other.raw", seed=9, size_bytes=3 << 20)
    shared = open_store((tmp_path / "images").as_uri(), create=True)
    push(shared, base, "base", "1", format_="raw")
    images = ImageCache(tmp_path / "server/cache", {"local": shared})
    with running(tmp_path / "server", resolver=images) as server:
        own = server.services.namespaces.of("system")
        disk, sums = bytearray(base.read_bytes()), dict[str, str]()
        for number in range(SNAPSHOTS):
            (tmp_path / "now.raw").write_bytes(data := changed(disk, number))
            push(own, tmp_path / "now.raw", "web", f"s{number}", format_="raw")
            sums[f"s{number}"] = hashlib.sha256(data).hexdigest()
        # The base goes, and what is left of its store is packed anew.
        push(shared, other, "other", "1", format_="raw")
        shared.names.remove("base", "1")
        for _ in range(3):
            collect(shared, grace_s=-60, repack_threshold=0.0)
        assert not any(r.name == "base" for r in shared.names.list(removed=True))
        assert verify_store(shared, full=True).problems == []
        report = verify_store(own, full=True)
        assert (report.problems, report.images) == ([], SNAPSHOTS)
        # A guest of one of them is held where it is from; the other half goes, and nothing else.
        assert server.instance("a", disk=[{"base": "my/web:s1"}]).status == 200
        stores = {"local": shared, "my/system": own}
        Holds(server.services.store, INSTALLATION).reconcile(stores)
        for number in range(SNAPSHOTS // 2):
            own.names.remove("web", f"s{number}")
        for _ in range(3):
            collect(own, grace_s=-60, repack_threshold=0.0)
        report = verify_store(own, full=True)
        assert (report.problems, report.images) == ([], SNAPSHOTS - SNAPSHOTS // 2 + 1)
        assert verify_store(shared, full=True).problems == []
        # The server's own store is deleted: a snapshot boots, and all are what they were.
        shutil.rmtree(tmp_path / "images")
        assert server.instance("b", disk=[{"base": f"my/web:s{SNAPSHOTS - 1}"}]).status == 200
        for number in range(SNAPSHOTS // 2, SNAPSHOTS):
            data = read(own, f"s{number}", tmp_path / "out.raw")
            assert hashlib.sha256(data).hexdigest() == sums[f"s{number}"]
