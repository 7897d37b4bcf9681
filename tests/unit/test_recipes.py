"""The recipes that are given away: what they put into a guest is at least something that its interpreter takes."""

import ast
import re
import subprocess
import textwrap
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "contrib/renew/debian.yaml"
_FILE = re.compile(r"^- path: (\S+)\n(?:  permissions: .*\n)?  content: \|\n((?:    .*\n|\n)+)", re.MULTILINE)


def test_what_debian_is_given_is_a_script_and_a_program() -> None:
    files = {path: textwrap.dedent(text) for path, text in _FILE.findall(RECIPE.read_text())}
    ast.parse(files["/etc/sf/renewer"], feature_version=(3, 11))
    subprocess.run(["sh", "-n"], input=files["/etc/sf/renew"], check=True, text=True)
    assert "/etc/sf/renewer" in files["/etc/sf/renew"] and len(files) == 4
