"""What is shipped beside the code: it loads, and it names things that are there."""

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "debian").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_systemd_unit_runs_a_command_that_sf_has(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    assert parser["Unit"]["Description"]
    if "ExecStop" in parser["Service"]:
        assert (ROOT / "debian" / Path(parser["Service"]["ExecStop"]).name).exists()
        return
    words = parser["Service"]["ExecStart"].split()
    assert words[0].endswith("/sf")
    subcommands = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
    done = subprocess.run([ROOT / ".venv/bin/sf", *subcommands, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_systemd_finds_no_fault_with_any_unit(tmp_path: Path) -> None:
    units = [*UNITS, *(ROOT / "debian").glob("*.timer")]
    for unit in units:
        text = re.sub(r"/usr/(bin/sf|lib/sf/sf-guests)\b", "/bin/true", unit.read_text())
        (tmp_path / unit.name.partition(".")[2]).write_text(text)
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *tmp_path.iterdir()]
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    timers = {path.stem for path in tmp_path.glob("*.timer")}
    assert timers and timers <= {path.stem for path in tmp_path.glob("*.service")}


@pytest.mark.parametrize("script", sorted((ROOT / "debian").glob("*.p*")), ids=lambda path: path.name)
def test_the_packages_scripts_parse_and_end_at_their_first_error(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/bin/sh\nset -e\n") and "#DEBHELPER#" in text
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0


def test_there_is_a_man_page_for_every_noun_and_nothing_in_it_is_taken_for_a_request(tmp_path: Path) -> None:
    subprocess.run([ROOT / ".venv/bin/python", ROOT / "scripts/manpages.py", tmp_path], check=True)
    pages = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {"sf.1", "sf-image.1", "sf-instance.1", "sf-serve.1"} <= set(pages)
    requests = {line.split()[0] for text in pages.values() for line in text.splitlines() if line[:1] in ".'"}
    assert requests <= {".TH", ".SH", ".SS", ".PP", ".TP", ".nf", ".fi", ".RS", ".RE"}
    assert "sf instance create web" in pages["sf-instance.1"]


@pytest.mark.parametrize("script", ["demo", "package", "test", "check", "setup", "bench"])
def test_the_shell_scripts_parse(script: str) -> None:
    text = (ROOT / "scripts" / script).read_text()
    shell = "bash" if "bash" in text.splitlines()[0] else "sh"
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
