"""What is published for everybody holds nothing of who it was: a real ext4 disk, searched byte by byte."""

import os
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

from imagestore.errors import Invalid
from imagestore.mirror.cleaning import check_recipe, clean
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.open import open_store
from tests.machines import SF

SECRET = {
    "etc/machine-id": "0123456789abcdef0123456789abcdef",
    "etc/ssh/ssh_host_ed25519_key": "THE-HOST-KEY-7f3a",
    "var/log/syslog": "A-LINE-OF-THE-LOG-91c2",
    "var/log/journal/0123456789abcdef0123456789abcdef/system.journal": "A-JOURNAL-ENTRY-55aa",
    "root/.ssh/authorized_keys": "SOMEBODYS-KEY-aa31",
    "root/.bash_history": "A-COMMAND-THEY-RAN-c0de",
    "var/lib/cloud/data/instance-id": "THE-INSTANCE-ID-bead",
    "var/lib/cloud/instances/6b1f9d1e-7a77/user-data.txt": "THE-USER-DATA-4242",
    "etc/systemd/network/10-cloud-init-eth0.network": "THE-MAC-ADDRESS-0202",
    "var/cache/apt/pkgcache.bin": "WHAT-APT-REMEMBERS-77aa",
    "var/tmp/left": "LEFT-IN-TMP-d00d",
}
KEPT = {
    "etc/ssh/sshd_config": "THE-CONFIGURATION",
    "usr/bin/tool": "THE-PROGRAM",
    "var/lib/app/data": "THE-DATA",
}
DELETED, OLD_NAME = "WHAT-WAS-DELETED-4e4e", "the-deleted-files-name"
START = 1 << 20


def make(path: Path, *options: str, more: dict[str, str] | None = None) -> Path:
    """A disk with an MBR and one partition; a file was deleted on it, with a name that its directory remembers."""
    root = path.with_suffix(".tree")
    for name, text in (SECRET | KEPT | {f"var/lib/app/{OLD_NAME}": DELETED} | (more or {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((text + "\n") * 200)
    with path.open("wb") as file:
        file.truncate(START + (64 << 20))
        file.seek(446)
        file.write(
            bytes([0, 0, 0, 0, 0x83, 0, 0, 0])
            + (START // 512).to_bytes(4, "little")
            + (64 << 11).to_bytes(4, "little")
        )
        file.seek(510)
        file.write(b"\x55\xaa")
    part = path.with_suffix(".part")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", *options, "-d", root, part, "64M"], check=True)
    subprocess.run(
        ["debugfs", "-w", "-R", f"rm /var/lib/app/{OLD_NAME}", part], check=True, capture_output=True
    )
    with path.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())
    data = path.read_bytes()
    assert all(
        text.encode() in data for text in [*SECRET.values(), DELETED, OLD_NAME]
    )  # else it proves nothing
    return path


def test_a_published_image_holds_no_identity_key_log_or_deleted_file_of_its_source(tmp_path: Path) -> None:
    store, shared = tmp_path / "own", tmp_path / "images"
    own = open_store(store.as_uri(), create=True, private=True)
    push(own, make(tmp_path / "disk.raw"), "web", "1", format_="raw", cache=tmp_path / "hints")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SF_STATE_DIR": str(tmp_path / "none")}
    environment |= {"SF_CONFIG": str(tmp_path / "config.toml"), "SF_CACHE_DIR": str(tmp_path / "hints")}
    (tmp_path / "config.toml").write_text(f'store = "{shared}"\n[remotes.own]\nurl = "{store}"\n')
    argv = [SF, "image", "publish", "own/web:1", "golden:3"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"to file://{shared}" in done.stderr and "files are not in it, such as /" in done.stderr
    public = open_store(shared.as_uri())
    digest = public.names.get("golden", "3").digest(os.uname().machine)
    manifest = public.manifest(digest)
    assert (manifest.parent, dict(manifest.labels)) == (None, {})
    pull(public, digest, tmp_path / "out.raw", format_="raw", durable=False)
    data = (tmp_path / "out.raw").read_bytes()
    for text in [*SECRET.values(), DELETED, OLD_NAME, "6b1f9d1e-7a77"]:
        assert text.encode() not in data, text
    for text in KEPT.values():
        assert text.encode() in data
    part = f"{tmp_path / 'out.raw'}?offset={START}"
    assert subprocess.run(["e2fsck", "-fn", part], capture_output=True).returncode == 0
    shown = subprocess.run(["debugfs", "-R", "ls -p /etc", part], capture_output=True, text=True).stdout
    assert any(
        line.split("/")[2:6:3] == ["100444", "machine-id"] and line.endswith("/0/")
        for line in shown.splitlines()
    )
    private = subprocess.run(
        [*argv[:-1], "own2:1", "--store", str(store)], env=environment, capture_output=True, text=True
    )
    assert private.returncode == 4 and "private" in private.stderr


def test_what_cannot_be_cleaned_for_certain_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "xfs.raw"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        file.write(b"XFSB")
    with pytest.raises(Invalid, match="cleaned"):
        clean(raw)
    odd = make(tmp_path / "odd.raw")
    name = tmp_path / "a name"
    name.write_text("x")
    part = f"{odd}?offset={START}"
    commands = tmp_path / "commands"
    commands.write_text(f'cd /var/log\nwrite "{name}" "x;rm etc"\n')
    subprocess.run(["debugfs", "-w", "-f", commands, part], check=True, capture_output=True)
    with pytest.raises(Invalid, match="names that are none"):
        clean(odd)
    for text in ("two\nlines", "two\rlines"):
        lines = make(tmp_path / "lines.raw", more={f"var/log/{text}": "A-LINE-THAT-STAYED"})
        with pytest.raises(Invalid, match="names that are none"):
            clean(lines)
    foreign = make(tmp_path / "foreign.raw", more={os.fsdecode(b"etc/caf\xe9"): "A-FILE"})
    assert "/etc/machine-id" in clean(foreign)
    inline = make(tmp_path / "inline.raw", "-O", "inline_data", "-I", "256")
    with pytest.raises(Invalid, match="inline_data"):
        clean(inline)
    broken = make(tmp_path / "broken.raw")
    with broken.open("r+b") as file:
        file.seek(START + 1024)
        file.write(bytes(64))
    with pytest.raises(Invalid):
        clean(broken)


def test_a_recipe_that_failed_is_found_on_the_disk_that_it_made(tmp_path: Path) -> None:
    for number, (text, says) in enumerate(
        (
            ('{"v1": {"datasource": "x", "errors": []}}', ""),
            (
                '{"v1": {"errors": ["(\'scripts-user\', RuntimeError())"]}}',
                "the recipe failed: .'scripts-user'",
            ),
            ('{"v1": 3}', "is not cloud-init's"),
            ("[" * 100_000, "is not cloud-init's"),
            ("[]", "is not cloud-init's"),
        )
    ):
        disk = tmp_path / f"{number}.raw"
        result = disk.with_suffix(".tree") / "var/lib/cloud/data/result.json"
        result.parent.mkdir(parents=True)
        result.write_text(text)
        make(disk)
        with pytest.raises(Invalid, match=says) if says else nullcontext():
            check_recipe(disk)
    check_recipe(make(tmp_path / "without.raw"))
