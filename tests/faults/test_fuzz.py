"""Parsers of what comes from outside, under a fuzzer that looks where its bytes lead (atheris, libFuzzer).

`scripts/test --all` gives each MINUTES; else a few hundred inputs, so that the targets themselves stay right.
"""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.formats.digest import Digest
from imagestore.push import push
from imagestore.store.open import open_store
from tests import drills
from tests.unit.imagestore.images import convert, make_raw

pytest.importorskip(
    "atheris", reason="atheris has no wheel for this Python, or the extra dev is not installed"
)

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 2
TARGETS = ("qcow2", "ext4", "manifest", "layout", "footer", "json", "head", "nbd")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Whole examples of each kind, to begin with."""
    place = tmp_path_factory.mktemp("corpus")
    for target in TARGETS:
        (place / target).mkdir()
    raw = make_raw(place / "disk.raw", size_bytes=256 << 10)
    for name, options in (("zlib", ["-c"]), ("zstd", ["-c", "-o", "compression_type=zstd"]), ("plain", [])):
        convert(raw, place / "qcow2" / name, "qcow2", *options, "-o", "cluster_size=512")
    for blocks, options in ((64, "^has_journal"), (128, "^has_journal,extents,64bit,metadata_csum")):
        image = place / "ext4" / f"{blocks}"
        words = [
            "mkfs.ext4",
            "-q",
            "-b4096",
            "-N16",
            "-O",
            f"^resize_inode,{options}",
            str(image),
            f"{blocks * 4}k",
        ]
        subprocess.run(words, check=True)
    store = open_store(str(place / "store"), create=True)
    push(store, raw, "a")
    for tree, target in (
        ("manifests", "manifest"),
        ("layouts", "layout"),
        ("packs", "footer"),
        ("names", "json"),
    ):
        for path in (p for p in (place / "store" / tree).rglob("*") if p.is_file()):
            data = path.read_bytes()
            if target == "footer":
                data = data[-12 - int.from_bytes(data[-12:-8], "little") : -12]
            (place / target / Digest.of(data).hex()).write_bytes(data)
    heads = (
        b"\x00GET /store.json HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\nIf-None-Match: W/\"x\"\r\n\r\n",
        b"\x20POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /%ff HTTP/1.1\r\n\r\n",
        b"\x30GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n1\r\na\r\n0\r\n\r\n",
    )  # fmt: skip
    options = (
        struct.pack(">IQII", 3, 0x49484156454F5054, 8, 0)
        + struct.pack(">QIIIIII", 0x49484156454F5054, 10, 27, 0, 1, 15, 0)[:-4]
        + b"base:allocation"
        + struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0)
    )
    asked = ((0, 0, 512), (0, 4096, 8192), (7, 0, 1 << 20), (5, 0, 4096), (1, 0, 4), (2, 0, 0))
    requests = b"".join(struct.pack(">IHHQQI", 0x25609513, 0, kind, kind, at, n) for kind, at, n in asked)
    (place / "nbd" / "whole").write_bytes(b"\x20" + options + requests)
    (place / "nbd" / "name").write_bytes(
        b"\x00" + struct.pack(">IQII", 1, 0x49484156454F5054, 1, 0) + requests
    )
    for number, head in enumerate(heads):
        (place / "head" / str(number)).write_bytes(head)
    yield place


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_the_bytes_are_the_error_is_one_of_ours(target: str, corpus: Path, tmp_path: Path) -> None:
    """J3."""
    much = [f"-max_total_time={60 * MINUTES}"] if drills.everything() else ["-runs=500"]
    words = [f"-seed={drills.seed() % 2**31 or 1}", "-max_len=600000", "-rss_limit_mb=4096", "-timeout=60"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz_target", target, *much, *words, f"-artifact_prefix={tmp_path}/"]
        + [str(corpus / target)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
