"""What the documents show works, and what they are made from has not moved on without them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_example_of_the_library_runs_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "docs/howto/library.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "file:///tmp/images" in code
    code = code.replace("file:///tmp/images", (tmp_path / "images").as_uri())
    environment = {"PYTHONPATH": str(ROOT), "SF_CACHE_DIR": str(tmp_path / "cache"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "is example:1" in done.stdout
    assert "not found" in done.stdout or "no image" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_links_only_to_files_that_are_there(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_modules_that_are_there(document: Path) -> None:
    named = re.findall(
        r"`((?:imagestore|compute|net|cli|scripts|tests)/[\w/.*-]+\.py)`", document.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_commands_that_there_are(document: Path) -> None:
    there = set(re.findall(r"^### sf (\S+ \S+)$", (ROOT / "docs/reference/commands.md").read_text(), re.M))
    groups = "|".join({name.split()[0] for name in there})
    named = re.findall(rf"\bsf ((?:{groups}) [a-z][a-z-]+)", document.read_text())
    assert [name for name in named if name not in there] == []


def test_the_answers_name_only_commands_and_options_that_there_are() -> None:
    from cli.main import sf

    named = re.findall(r"`(sf [a-z][^`]*)`", (ROOT / "docs/faq.md").read_text())
    assert len(named) > 20
    with click.Context(sf) as top:
        for line in named:
            words, command = line.replace("\n", " ").split()[1:], sf.get_command(top, line.split()[1])
            while isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("-"):
                words = words[1:]
                command = command.get_command(top, words[0])
            assert command is not None, line
            known = {option for one in command.params for option in one.opts}
            assert {word for word in words if word.startswith("-")} <= known, line


def test_the_table_of_who_can_do_what_names_tests_that_are_there() -> None:
    """J: every row of SECURITY.md has a test, and every test that it names exists."""
    text = (ROOT / "SECURITY.md").read_text()
    sections = re.split(r"^### ", text, flags=re.M)[1:]
    assert [section.split("\n")[0] for section in sections] == [
        *("A tenant", "A trusted tenant", "A guest", "A joined node", "A remote or upstream"),
        *("A mirror's client", "A local user", "A host on the underlay"),
    ]
    rows = [line for section in sections for line in section.splitlines() if line.startswith("| ")]
    for row in (row for row in rows if not row.startswith("| wants to")):
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.rpartition(" | ")[2])
        assert named, row
        for path, name in named:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path}::{name}"


def test_the_reference_is_what_the_code_says() -> None:
    argv = [sys.executable, ROOT / "scripts/reference.py", "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout
