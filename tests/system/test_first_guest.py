"""The first command of a fresh installation: a guest of a name that only a source list knows, then one of a URL."""

import contextlib
import lzma
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.system.machine import Machine, within
from tests.system.test_agent_drills import remove_everything
from tests.system.test_images_on_demand import listing

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
PORT = 23456


def typed(machine: Machine, answer: bytes, *words: str) -> tuple[int, str]:
    """A command at a terminal, with what is typed there."""
    parent, child = pty.openpty()
    running = subprocess.Popen(machine.argv("sf", *words), stdin=child, stdout=child, stderr=child)
    os.close(child)
    os.write(parent, answer)
    seen = b""
    with contextlib.suppress(OSError):  # it has ended
        while part := os.read(parent, 65536):
            seen += part
    os.close(parent)
    return running.wait(300), seen.decode(errors="replace")


def test_the_first_command_of_a_fresh_installation_is_a_guest(tmp_path: Path, tiny_image: Path) -> None:
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    lists = listing(upstream, f"http://127.0.0.1:{PORT}", tiny_image.read_bytes(), "qcow2")
    with (upstream / "tiny.img.xz").open("wb") as file:
        file.write(lzma.compress(tiny_image.read_bytes(), preset=0))
    with PrivateHost() as host:
        machine = Machine(host, tmp_path, SF_ACCEL="tcg", SF_SOURCES=str(lists))
        words = ["-m", "http.server", str(PORT), "--bind", "127.0.0.1", "--directory", str(upstream)]
        stand_in = subprocess.Popen(
            machine.argv("setsid", "-w", sys.executable, *words), stderr=subprocess.DEVNULL
        )
        machine.start()
        try:
            create = ("instance", "create", "web", "--image", "debian:12", "--memory", "128")
            refused = machine.sf(*create, check=False)
            assert refused.returncode == 3 and "--sync fetches it from 127.0.0.1" in refused.stderr
            code, said = typed(machine, b"n\n", *create)
            assert (
                code == 130 and "fetch it from 127.0.0.1?" in said and machine.listed("instance", "ls") == []
            )
            code, said = typed(machine, b"y\n", *create, "--wait", "boot")
            assert code == 0 and machine.ready_line("web"), said
            assert machine.listed("image", "show", "debian:12")["os"] == ""
            assert machine.sf("image", "show", "debian:bookworm").returncode == 0
            # A server that is killed while it fetches goes on with it.
            url = f"http://127.0.0.1:{PORT}/tiny.img.xz"
            machine.sf("instance", "create", "y", "--image", url, "--memory", "128")
            machine.signal()
            machine.start()
            within(120, lambda: machine.ready_line("y"), "the guest of a URL is ready")
            assert machine.instance("y")["disks"][0]["base"] == url
            remove_everything(machine)
        finally:
            machine.signal()
            stand_in.terminate()
            stand_in.wait(10)
