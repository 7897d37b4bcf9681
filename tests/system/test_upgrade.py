"""docs/howto/upgrade.md, typed on what version 0.1 left behind; the server is real, its node is played."""

import gzip
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from compute import back_up_state, state_backups
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Stored
from compute.cluster.state.sqlite import SqliteStore
from imagestore import Corrupt
from tests.api_server import Running, running

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests/fixtures/0.1/server"
PAGE = (ROOT / "docs/howto/upgrade.md").read_text()
CHECK, UPGRADE, FROM_0_1, BACK = (b.splitlines() for b in re.findall(r"```sh\n(.*?)```", PAGE, re.S))


class Site:
    """A state directory and whether a server runs on it; what is typed ends up here."""

    def __init__(self, home: Path) -> None:
        self.home, self.place = home, home / "sf"
        shutil.copytree(FIXTURE, self.place)
        packed = self.place / "sf.db.gz"
        (self.place / "sf.db").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
        (home / "backup").mkdir()
        self.runs, self.server = ExitStack(), None

    def type(self, lines: list[str]) -> str:
        said = ""
        for line in lines:
            words = (
                line.replace("/var/lib/sf", str(self.place)).replace("/backup", f"{self.home}/backup").split()
            )
            if words[0] == "systemctl":
                self.runs.close()
                self.server: Running | None = None
                if words[1] == "start":
                    self.server = self.runs.enter_context(running(self.place))
            elif words[0] != "apt":  # the program is this one already
                told = {"SF_STATE_DIR": str(self.place), "SF_CONFIG": "/dev/null", "HOME": str(self.home)}
                told["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
                done = subprocess.run(
                    words, env=told, capture_output=True, text=True, stdin=subprocess.DEVNULL
                )
                # The doctor misses a libvirt and real nodes here.
                assert done.returncode == 0 or words[:2] == ["sf", "doctor"], (line, done.stderr)
                said += done.stdout
        return said

    def records(self, path: Path) -> dict[str, bytes]:
        with closing(sqlite3.connect(path)) as state:
            found = dict(state.execute("select key, value from kv"))
        return {
            key: value for key, value in found.items() if not key.startswith(("alive/", "epoch/", "event/"))
        }


@pytest.fixture
def site(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Site(tmp_path)
    with made.runs:
        yield made


def test_a_state_of_0_1_is_upgraded_as_the_page_says_and_goes_back_as_it_was(site: Site) -> None:
    before = site.records(site.place / "sf.db")
    assert "4 instance (1 to 2); 0.1 reads it" in site.type(FROM_0_1)
    assert site.server
    guests = {guest["name"]: guest for guest in site.server.get("/instances", {"all": True})}
    assert {"web", "broken", "till"} <= guests.keys()
    assert (
        site.server.call("PUT", f"/instances/{guests['web']['uuid']}/metadata/a", {"value": 1}).status == 200
    )
    assert "0.1 does not read it" in site.type(CHECK)
    assert "0.1 reads it" in site.type(BACK[:-1])
    assert site.records(site.home / "backup/sf.db") == site.records(site.place / "sf.db") == before
    site.type(BACK[-1:])
    assert site.server
    again = site.server.get(f"/instances/{guests['web']['uuid']}")
    assert (again["metadata"], again["name"]) == (guests["web"]["metadata"], "web")


def test_a_check_knows_every_form_that_a_record_has_and_refuses_later_ones(tmp_path: Path) -> None:
    kinds = [Stored]
    while more := [below for kind in kinds for below in kind.__subclasses__() if below not in kinds]:
        kinds += more
    (tmp_path / "installation.json").write_text('{"id": "0123abcd"}')
    with closing(SqliteStore(tmp_path / "sf.db")) as store:
        store.commit(
            {
                f"{k.KIND}/x": b'{"schema":%d,"a":1}' % k.SCHEMA
                for k in kinds
                if k.__module__.startswith("compute.") and k.KIND
            },
            expect={},
        )
        back_up_state(tmp_path, f"{tmp_path}/kept")
        (now,) = (made for made, _ in state_backups(f"{tmp_path}/kept"))
        assert (now.trouble, now.upgrade) == ("", "none; 0.1 does not read it")
        later = Instance.SCHEMA + 1
        store.commit({"instance/x": b'{"schema":%d,"a":1}' % later}, expect={})
        with pytest.raises(Corrupt, match=f"a newer version of sf wrote it: instance of form {later}"):
            back_up_state(tmp_path, f"{tmp_path}/again")
