"""`sf run` and `sf image build`: guests for one purpose, which the command holds by a lease that it renews.

Whoever kills it, in whatever way, leaves nothing.
"""

import base64
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

import click

import imagestore
from cli.cloud import inside
from cli.cloud.api import Api, Object
from cli.cloud.console import answers, emit, read
from cli.cloud.create import asked, bare, file, guest, machine, wait
from cli.cloud.snapshots import take
from cli.command import API, DURATION, STORE, Command, settings
from cli.errors import USAGE, Problem
from cli.image.image import PUSHED
from cli.image.push import keep_clean
from cli.image.stores import found, opened, written
from cli.output import say, show_one, size

_LEASE_S, _CONSOLES, _TAIL = 60, 32, 15
_AGENT = b"""#!/bin/sh
command -v qemu-ga >/dev/null && exit
{ apt-get update && apt-get install -y qemu-guest-agent || dnf install -y qemu-guest-agent; } &&
systemctl start qemu-guest-agent
"""
_COMMAND = """command -v cloud-init >/dev/null && cloud-init status --wait >/dev/null 2>&1
cd "$1" && shift && exec "$@"
"""
_UP = """command -v cloud-init >/dev/null && cloud-init status --wait >/dev/null 2>&1
test -x /etc/sf/renew || exit; sync; echo 1 >/proc/sys/vm/drop_caches
free=$(awk '/^MemFree/ { print int($2 * .8) }' /proc/meminfo)  # what is zero is not kept
dd if=/dev/zero of=/dev/null bs="${free}K" count=1 2>/dev/null || :"""
_END = b"""#cloud-config
merge_how: dict(replace)+list()+str()
power_state: {mode: poweroff, timeout: 300, condition: true}
"""


@contextmanager
def held(api: Api, name: str, given: Object, **more: Any) -> Iterator[str]:
    """The uuid of a guest of these options that is there until the block ends, or this command in whatever way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    keep, over, again = given.get("keep"), threading.Event(), Api()
    uuid = asked(api, name, given, lease=None if keep else _LEASE_S, **more)["uuid"]

    def renew() -> None:
        while not over.wait(_LEASE_S / 4):
            with suppress(Problem):
                again("POST", "instances", uuid, "lease", seconds=_LEASE_S)

    if not keep:
        threading.Thread(target=renew, daemon=True).start()
    well = False
    try:
        yield uuid
        well = True
    finally:
        if not well:
            keep_console(api, name, uuid, _TAIL)
        over.set()
        if keep:
            say(f"{name} stays (sf instance delete {name})")
        else:
            with suppress(Problem):
                api("DELETE", "instances", uuid)


def keep_console(api: Api, name: str, uuid: str, tail: int = 0) -> None:
    """Keep what a guest wrote in a file, and show the last lines of that, for it will not be there to be asked."""
    with suppress(Problem, OSError):
        said, place = read(api, uuid, -1), settings().cache_dir / "consoles" / f"{name}.log"
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.write_bytes(said)
        for old in sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_CONSOLES]:
            old.unlink(missing_ok=True)
        emit(b"".join(said.splitlines(keepends=True)[-tail:]) if tail else b"", sys.stderr)
        say(f"{name}'s console is kept in {place}")


def _user_data(*parts: bytes) -> str:
    """What cloud-init is to do, one after another, as the API takes it."""
    whole = MIMEMultipart(boundary="sf-part")
    for part in parts:
        whole.attach(MIMEText(part.decode(), "plain", "utf-8"))
    return base64.b64encode(whole.as_bytes()).decode()


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

    The image needs qemu-guest-agent; with --network and no --user-data, cloud-init installs it where it is missing.
    """
    files = [text.rpartition(":")[::2] for text in given["files"]]
    if lost := [":".join(pair) for pair in files if not (all(pair) and Path(pair[0]).exists())]:
        raise Problem(f"nothing to copy: {lost[0]}", hint="-v SOURCE:PLACE", code=USAGE)
    api, name = Api(), f"run-{secrets.token_hex(4)}"
    more = {"user_data": _user_data(_AGENT)} if given["networks"] and not given["user_data"] else {}
    with held(api, name, given, **more) as uuid:
        wait(api, uuid, answers, given["timeout"])
        for source, place in files:
            inside.put(api, name, Path(source), place)
        argv = "/bin/sh", "-c", _COMMAND, "sh", given["workdir"], *command
        if code := inside.run(api, uuid, *argv, stdin=sys.stdin.buffer if given["take"] else None):
            keep_console(api, name, uuid)
        return code


@click.command(cls=Command, needs=API, examples="sf image warm debian:12 --cpus 2 --memory 2G --disk 20G")
@click.argument("image")
@bare
@click.option("--timeout", type=DURATION, default="15m", show_default=True, help="Until it is up.")
def warm(form: str, **given: Any) -> None:
    """Keep what guests of an image are when they have just booted, so that later ones like it begin as that.

    It is kept in the namespace's own store, as my/warm-…, for instances of this namespace on machines as this one. The
    image needs qemu-guest-agent and its own steps in /etc/sf/renew; docs/howto/guests.md has them.
    """
    if len(given["disks"]) > 1:
        raise Problem("guests with several disks always boot", hint="one --disk at most", code=USAGE)
    api, name = Api(), f"warm-{secrets.token_hex(4)}"
    with held(api, name, given) as uuid:
        wait(api, uuid, answers, given["timeout"])
        if inside.run(api, uuid, "/bin/sh", "-c", _UP):
            hint = "docs/howto/guests.md has what an image needs for that"
            raise Problem(f"{given['image']} has no /etc/sf/renew: its guests cannot resume", hint=hint)
        made = take(api, uuid, "snapshot", given["timeout"], warm=True)
    say(f"guests of {given['image']} and this size resume now; sf image rm {made['name']} ends that")
    show_one(made, (("name", "name"), ("written", lambda one: size(one.get("written")))), form)


@click.command(
    cls=Command,
    needs=(*API, *STORE),
    examples="""sf image build my/web:3 --base debian:12 --user-data web.yaml --network lan
    sf image build my/debian:12-agent --base debian:12 --user-data empty.yaml --agent --network lan""",
)
@click.option("--base", "image", required=True, help="What it is built from: NAME[:TAG][@b3:DIGEST].")
@click.option("--user-data", "recipe", type=file, required=True, help="The recipe, for cloud-init.")
@click.option("--agent", is_flag=True, help="With qemu-guest-agent.")
@machine
@click.option("--timeout", type=DURATION, default="1h", show_default=True, help="How long it may take.")
def build(name: str, architecture: str, form: str, **given: Any) -> None:
    """Make an image by a recipe of cloud-init, in a guest that has nothing else and is gone afterwards.

    The guest goes off when cloud-init has ended; its disk is cleaned (machine-id, host keys, logs, what was deleted;
    only ext4 is) and kept, with the recipe's digest as label. A recipe that fails makes no image.
    """
    api, target, recipe, limit_s = Api(), written(name), given.pop("recipe").read_bytes(), given["timeout"]
    parts = recipe, *([_AGENT] if given["agent"] else []), _END
    with (
        opened(name=name, create=True, write=True) as store,
        held(
            api, f"build-{secrets.token_hex(4)}", given, ttl=3 * limit_s, user_data=_user_data(*parts)
        ) as uuid,
    ):
        made = wait(api, uuid, lambda _, seen: "built" if seen["power_state"] == "off" else "", limit_s)
        taken = take(api, uuid, "snapshot", limit_s)
        labels = {"base": given["image"], "recipe": str(imagestore.Digest.of(b"".join(parts)))}
        parent = imagestore.Digest.parse(made["disks"][0]["digest"])
        with found(taken["name"], architecture) as (source, _, digest):
            row = keep_clean(source, digest, store, *target, built=True, labels=labels, parent=parent)
    show_one(row, PUSHED, form)
