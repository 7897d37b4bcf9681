"""What upstreams may answer, and what a source may cost: nothing of it stays behind or stops the next one."""

import hashlib
import http.server
import struct
import sys
import zlib
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.disks.open import open_disk
from imagestore.disks.unpack import check_work
from imagestore.errors import Invalid, StoreError
from imagestore.mirror.download import Downloader
from imagestore.mirror.sources import Source
from imagestore.mirror.sync import sync
from imagestore.progress import Progress
from imagestore.store.store import Store
from tests import web

DATA = np.random.default_rng(7).bytes(300_000)
CUT = 100_000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    return Store.init(Directory(tmp_path / "store"))


def begun(tmp_path: Path, url: str, data: bytes = DATA[:CUT]) -> Path:
    """What a run that was cut off leaves."""
    out = tmp_path / "file"
    out.with_suffix(".part").write_bytes(data)
    out.with_suffix(".part.validator").write_text('"one"')
    return out


def partial(content_range: str, start: int, end: int = len(DATA)) -> web.Answer:
    """206 with these bytes and these words whatever range was asked for; all of it where none was."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if not handler.headers.get("Range"):
            return web.body(DATA, ETag='"one"')(handler)
        handler.send_response(206)
        handler.send_header("Content-Range", content_range)
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        handler.wfile.write(DATA[start:end])
        return None

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        partial(f"bytes {CUT - 7}-{len(DATA) - 1}/{len(DATA)}", CUT - 7),
        partial(f"bytes {CUT + 7}-{len(DATA) - 1}/{len(DATA)}", CUT + 7),
        partial(f"bytes {CUT}-{CUT + 999}/{len(DATA)}", CUT, CUT + 1000),
        partial(f"bytes {CUT}-{'9' * 5000}/{'9' * 5000}", CUT),
        partial("", 0),
        partial("pages 1-2/3", 0),
    ],
    ids=["earlier", "later", "a piece", "thousands of digits", "without a range", "other units"],
)
def test_a_partial_answer_that_is_not_the_rest_is_thrown_away_and_all_is_fetched_anew(
    tmp_path: Path, answer: web.Answer
) -> None:
    """H1."""
    with web.misbehaving({"/file": answer}) as url, closing(Downloader(trusted=True)) as downloader:
        out = begun(tmp_path, url + "/file")
        assert downloader.fetch(url + "/file", out, limit_bytes=1 << 30)
    assert out.read_bytes() == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("status", [206, 304, 416])
def test_an_answer_to_a_question_that_was_not_asked_is_an_error(tmp_path: Path, status: int) -> None:
    """H1."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with web.misbehaving({"/file": answer}) as url, closing(Downloader(trusted=True)) as downloader:
        with pytest.raises(StoreError):
            downloader.fetch(url + "/file", tmp_path / "file", limit_bytes=1 << 30)
        with pytest.raises(StoreError):
            downloader.small(url + "/file")
    assert list(tmp_path.iterdir()) == []


def test_what_lay_there_before_is_never_vouched_for_by_a_new_answer(tmp_path: Path) -> None:
    """H1."""

    def full_disk(done: Progress) -> None:
        raise KeyboardInterrupt

    with (
        web.misbehaving({"/file": web.body(DATA, ETag='"two"')}) as url,
        closing(Downloader(trusted=True)) as downloader,
    ):
        out = begun(tmp_path, "another address", b"old" * 90_000)
        with pytest.raises(KeyboardInterrupt):
            downloader.fetch(url + "/file", out, limit_bytes=1 << 30, progress=full_disk)
        assert DATA.startswith(out.with_suffix(".part").read_bytes())


def source(url: str, **fields: object) -> Source:
    known = {"name": "debian", "tags": ("12",), "architectures": {"x86_64": "amd64"}, "format": "raw"}
    return Source(url=url, **(known | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("headers", [{}, {"ETag": '"changes-{}"'}], ids=["nothing", "an ETag of its own"])
def test_a_source_that_says_nothing_of_its_files_is_new_only_when_the_file_is(
    store: Store, tmp_path: Path, headers: dict[str, str]
) -> None:
    """H9."""
    count = 0
    files = [DATA, DATA, DATA, DATA[::-1]]

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal count
        count += 1
        web.body(files[count - 1], **{k: v.format(count) for k, v in headers.items()})(handler)

    with web.misbehaving({"/file": answer}) as url:
        results = [sync(store, [source(url + "/file")], tmp_path / "work")[0].result for _ in files]
    assert results == ["new", "unchanged", "unchanged", "new"]
    assert len([record for record in store.names.list() if record.tag.startswith("12-")]) == 1
    assert list((tmp_path / "work").iterdir()) == []


def bomb(path: Path, tables: int) -> Path:
    """A qcow2 all of whose tables, of 512 MiB each, name the same clusters; the data are half a MiB compressed."""
    bits = 16
    cluster, count = 1 << bits, 1 << bits - 3
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = packer.compress(b"work" * (cluster // 4)) + packer.flush()
    first = (2 + tables) * cluster
    places = first + len(data) * np.arange(count)
    entries = (places | 1 << 62 | (places % 512 + len(data) - 1) // 512 << 62 - (bits - 8)).astype(">u8")
    l1 = (np.arange(tables) + 2) * cluster
    header = (b"QFI\xfb", 2, 0, 0, bits, tables * count * cluster, 0, tables, cluster, cluster, 1, 0, 0)
    with path.open("wb") as file:
        file.write(struct.pack(">4sIQIIQIIQQIIQ", *header).ljust(cluster, bytes(1)))
        file.write(l1.astype(">u8").tobytes().ljust(cluster, bytes(1)))
        file.write(entries.tobytes() * tables)
        file.write(data * count + bytes(512))
    return path


def test_a_small_file_that_means_days_of_work_is_given_up_and_the_next_source_has_its_turn(
    store: Store, tmp_path: Path
) -> None:
    """H10."""
    image = bomb(tmp_path / "bomb.qcow2", 80).read_bytes()
    assert len(image) < 7 << 20
    for count, said in ((80, pytest.raises(Invalid, match="bytes of data")), (1, nullcontext())):
        path = bomb(tmp_path / "bomb.qcow2", count)
        with open_disk(path, "qcow2") as disk, said:
            check_work(disk, path.name, path.stat().st_size)
    with web.misbehaving({"/bomb": web.body(image), "/good": web.body(DATA)}) as url:
        wanted = [source(url + "/bomb", name="bomb", format="qcow2"), source(url + "/good", name="good")]
        first, second = sync(store, wanted, tmp_path / "work")
    assert (first.result, second.result) == ("failed", "new") and "of data" in first.message
    assert {record.name for record in store.names.list()} == {"good"}


def test_a_source_that_takes_too_long_is_given_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H10."""
    monkeypatch.setattr(sys.modules[sync.__module__], "LONGEST_S", -1.0)
    with web.misbehaving({"/slow": web.body(DATA)}) as url:
        outcome = sync(store, [source(url + "/slow")], tmp_path / "work")[0]
    assert outcome.result == "failed" and "given up" in outcome.message


def test_a_dry_run_says_what_would_come_and_how_large_it_is(store: Store, tmp_path: Path) -> None:
    """I12."""
    sums = f"{hashlib.sha256(DATA).hexdigest()}  file\n".encode()
    answers = {"/file": web.body(DATA), "/SUMS": web.body(sums), "/small": web.body(DATA[:77])}
    with web.misbehaving(answers) as url:
        wanted = [source(url + "/file", checksums=url + "/SUMS"), source(url + "/small", name="small")]
        looked = sync(store, [*wanted, source(url + "/none", name="none")], tmp_path / "work", dry_run=True)
        assert [(o.result, o.new_bytes) for o in looked] == [("new", len(DATA)), ("new", 77), ("failed", 0)]
        assert not list(store.names.list())
        sync(store, wanted, tmp_path / "work")
        again = sync(store, wanted, tmp_path / "work", dry_run=True)
    assert [outcome.result for outcome in again] == ["unchanged", "new"]
