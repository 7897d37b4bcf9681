"""Help is quick and complete."""

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from cli.command import Command
from cli.main import MEMBERS, sf

HEAVY = {
    "numpy",
    "boto3",
    "httpx",
    "rich",
    "blake3",
    "zstandard",
    "fastapi",
    "pydantic",
    "libvirt",
    "pyroute2",
}
HEAVY |= {"cryptography", "oslo_utils", "http", "ssl", "asyncio", "imagestore", "compute", "net"}
FACES = {"imagestore", "imagestore.mirror", "compute"}
"""Whose names are loaded when they are used: they cost nothing."""


def commands(group: click.Command, path: str = "sf") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(group, click.Group):
        yield path, group
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        member = group.get_command(context, name)
        assert member
        yield from commands(member, f"{path} {name}")


EVERY = dict(commands(sf))


def imported(arguments: list[str]) -> set[str]:
    # Help may stand on stderr before it.
    say = "print('\\f', *sys.modules, file=sys.stderr)"
    code = f"import sys; from cli.main import main\ntry: main()\nexcept SystemExit: {say}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    return set(done.stderr.rpartition("\f")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["image"], ["completion", "bash"]])
def test_help_imports_neither_heavy_libraries_nor_the_product(arguments: list[str]) -> None:
    found = imported(arguments)
    assert "cli.main" in found
    assert not {name.partition(".")[0] for name in found - FACES} & HEAVY
    assert len(found) < 250


def test_the_groups_text_in_the_list_is_the_groups_own() -> None:
    for name, (_, text) in MEMBERS.items():
        member = sf.get_command(click.Context(sf), name)
        assert member
        assert (member.help or "").partition("\n")[0].startswith(text.rstrip(".")), name


@pytest.mark.parametrize("path", EVERY)
def test_every_command_has_a_text_and_examples_of_itself(path: str) -> None:
    command = EVERY[path]
    assert isinstance(command, Command)
    assert command.help
    assert command.examples
    for example in command.examples.splitlines():
        assert path in example


@pytest.mark.parametrize(
    "path", [p for p in EVERY if p.split()[-1] in ("ls", "show", "history", "events", "stats")]
)
def test_every_list_and_show_takes_a_format(path: str) -> None:
    assert any(parameter.name == "form" for parameter in EVERY[path].params)


@pytest.mark.parametrize("path", EVERY)
def test_every_parameter_of_a_command_reaches_its_function(path: str) -> None:
    command = EVERY[path]
    names = [parameter.name for parameter in command.params]
    assert len(names) == len(set(names))
