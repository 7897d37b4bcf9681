"""A pull-through mirror between an upstream and the `sf` of ten machines: what crosses, counted by the upstream."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.mirror.signing import Keyring, Publisher, init
from imagestore.push import push
from imagestore.store.store import Store
from tests import web
from tests.machines import SF, machine, run

CLIENTS = 10
_SENT = re.compile(r"GET /(packs/\S+) 206 bytes=(\d+)-(\d+)")


def sent_frames(log: Path, layout: Layout) -> list[int]:
    """How many answers carried any byte of each frame of an image."""
    answers = [
        (m[1], int(m[2]), int(m[3]) + 1) for m in map(_SENT.fullmatch, log.read_text().splitlines()) if m
    ]
    counts = Counter[int]()
    offsets, sizes = layout.frames["offset"].tolist(), layout.frames["size"].tolist()
    for frame, (pack, offset, size) in enumerate(zip(layout.frames["pack"], offsets, sizes, strict=True)):
        key = PACKS.key(layout.packs[pack])
        counts[frame] = sum(
            key == of and start < offset + size and offset < end for of, start, end in answers
        )
    return [counts[frame] for frame in range(len(offsets))]


def test_ten_machines_pull_a_new_image_and_upstream_sends_each_frame_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "hints"))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(np.random.default_rng(5).bytes(40 << 20))
    store, keys = Store.init(Directory(tmp_path / "upstream")), Keyring(tmp_path / "keys")
    fingerprint = init(store, keys)
    digest = push(store, disk, "new", "1", architecture="x86_64", format_="raw").digest
    Publisher(store, keys).publish()
    near = machine(tmp_path / "near")
    with (
        web.nginx(tmp_path / "upstream", tmp_path / "nginx") as upstream,
        near.serving("--upstream", upstream) as url,
    ):
        pulls = []
        for number in range(CLIENTS):
            client = machine(tmp_path / f"client-{number}")
            (client.path / "config.toml").write_text(f'[remotes.near]\nurl = "{url}#{fingerprint}"\n')
            command = [SF, "-q", "image", "pull", "near/new:1", "-o", client.path / "out.raw"]
            pulls.append(subprocess.Popen(command, env=client.environment, stderr=subprocess.PIPE, text=True))
        for pull in pulls:
            _, said = pull.communicate(timeout=240)
            assert pull.returncode == 0, said
        for client_disk in tmp_path.glob("client-*/out.raw"):
            run("cmp", client_disk, disk)
    assert len(list(tmp_path.glob("client-*/out.raw"))) == CLIENTS
    log = tmp_path / "nginx" / "access.log"
    layout = store.layout(digest)
    assert len(layout.packs) > 1
    assert set(sent_frames(log, layout)) == {1}
    whole = [
        line
        for line in log.read_text().splitlines()
        if line.startswith("GET /packs/") and "bytes=" not in line
    ]
    assert whole == []
