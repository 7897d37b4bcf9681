"""Errors are one line with a cause, a hint and an exit code."""

import errno
import subprocess
import sys

import click
import pytest

import imagestore.errors
import net.errors
from cli.errors import Problem, clean, exit_code, one_line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (imagestore.errors.NotFound("x"), 3),
        (imagestore.errors.Conflict("x"), 5),
        (imagestore.errors.Invalid("x"), 2),
        (imagestore.errors.Corrupt("x"), 1),
        (imagestore.errors.Unavailable("x"), 8),
        (imagestore.errors.Denied("x"), 4),
        (imagestore.errors.NoSpace("x"), 6),
        (imagestore.errors.Unsupported("x"), 1),
        (net.errors.Exhausted("x"), 6),
        (OSError(errno.ENOSPC, "No space left on device"), 6),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 8),
        (TimeoutError("slow"), 7),
        (click.UsageError("x"), 2),
        (Problem("x", code=130), 130),
        (ValueError("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_a_subclass_has_the_code_of_its_class() -> None:
    class Elsewhere(imagestore.errors.NotFound):
        pass

    assert exit_code(Elsewhere("x")) == 3


def test_the_line_has_cause_hint_and_request_id() -> None:
    error = Problem("no room.", hint="delete something", request_id="r-1")
    assert one_line(error) == "no room (delete something) [request r-1]"


def test_a_foreign_error_is_named_by_its_class() -> None:
    assert one_line(KeyError("digest")) == "KeyError: 'digest'"


def test_an_os_error_says_which_file() -> None:
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file", "/x")) == "/x: No such file"


def test_nothing_in_a_message_reaches_the_terminal_as_an_escape() -> None:
    line = one_line(imagestore.errors.NotFound("a\x1b]0;owned\x07b\nc\u202ed\x9b31m"))
    assert line.isprintable()
    assert "\n" not in line
    assert clean("plain ü ✓") == "plain ü ✓"


@pytest.mark.parametrize("module", ["cli.main", "cli.operate.serve"])
def test_what_is_logged_is_one_line_and_commands_no_terminal(module: str) -> None:
    said = "logging.getLogger('imagestore.x').warning('%s is late', 'evil\\x1b[2J\\nsf: all is well')"
    program = (
        f"import logging, click, {module} as m\nwith click.Context(click.Command('x')): m._log(); {said}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("evil [2J sf: all is well is late\n")
