"""Results go to standard output in the form asked for; progress goes to standard error."""

import io
import json
import re
from types import SimpleNamespace

import click
import pytest

from cli.cloud.console import emit
from cli.cloud.create import gigabytes
from cli.command import GIBIBYTES
from cli.errors import Problem
from cli.main import sf
from cli.output import progress, show_list, show_one, size, status, when

ROWS = [{"name": "a", "size": 1536, "tags": ["x", "y"]}, {"name": "evil\x1b[2J", "size": None, "tags": []}]
COLUMNS = (("name", "name"), ("size", lambda r: size(r["size"])), ("tags", "tags"))


def test_a_table_without_a_terminal_is_plain_whole_and_safe(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(ROWS, COLUMNS, "table")
    assert capsys.readouterr().out == "NAME      SIZE     TAGS\na         1.5 KiB  x,y\nevil [2J\n"


def test_json_is_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(ROWS, COLUMNS, "json")
    assert json.loads(capsys.readouterr().out) == ROWS
    show_one(ROWS[0], COLUMNS, "json")
    assert json.loads(capsys.readouterr().out) == ROWS[0]


def test_name_prints_one_name_per_line_and_nothing_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(ROWS, COLUMNS, "name")
    assert capsys.readouterr().out == "a\nevil [2J\n"
    show_list([], COLUMNS, "name")
    assert capsys.readouterr().out == ""


def test_one_object_shows_its_fields_and_leaves_out_the_empty(capsys: pytest.CaptureFixture[str]) -> None:
    show_one(ROWS[0] | {"note": ""}, (*COLUMNS, ("note", "note")), "table")
    assert capsys.readouterr().out == "name  a\nsize  1.5 KiB\ntags  x\n      y\n"
    show_one({"\x1b[2J": 1}, (("\x1b[2J", "\x1b[2J"),), "table")
    assert capsys.readouterr().out == "[2J  1\n"


def test_progress_without_a_terminal_is_a_line_per_stage_and_silent_when_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(stage: str, done: int) -> SimpleNamespace:
        return SimpleNamespace(
            stage=stage, done_bytes=done, total_bytes=4096, new_bytes=2 << 20, known_bytes=0, written_bytes=0
        )

    for flags, wanted in (
        ({}, "read a 0% 2 MiB new\nend a 100% 2 MiB new\n"),
        ({"quiet": "y"}, ""),
    ):
        with click.Context(sf, obj=flags), progress("a") as tell:
            for now in (step("read", 0), step("read", 1), step("end", 4096)):
                tell(now)  # type: ignore[arg-type]
        assert capsys.readouterr() == ("", wanted)


def test_status_without_a_terminal_is_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(sf, obj={}), status() as tell:
        for text in ("a", "a", "b"):
            tell(text)
    assert capsys.readouterr().err == "a\nb\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**31, "2.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_sizes_are_in_powers_of_two(value: int, text: str) -> None:
    assert size(value) == text


def test_a_time_that_is_no_number_stays() -> None:
    assert (when("yesterday"), when(None), when(0)) == ("yesterday", "", "")


def test_disk_sizes_are_wholegigabytes() -> None:
    assert [gigabytes(GIBIBYTES.convert(t, None, None)) for t in ("8", "8G", "8GiB", "2T")] == [
        8,
        8,
        8,
        2048,
    ]
    for text in ("", "0", "-1", "1.5G", "8M", "G"):
        with pytest.raises((Problem, click.BadParameter)):
            gigabytes(GIBIBYTES.convert(text, None, None))


@pytest.mark.parametrize("chunks", [1, 5, 1000])
def test_nothing_that_a_guest_writes_commands_the_terminal(
    monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    evil = (
        b"\x1b[2J\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;ZXZpbA==\x1b\\ \x1bP$q\x1b\\ \x1b"
        b"c \xc2\x9b2J \xc2\x9d0;t\x07 \x9b31m \x0e\x07\x00\x7f caf\xc3\xa9\r\n\x1b["
    )
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    size = -(-len(evil) // chunks)  # at last byte by byte
    for at in range(0, len(evil), size):
        emit(evil[at : at + size], out)
    written = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"red" in written and b"caf\xc3\xa9\r\n" in written
    assert not re.search(r"[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]", written.decode())
