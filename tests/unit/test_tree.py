"""What is shipped beside the code: it loads, and it names things that are there."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "mirror-config").rglob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_systemd_unit_runs_a_command_that_sf_has(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    assert parser["Unit"]["Description"]
    words = parser["Service"]["ExecStart"].split()
    assert words[0].endswith("/sf")
    subcommands = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
    done = subprocess.run([ROOT / ".venv/bin/sf", *subcommands, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["demo", "test", "check", "setup", "bench"])
def test_the_shell_scripts_parse(script: str) -> None:
    text = (ROOT / "scripts" / script).read_text()
    shell = "bash" if "bash" in text.splitlines()[0] else "sh"
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
