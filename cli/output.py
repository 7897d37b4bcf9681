"""Results on standard output, progress on standard error."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click

import imagestore
from cli.command import flag
from cli.errors import clean

Row = Mapping[str, Any]
Column = tuple[str, str | Callable[[Any], object]]
"""A heading, and the key in the row (or a function of the row)."""

_DIGEST = re.compile(r"\b(b3:[0-9a-f]{16})[0-9a-f]{48}\b")
_STYLES = {"created": "green", "on": "green", "error": "bold red", "crashed": "bold red", "off": "dim"}


def show_list(rows: Iterable[Row], columns: Sequence[Column], form: str, *, name: str = "name") -> None:
    """Print a list: a table for people, JSON as it came, or one name per line."""
    rows = list(rows)
    if len({row.get("namespace") for row in rows}) > 1:
        columns = [columns[0], ("namespace", "namespace"), *columns[1:]]
    if form == "json":
        print(json.dumps(rows, indent=2, default=str))
    elif form == "name":
        print("".join(f"{clean(row[name])}\n" for row in rows), end="")
    else:
        _table([title for title, _ in columns], [[_cell(row, key) for _, key in columns] for row in rows])


def show_one(row: Row, columns: Sequence[Column], form: str, *, name: str = "name") -> None:
    """Print one object: its fields below each other, JSON, or its name."""
    if form == "json":
        print(json.dumps(row, indent=2, default=str))
        return
    if form == "name":
        print(clean(row[name]))
        return
    cells = {clean(title): text for title, key in columns if (text := _cell(row, key))}
    width = max(map(len, cells), default=0)
    bold = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for title, text in cells.items():
        print(f"{bold[0]}{title:<{width}}{bold[1]}  " + text.replace("\n", "\n" + " " * (width + 2)))


def _cell(row: Row, key: str | Callable[[Any], object]) -> str:
    value = row.get(key) if isinstance(key, str) else key(row)
    many = value if isinstance(value, list | tuple) else [value]
    return "\n".join(clean(v) for v in many if v is not None)


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Drawn by rich on a terminal; anywhere else plain text in columns. Only digests are cut, and only there."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for number, title in enumerate(titles):
            table.add_column(title, overflow="fold", no_wrap=number == 0)
        for row in cells:
            short = (_DIGEST.sub(r"\1", cell) for cell in row)
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in short))
        Console(highlight=False).print(table)
        return
    lines = [[title.upper() for title in titles], *([c.replace("\n", ",") for c in row] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def size(value: float | None) -> str:
    """Bytes for people; "" if unknown."""
    return "" if value is None else imagestore.size_text(value)


def when(timestamp_s: object) -> str:
    """Seconds since the epoch as local time; what is no number as it is."""
    if not isinstance(timestamp_s, int | float) or not timestamp_s:
        return clean(timestamp_s or "")
    return datetime.fromtimestamp(timestamp_s).strftime("%Y-%m-%d %H:%M:%S")


def ago(timestamp_s: object) -> str:
    """How long ago that was, in one unit; what is no number as it is."""
    if not isinstance(timestamp_s, int | float) or not timestamp_s:
        return clean(timestamp_s or "")
    return f"{_span(time.time() - timestamp_s)} ago"


def left(timestamp_s: float | None) -> str:
    """How long it is until then, in one unit; "" for never."""
    return f"in {_span(timestamp_s - time.time())}" if timestamp_s else ""


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def confirm(question: str, force: bool) -> None:
    """Ask the person at the terminal before something is destroyed; nobody there means yes. Raises click.Abort."""
    if sys.stdin.isatty() and not force:
        click.confirm(question, abort=True, err=True)


def live() -> bool:
    """Whether progress may redraw its line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """One line for the person who waits."""
    if not flag("quiet"):
        print(clean(text), file=sys.stderr, flush=True)


@contextmanager
def status() -> Iterator[Callable[..., None]]:
    """What is going on, in words: one live line on a terminal, a line per change elsewhere.

    A second text is a detail that comes and goes: for the live line alone.
    """
    last = [""]
    if live() and not flag("quiet"):
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status("") as shown:
            one: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
            yield lambda text, more="": shown.update(Text(clean(f"{text}  {more}"), **one))
        return

    def line(text: str, more: str = "") -> None:
        if last != [text]:
            last[:] = [text]
            say(text)

    yield line


@contextmanager
def progress(what: str) -> Iterator["imagestore.Report"]:
    """A bar on a terminal, a plain line every few seconds elsewhere, nothing with -q."""
    if flag("quiet"):
        yield lambda _: None
    elif live():
        yield from _bar(what)
    else:
        yield _lines(what)


def _detail(p: "imagestore.Progress") -> str:
    parts = ((p.new_bytes, "new"), (p.known_bytes, "already there"), (p.written_bytes, "written"))
    return ", ".join(f"{count / 2**20:.0f} MiB {word}" for count, word in parts if count)


def _bar(what: str) -> Iterator["imagestore.Report"]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # 80 columns hold what, bar, sizes and time; what else there is to say is cut before any of these.
    what_column = Column(no_wrap=True, overflow="ellipsis", max_width=24)
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=what_column),
        BarColumn(12, table_column=Column(min_width=12)),
        DownloadColumn(True, table_column=Column(no_wrap=True, min_width=17)),
        TimeRemainingColumn(True, table_column=Column(no_wrap=True, min_width=5)),
        TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
    )
    with Bar(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(what, total=None, detail="")
        yield lambda p: bar.update(
            task,
            description=f"{clean(p.stage)} {what}",
            total=p.total_bytes or None,
            completed=p.done_bytes,
            detail=_detail(p),
        )


def _lines(what: str, every_s: float = 5.0) -> "imagestore.Report":
    last: dict[str, float] = {}  # the stage that was printed last, and when

    def tell(p: "imagestore.Progress") -> None:
        if time.monotonic() - last.get(p.stage, -every_s) < every_s:
            return
        last.clear()
        last[p.stage] = time.monotonic()
        share = f" {100 * p.done_bytes // p.total_bytes}%" if p.total_bytes else ""
        say(f"{p.stage} {what}{share} {_detail(p)}")

    return tell
