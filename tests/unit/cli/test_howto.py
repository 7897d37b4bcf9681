"""What docs/howto and the README tell people to type exists."""

import re
import shlex
from pathlib import Path

import click
import pytest

from cli.main import sf

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]


def lines() -> list[tuple[str, str]]:
    blocks = [
        (p, block) for p in PAGES for block in re.findall(r"^```sh\n(.*?)^```", p.read_text(), re.M | re.S)
    ]
    found = [(path.name, line) for path, block in blocks for line in block.splitlines()]
    return [(name, line) for name, line in found if line.startswith("sf ")]


@pytest.mark.parametrize(("page", "line"), lines())
def test_a_command_of_the_documentation_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index("|")] if "|" in words else words
    command: click.Command = sf
    context = click.Context(sf)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found, f"{page}: {line}"
        command, words = found, words[1:]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[: words.index("--")] if "--" in words else words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{page}: {word} in {line}"
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    plain = len([word for word in words if not word.startswith("-")])
    assert plain >= sum(p.required for p in arguments), f"{page}: {line}"
