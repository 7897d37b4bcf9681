"""`sf run`: a guest for one command, which holds it by a lease: who is killed in whatever way leaves nothing."""

import base64
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from cli.cloud import inside
from cli.cloud.api import Api, Object
from cli.cloud.console import answers, emit, read
from cli.cloud.create import asked, guest, wait
from cli.command import API, DURATION, Command, settings
from cli.errors import USAGE, Problem
from cli.output import say

_LEASE_S, _CONSOLES, _TAIL = 60, 32, 15
_AGENT = b"""#!/bin/sh
# The agent that runs commands, where an image has none.
command -v qemu-ga >/dev/null && exit
{ apt-get update && apt-get install -y qemu-guest-agent || dnf install -y qemu-guest-agent; } &&
systemctl start qemu-guest-agent
"""
_COMMAND = """command -v cloud-init >/dev/null && cloud-init status --wait >/dev/null 2>&1
cd "$1" && shift && exec "$@"
"""


@contextmanager
def held(api: Api, name: str, given: Object, **more: Any) -> Iterator[str]:
    """The uuid of a guest of these options that is there until the block ends, or this command in whatever way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    keep, over, again = given.get("keep"), threading.Event(), Api()
    uuid = asked(api, name, given, lease=None if keep else _LEASE_S, **more)["uuid"]

    def renew() -> None:
        while not over.wait(_LEASE_S / 4):
            with suppress(Problem):
                again("POST", "instances", uuid, "lease", seconds=_LEASE_S)

    if not keep:
        threading.Thread(target=renew, daemon=True).start()
    try:
        yield uuid
    except (Problem, KeyboardInterrupt):
        keep_console(api, name, uuid, _TAIL)
        raise
    finally:
        over.set()
        if keep:
            say(f"{name} stays (sf instance delete {name})")
        else:
            with suppress(Problem):
                api("DELETE", "instances", uuid)


def keep_console(api: Api, name: str, uuid: str, tail: int = 0) -> None:
    """Keep what a guest wrote in a file, and show the last lines of that, for it will not be there to be asked."""
    with suppress(Problem):
        said, place = read(api, uuid, -1), settings().cache_dir / "consoles" / f"{name}.log"
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.write_bytes(said)
        for old in sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_CONSOLES]:
            old.unlink(missing_ok=True)
        emit(b"".join(said.splitlines(keepends=True)[-tail:]) if tail else b"", sys.stderr)
        say(f"{name}'s console is kept in {place}")


@click.command(
    cls=Command,
    needs=API,
    context_settings={"allow_interspersed_args": False},
    examples="""sf run --image debian:12 --network lan -v .:/src -w /src -- make test
    sf run --image debian:12 --cpus 2 --memory 2G -- sh -c 'nproc; free -m'
    tar -c data | sf run --image my/web:3 -i -- tar -t""",
)
@guest
@click.option("-v", "--file", "files", multiple=True, metavar="SOURCE:PLACE", help="Copy it in; repeatable.")
@click.option("-w", "--workdir", default="/", metavar="DIR", help="Where the command runs.  [default: /]")
@click.option("-i", "--input", "take", is_flag=True, help="Hand it the standard input.")
@click.option("--keep", is_flag=True, help="Leave the guest there.")
@click.option("--ttl", type=DURATION, help="How long the guest lives at most.")
@click.option("--timeout", type=DURATION, default="15m", show_default=True, help="Until its agent answers.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(command: tuple[str, ...], **given: Any) -> int:
    """Run a command in a guest that is made for it and gone afterwards; output and exit code are the command's.

    The image needs qemu-guest-agent; with a --network, cloud-init installs it where it is missing.
    """
    files = [(Path(source), place) for source, _, place in (text.rpartition(":") for text in given["files"])]
    if lost := [source for source, place in files if not place or not source.exists()]:
        raise Problem(f"nothing to copy: {lost[0]}", hint="-v SOURCE:PLACE", code=USAGE)
    api, name = Api(), f"run-{secrets.token_hex(4)}"
    lacks = given["networks"] and not given["user_data"]
    more = {"user_data": base64.b64encode(_AGENT).decode()} if lacks else {}
    with held(api, name, given, **more) as uuid:
        wait(api, uuid, answers, given["timeout"])
        for source, place in files:
            inside.put(api, uuid, source, place)
        argv = "/bin/sh", "-c", _COMMAND, "sh", given["workdir"], *command
        if code := inside.run(api, uuid, *argv, stdin=sys.stdin.buffer if given["take"] else None):
            keep_console(api, name, uuid)
        return code
