"""Image commands through the real `sf`: what comes out, and what wrong input gets."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from imagestore.backends.directory import Directory
from imagestore.formats.digest import Digest
from imagestore.formats.keys import TRACES
from imagestore.formats.trace import Trace
from imagestore.store.store import Store
from tests.impatient import IMPATIENT
from tests.unit.imagestore.images import convert, identical, make_raw
from tests.web import misbehaving, raw

SF = Path(sys.executable).with_name("sf")
MIB = 1 << 20


class User:
    """Somebody with a terminal, a home of their own and a store in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program: tuple[str | Path, ...] = (SF,)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "SF_STATE_DIR": str(home / "state"),
            "SF_CACHE_DIR": str(home / "hints"),
            "SF_TEST_SESSION": os.environ.get("SF_TEST_SESSION", ""),
        }

    @property
    def store(self) -> Path:
        return self.home / "state" / "store"

    def types(
        self, *words: str | Path, code: int = 0, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        argv = [*prefix, *map(str, (*self.program, *words))]
        done = subprocess.run(
            argv, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, f"$ sf {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        return done

    def fails(self, *words: str | Path, code: int, prefix: Sequence[str] = ()) -> str:
        """The one line that an error is."""
        done = self.types(*words, code=code, prefix=prefix)
        lines = [
            line for line in done.stderr.splitlines() if not line.startswith(("push ", "pull ", "from "))
        ]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("sf: ")
        assert done.stdout == ""
        return lines[0]

    def objects(self) -> dict[str, int]:
        """What the store holds, leases and condemned lists aside."""
        paths = [p for p in self.store.rglob("*") if p.is_file()]
        names = {str(p.relative_to(self.store)): p.stat().st_size for p in paths}
        return {n: size for n, size in names.items() if not n.startswith(("leases/", "gc/"))}


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "disk.raw")


def test_the_tutorials_image_commands_work_as_typed(user: User, disk: Path) -> None:
    qcow2 = convert(disk, user.home / "debian-12.qcow2", "qcow2", "-c")
    pushed = user.types("image", "push", qcow2, "debian:12")
    assert "debian:12" in pushed.stdout
    assert "push debian:12" in pushed.stderr
    assert user.types("image", "ls", "--format", "name").stdout == "debian:12\n"
    shown = json.loads(user.types("image", "show", "debian:12", "--format", "json").stdout)
    assert shown["digest"].startswith("b3:")
    assert shown["size_bytes"] == 6 * MIB
    assert shown["digest"] in pushed.stdout
    assert shown["digest"] in user.types("image", "ls").stdout
    assert shown["digest"] in user.types("image", "verify", "debian:12").stdout
    user.types("image", "pull", "debian:12", "-o", user.home / "copy.qcow2")
    assert identical(disk, "raw", user.home / "copy.qcow2", "qcow2")
    user.types("image", "pull", f"debian@{shown['digest']}", "-o", user.home / "copy.raw")
    assert identical(disk, "raw", user.home / "copy.raw", "raw")
    again = json.loads(user.types("image", "push", disk, "debian:12", "--format", "json", "-q").stdout)
    assert (again["digest"], again["written_bytes"]) == (shown["digest"], 0)


def test_lists_and_shows_have_three_forms_and_quiet_is_quiet(user: User, disk: Path) -> None:
    assert user.types("image", "push", disk, "a", "-q").stderr == ""
    for words in (("image", "ls"), ("image", "show", "a"), ("image", "history", "a"), ("remote", "ls")):
        table, names = user.types(*words).stdout, user.types(*words, "--format", "name").stdout
        assert json.loads(user.types(*words, "--format", "json").stdout)
        assert names.strip() and names.strip() in table
    assert "\x1b" not in user.types("image", "ls").stdout


def test_a_remote_that_cannot_be_used_is_a_line_of_the_list(user: User, disk: Path) -> None:
    """E4: and other commands, which do not need it, go on."""
    user.program = IMPATIENT
    user.types("image", "push", disk, "a", "-q")
    config = user.home / ".config/sf/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    with misbehaving({"/store.json": raw(b"{}", "Content-Length: ²")}) as url:
        urls = {
            "nonsense": url,
            "away": "http://127.0.0.1:1",
            "wrong": "https://[x/",
            "gone": str(user.home / "no"),
        }
        config.write_text("".join(f'[remotes.{name}]\nurl = "{urls[name]}"\n' for name in urls))
        rows = json.loads(user.types("remote", "ls", "--format", "json").stdout)
    states = {row["name"]: row["state"] for row in rows}
    assert list(states) == ["local", *urls]
    assert states["local"] == "ok"
    assert "not a store's URL" in states["wrong"] and "no image store" in states["gone"]
    assert all(states[name] and "\n" not in states[name] for name in urls)
    assert "a:latest" in user.types("image", "ls").stdout


def test_names_are_tagged_removed_and_brought_back(user: User, disk: Path) -> None:
    digest = json.loads(user.types("image", "push", disk, "debian:12", "--format", "json").stdout)["digest"]
    assert user.types("image", "tag", "debian:12", "debian:stable").stdout == f"debian:stable {digest}\n"
    user.types("image", "tag", f"b3:{digest[3:19]}", "debian:short")
    user.types("image", "rm", "debian:12", "debian:short")
    assert user.types("image", "ls", "--format", "name").stdout == "debian:stable\n"
    assert "undelete" in user.fails("image", "show", "debian:12", code=3)
    assert digest in user.types("image", "undelete", "debian:12").stdout
    assert user.types("image", "ls", "--format", "name").stdout == "debian:12\ndebian:stable\n"
    user.types("image", "untag", "debian:stable")
    changes = json.loads(user.types("image", "history", "debian:12", "--format", "json").stdout)
    assert [change["removed"] for change in changes] == [False, True, False]


def test_remotes_are_asked_in_their_order_and_by_name(user: User, disk: Path) -> None:
    other = make_raw(user.home / "other.raw", seed=2)
    for store, file, name in (("one", disk, "a"), ("two", other, "a"), ("two", other, "b")):
        user.types("image", "push", file, name, "--store", user.home / store)
        user.types("remote", "add", f"{store}{name}", user.home / store, code=0)
    in_one = json.loads(user.types("image", "show", "onea/a", "--format", "json").stdout)
    in_two = json.loads(user.types("image", "show", "twoa/a", "--format", "json").stdout)
    user.types("store", "init")
    assert in_one["digest"] != in_two["digest"]
    assert (
        json.loads(user.types("image", "show", "a", "--format", "json").stdout)["digest"] == in_one["digest"]
    )
    assert (
        json.loads(user.types("image", "show", "b", "--format", "json").stdout)["digest"] == in_two["digest"]
    )
    assert "other" in user.fails("image", "show", "other/a", code=3)


def test_an_unreachable_remote_does_not_let_the_next_one_answer(user: User, disk: Path) -> None:
    user.program = IMPATIENT
    user.types("store", "init")
    user.types("image", "push", disk, "a", "--store", user.home / "last")
    user.types("remote", "add", "gone", "https://127.0.0.1:9/", "--unsigned")
    user.types("remote", "add", "last", user.home / "last")
    user.fails("image", "show", "a", code=8)
    user.types("remote", "rm", "gone")
    user.types("image", "show", "a")


@pytest.mark.parametrize(
    "name",
    ["Debian", "a b", "a:", ":12", "a:b:c", "../etc", "a@b3:xyz", "-a", "local/a:1", "a" * 200, "a\x1b[2J"],
)
def test_a_name_that_breaks_the_grammar_is_refused_before_anything_is_made(
    user: User, disk: Path, name: str
) -> None:
    line = user.fails("image", "push", disk, "--", name, code=2)
    assert line.isprintable()
    assert not user.store.exists()


def test_a_place_that_nobody_knows_is_not_found_and_nothing_is_made(user: User, disk: Path) -> None:
    assert "remote" in user.fails("image", "push", disk, "remote/a:1", code=3)
    assert not user.store.exists()


def test_an_unknown_image_gets_the_nearest_names(user: User, disk: Path) -> None:
    user.types("image", "push", disk, "debian:12")
    for words in (("show",), ("verify",), ("pull", "-o", user.home / "x.qcow2"), ("history",)):
        assert "debian:12" in user.fails("image", *words, "debain:12", code=3)
    assert not (user.home / "x.qcow2").exists()
    user.fails("image", "rm", "debain:12", code=3)


def qcow2_with(change: Callable[[bytearray], None]) -> Callable[[Path, Path], Path]:
    def make(disk: Path, home: Path) -> Path:
        path = convert(disk, home / "bad.qcow2", "qcow2")
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return path

    return make


def put(offset: int, form: str, *values: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, offset, *values)


def text_file(disk: Path, home: Path) -> Path:
    (home / "letter.txt").write_text("Dear reader,\n" * 100)
    return home / "letter.txt"


def empty_file(disk: Path, home: Path) -> Path:
    (home / "empty").touch()
    return home / "empty"


def truncated(disk: Path, home: Path) -> Path:
    path = convert(disk, home / "bad.qcow2", "qcow2")
    os.truncate(path, path.stat().st_size // 2)
    return path


def broken_zlib(disk: Path, home: Path) -> Path:
    with disk.open("r+b") as file:
        file.seek(65536)
        file.write(b"".join(b"%d lines of text\n" % n for n in range(200_000))[: 3 * MIB])
    path = convert(disk, home / "bad.qcow2", "qcow2", "-c")
    data = bytearray(path.read_bytes())
    table = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 40)[0])[0] & ((1 << 56) - 512)
    first = struct.unpack_from(">Q", data, table + 8 * 5)[0]
    assert first >> 62 == 1, "the cluster is not compressed"
    where = first & ((1 << 54) - 1)
    data[where : where + 64] = random.Random(1).randbytes(64)
    path.write_bytes(data)
    return path


def with_backing(disk: Path, home: Path) -> Path:
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "/etc/passwd",
        "-F",
        "raw",
        "-u",
        home / "bad.qcow2",
        "6M",
    ]
    subprocess.run(argv, check=True)
    return home / "bad.qcow2"


def with_data_file(disk: Path, home: Path) -> Path:
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={home}/data",
        home / "bad.qcow2",
        "6M",
    ]
    subprocess.run(argv, check=True)
    return home / "bad.qcow2"


def encrypted(disk: Path, home: Path) -> Path:
    secret = ["--object", "secret,id=s,data=x"]
    option = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", option, home / "bad.qcow2", "6M"]
    # LUKS measures the CPU to choose its iterations, and gives up where the clock is too coarse for that.
    assert any(subprocess.run(argv).returncode == 0 for _ in range(20))
    return home / "bad.qcow2"


def vmdk_of_two_files(disk: Path, home: Path) -> Path:
    text = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    (home / "bad.vmdk").write_text(text + 'RW 8 FLAT "/etc/passwd" 0\n')
    return home / "bad.vmdk"


BAD_FILES = {
    "text": text_file,
    "empty": empty_file,
    "truncated": truncated,
    "broken zlib": broken_zlib,
    "L1 table outside the file": qcow2_with(put(40, ">Q", 1 << 40)),
    "backing file": with_backing,
    "data file": with_data_file,
    "60 PiB": qcow2_with(put(24, ">Q", 60 << 50)),
    "encrypted": encrypted,
    "unknown feature": qcow2_with(put(72, ">Q", 1 << 40)),
    "vmdk that points elsewhere": vmdk_of_two_files,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_gets_one_line_and_leaves_nothing(user: User, disk: Path, kind: str) -> None:
    user.types("image", "push", disk, "good")
    path = BAD_FILES[kind](disk, user.home)
    before, around = user.objects(), set(user.home.iterdir())
    line = user.fails("image", "push", path, "bad", code=2)
    assert path.name in line
    assert user.objects() == before
    assert set(user.home.iterdir()) == around
    assert user.types("image", "ls", "--format", "name").stdout == "good:latest\n"
    user.types("store", "verify", "--full")


def test_what_is_not_there_is_a_usage_error(user: User) -> None:
    assert "nowhere.qcow2" in user.fails("image", "push", user.home / "nowhere.qcow2", "a", code=2)
    assert "/nowhere" in user.fails("image", "ls", "--store", "/nowhere", code=3)
    user.fails("image", "ls", "--store", "ftp://x/y", code=2)
    user.fails("image", "frobnicate", code=2)
    assert "'push'" in user.fails("image", "psuh", code=2)
    assert not (user.home / "state").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs in a namespace of its own")
def test_a_full_disk_during_push_is_said_and_the_store_still_verifies(user: User, tmp_path: Path) -> None:
    large = make_raw(tmp_path / "large.raw", size_bytes=64 * MIB)
    with large.open("r+b") as file:
        file.seek(MIB)
        file.write(random.Random(7).randbytes(40 * MIB))
    small = make_raw(tmp_path / "small.raw", seed=3)
    place = tmp_path / "state"
    place.mkdir()
    script = (
        f"mount -t tmpfs -o size=24m tmpfs {place}; {SF} -q image push {small} small >/dev/null\n"
        f"{SF} image push {large} large -q; echo $?; {SF} store verify --full -q >/dev/null; echo $?\n"
        f"{SF} image ls --format name; find {place} -name '.*' -type f ! -name .lock ! -name .reserve"
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(argv, env=user.environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "6\n0\nsmall:latest\n", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sf: ")


INTERRUPTED = """
import signal, sys, threading
from imagestore.backends.directory import Directory

seen, put = threading.Event(), Directory.put

def interrupt(number, frame):
    seen.set()
    raise KeyboardInterrupt

def held(self, key, *arguments, **options):
    found = put(self, key, *arguments, **options)
    if key.startswith("packs/"):
        print("a pack is there", file=sys.stderr, flush=True)
        seen.wait()
    return found

signal.signal(signal.SIGINT, interrupt)
Directory.put = held
from cli.main import main
main()
"""
"""sf, held behind its first pack until it was interrupted: the push can neither have ended nor not have begun."""


def test_ctrl_c_ends_a_push_with_130_a_word_and_a_store_that_verifies(user: User, tmp_path: Path) -> None:
    """J1."""
    large = make_raw(tmp_path / "large.raw")
    user.types("store", "init")
    argv = [SF.parent / "python", "-c", INTERRUPTED, "image", "push", large, "large"]
    push = subprocess.Popen(
        argv, env=user.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert push.stderr
    while (line := push.stderr.readline()) != "a pack is there\n":
        assert line, "it ended"
    push.send_signal(signal.SIGINT)
    out, err = push.communicate(timeout=60)
    assert push.returncode == 130, err
    assert err.splitlines()[-1].startswith("sf: interrupted")
    assert "Traceback" not in err
    assert out == ""
    user.types("store", "verify", "--full")
    assert user.types("image", "ls", "--format", "name").stdout == ""
    user.types("image", "push", large, "large", "-q")
    user.types("image", "verify", "large")


def test_a_disk_that_a_running_qemu_writes_to_is_refused(user: User, disk: Path) -> None:
    argv = ["qemu-system-x86_64", "-M", "none", "-S", "-display", "none", "-monitor", "none"]
    drive = f"driver=raw,node-name=d,file.driver=file,file.filename={disk}"
    argv += ["-blockdev", drive, "-device", "virtio-blk,drive=d", "-qmp", "stdio"]
    argv[2] = "q35"
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout and qemu.stdout.readline()
        try:
            assert "use" in user.fails("image", "push", disk, "a", code=5)
        finally:
            qemu.kill()
    assert user.types("image", "ls", "--format", "name").stdout == ""


def test_a_flipped_bit_is_found_by_verify_and_never_pulled(user: User, disk: Path) -> None:
    user.types("image", "push", disk, "a")
    pack = next(p for p in (user.store / "packs").rglob("*") if p.is_file())
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 1
    pack.write_bytes(data)
    assert user.types("image", "verify", "a", code=1).stdout
    assert user.types("store", "verify", "--full", code=1).stdout
    user.fails("image", "pull", "a", "-o", user.home / "out.raw", code=1)
    assert not (user.home / "out.raw").exists()


def test_a_damaged_store_is_mended_with_the_file_that_was_pushed_and_by_pushing_it(
    user: User, disk: Path
) -> None:
    """B3, B5."""
    for mend in (
        ("store", "verify", "--full", "--repair-from", disk),
        ("store", "verify", "--full", "--repair", disk),  # as it was called
        ("image", "push", disk, "a"),
    ):
        user.types("image", "push", disk, "a")
        for pack in (user.store / "packs").rglob("*"):
            if pack.is_file():
                pack.write_bytes(bytes(200) + pack.read_bytes()[200:])
        user.types("store", "verify", "--full", code=1)
        user.types(*mend)
        user.types("store", "verify", "--full")
        user.types("image", "pull", "a", "-o", user.home / "out.raw")
        (user.home / "out.raw").unlink()


def test_a_reader_that_goes_away_is_no_error(user: User, disk: Path) -> None:
    user.types("image", "push", disk, "a")
    command = f"{SF} image show a --format json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=user.environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_debug_shows_the_traceback_before_the_line(user: User) -> None:
    done = user.types("--debug", "image", "show", "a", "--store", "/nowhere", code=3)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sf: ")
    done = user.types("image", "show", "a", "--store", "/nowhere", "--debug", code=3)
    assert "Traceback" in done.stderr


def test_completion_scripts_are_the_shells_own(user: User) -> None:
    script = user.types("completion", "bash").stdout
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    complete = {"_SF_COMPLETE": "bash_complete", "COMP_WORDS": "sf image pu", "COMP_CWORD": "2"}
    done = subprocess.run([SF], env=user.environment | complete, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,push", "plain,pull", "plain,publish"]


def test_a_boots_trace_of_this_node_is_kept_beside_the_image(user: User, disk: Path) -> None:
    digest = json.loads(user.types("image", "push", disk, "a", "--format", "json").stdout)["digest"]
    assert "boot" in user.fails("image", "trace", "a", code=3)
    manifest = Store.open(Directory(user.store)).manifest(Digest.parse(digest))
    traces = user.home / "state" / "cache" / "traces"
    traces.mkdir(parents=True)
    (traces / digest[3:]).write_bytes(Trace.of(manifest.ids, [3, 1, 2]).encode())
    assert digest in user.types("image", "trace", "a").stdout
    kept = Directory(user.store).get(TRACES.key(Digest.parse(digest))).data
    assert Trace.decode(kept).chunks(manifest.ids) == [3, 1, 2]
    user.types("store", "verify")


def test_a_store_is_made_once(user: User) -> None:
    first = user.types("store", "init", user.home / "s").stdout
    assert Store.open(Directory(user.home / "s")).info.id in first
    assert "already" in user.fails("store", "init", user.home / "s", code=5)
