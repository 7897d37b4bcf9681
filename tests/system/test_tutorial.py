"""The README's tutorial, command by command as it stands there, on a machine of its own."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import drills

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from private_libvirtd import PrivateHost  # noqa: E402

pytestmark = pytest.mark.system


def tutorial() -> list[str]:
    text = (ROOT / "README.md").read_text().split("## Tutorial")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


class Reader:
    """Somebody who types what the README says, in a directory of their own, and looks at what comes."""

    def __init__(self, host: PrivateHost, home: Path) -> None:
        self._host, self._home = host, home
        self.seen: dict[str, str] = {}
        self._serve: subprocess.Popen[bytes] | None = None

    def _argv(self, line: str) -> list[str]:
        path = f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin"
        variables = {
            "PATH": path,
            "HOME": str(self._home),
            "SF_STATE_DIR": str(self._home / "sf"),
            "NO_COLOR": "1",
        }
        variables["XDG_CONFIG_HOME"] = str(self._home / ".config")
        words = [f"{name}={value}" for name, value in variables.items()]
        return self._host.inside(["env", *words, "bash", "-c", f"cd {self._home} && {line}"])

    def type(self, line: str) -> None:
        if line.startswith("scripts/build-image"):
            return  # needs the network that this machine of its own has not; done beforehand
        if line == "sf serve":
            with (self._home / "serve.log").open("wb") as log:
                self._serve = subprocess.Popen(
                    self._argv("exec sf serve"), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self._wait_until_it_answers()
            return
        command = f"timeout -s INT 6 {line} || [ $? = 124 -o $? = 130 ]" if line.endswith(" -f") else line
        done = subprocess.run(
            self._argv(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        self.seen[line] = done.stdout
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}\n{self.server_said()}"

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + 60
        while subprocess.run(self._argv("sf network ls"), capture_output=True).returncode != 0:
            assert time.monotonic() < end, self.server_said()
            time.sleep(0.2)

    def server_said(self) -> str:
        return (self._home / "serve.log").read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        if self._serve is not None:
            self._serve.terminate()
            self._serve.wait(30)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    key = tmp_path / ".ssh/id_ed25519"
    key.parent.mkdir(mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with PrivateHost() as host:
        # ssh asks the password database for the home directory, not $HOME.
        there = Path("~root/.ssh").expanduser()
        made = not there.exists()
        there.mkdir(mode=0o700, parents=True, exist_ok=True)
        host.run(["mount", "--bind", str(key.parent), str(there)])
        person = Reader(host, tmp_path)
        try:
            yield person
        finally:
            person.stop()
            if made:
                host.run(["umount", str(there)])
                there.rmdir()


@pytest.mark.timeout(1200)
def test_every_command_of_the_readmes_tutorial_works_as_it_stands_there(
    reader: Reader, tmp_path: Path, tiny_image: Path
) -> None:
    image = tmp_path / "debian-12.qcow2"
    if drills.everything():  # the real one: built in a minute, boots in two
        subprocess.run([ROOT / "scripts/build-image", "debian-12", "-o", image], check=True, timeout=900)
    else:
        shutil.copyfile(tiny_image, image)
    lines = tutorial()
    assert len(lines) >= 15
    for line in lines:
        reader.type(line)
    shown = reader.seen["sf image show debian:12"]
    assert re.search(r"b3:[0-9a-f]{64}", shown)
    compared = subprocess.run(
        ["qemu-img", "compare", image, tmp_path / "copy.qcow2"], capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout
    assert re.search(r"\b10\.42\.0\.\d+\b", reader.seen["sf instance ls"])
    if not drills.everything():
        assert re.search(r"SF-GUEST-READY \S+ web 10\.42\.0\.\d+", reader.seen["sf instance console web"])
