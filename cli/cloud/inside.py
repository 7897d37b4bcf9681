"""`sf instance exec`, `cp`, `console`, `ssh`, `connect`, `forward`: into a guest from wherever the API is."""

import os
import shlex
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import click

from cli.cloud.api import Api
from cli.cloud.console import emit, read
from cli.cloud.create import file
from cli.cloud.interfaces import instance as instance
from cli.cloud.stream import Stream, carry, forward, interact
from cli.command import settings
from cli.errors import ERROR, MISSING, USAGE, Problem
from cli.output import say, show_one

_PIECE_BYTES = 1 << 16  # an emulated guest's agent takes seconds for a megabyte
_UNPACK = """d=$(mktemp -d) && tar -xz -C "$d" && case $1 in */) mkdir -p "$1";; esac && t=$1 &&
if [ -d "$t" ]; then t="$t/$2"; fi && mv "$d/x" "$t"; r=$?; rm -rf "$d"; exit $r"""
_PACK = '[ -e "$1/$2" ] || exit 3; tar -c -C "$1" -f - "$2"'
_PORT = click.IntRange(1, 65535)
_SH = ("/bin/sh", "-c")
_OPTIONS: dict[str, Any] = {"ignore_unknown_options": True}


def run(api: Api, name: str, *argv: str, stdin: IO[bytes] | None = None, out: IO[bytes] | None = None) -> int:
    """A command in a guest: what it writes is written here, its exit code returned."""
    with Stream(api, name, "exec", argv=argv, input=stdin is not None) as stream:
        if stdin is not None:
            while piece := stdin.read(_PIECE_BYTES):
                stream.send(piece)
            stream.send({"eof": True})
        while isinstance(message := stream.receive(), bytes):
            if out is None:
                emit(message[1:], sys.stderr if message[:1] == b"\2" else sys.stdout)
            elif message[:1] == b"\1":
                out.write(message[1:])
        return int(message.get("exit", ERROR)) & 255


@instance.add("exec", context_settings=_OPTIONS, examples="sf instance exec web -- uname -a")
@click.option("-i", "--input", "take", is_flag=True, help="Hand it the standard input.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def exec_(name: str, take: bool, command: tuple[str, ...]) -> int:
    """Run a command in a guest, through its agent; output and exit code are the command's."""
    return run(Api(), name, *command, stdin=sys.stdin.buffer if take else None)


@instance.add(examples="sf instance cp ./app web:/opt/\nsf instance cp web:/var/log/syslog .")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("target")
def cp(sources: tuple[str, ...], target: str) -> None:
    """Copy files and directories into a guest or out of it, by its agent and its tar: one side is NAME:PATH."""
    api, (guest, path) = Api(), _place(target)
    if sources[1:] and guest:
        path += "/"  # a directory
    elif sources[1:] and not Path(target).is_dir():
        raise Problem(f"{target} is no directory", hint="of several sources, each goes into one", code=USAGE)
    for source in sources:
        other, there = _place(source)
        if bool(guest) == bool(other):
            raise Problem("one side is in a guest: NAME:PATH", hint="sf instance cp --help", code=USAGE)
        if guest:
            put(api, guest, Path(source), path)
        else:
            _get(api, other, there, Path(target))


def _place(text: str) -> tuple[str, str]:
    name, colon, path = text.partition(":")
    return (name, path or ".") if colon and not name.startswith((".", "/")) else ("", text)


def put(api: Api, name: str, source: Path, path: str) -> None:
    """What `source` is, to `path` or into that directory: in its place once all of it is there and its sum right."""
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(source, arcname="x")
        packed.seek(0)
        if code := run(api, name, *_SH, _UNPACK, "sh", path, source.resolve().name, stdin=packed):
            raise Problem(f"{source} was not unpacked in {name}: code {code}")


def _get(api: Api, name: str, path: str, target: Path) -> None:
    """What a guest packed is unpacked beside, then put in its place."""
    place = PurePosixPath(path)
    target = target / (place.name or "root") if target.is_dir() else target
    with tempfile.TemporaryFile() as packed, tempfile.TemporaryDirectory(dir=target.parent) as beside:
        if code := run(api, name, *_SH, _PACK, "sh", str(place.parent), place.name or ".", out=packed):
            why = f"there is no {path} in {name}" if code == MISSING else f"tar in {name} ended with {code}"
            raise Problem(why, code=code)
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(beside, _taken(archive))  # noqa: S202
            Path(beside, place.name).rename(target)
        except (tarfile.TarError, OSError) as error:
            raise Problem(f"what {name} packed as {path} is not taken: {error}") from error


def _taken(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files and directories below. A guest packs what it likes: links, devices, ways out are left out."""
    for one in archive:
        path = Path(one.name)
        if (one.isreg() or one.isdir()) and not path.is_absolute() and ".." not in path.parts:
            one.mode, one.uid, one.gid = one.mode & 0o777, os.getuid(), os.getgid()
            one.uname = one.gname = ""
            yield one


@instance.add(examples="sf instance console web\nsf instance console web --log\nsf instance console web -f")
@click.option("-f", "--follow", is_flag=True, help="Print its end and what comes, until Ctrl-C.")
@click.option("--log", "only", is_flag=True, help="Print what it wrote, and end.")
def console(name: str, follow: bool, only: bool) -> None:
    """A guest's serial console: on a terminal to type in, until ^]; elsewhere what the guest wrote."""
    if follow and only:
        raise click.UsageError("-f or --log")
    if not follow and (only or not (sys.stdin.isatty() and sys.stdout.isatty())):
        emit(read(Api(), name, -1), sys.stdout)
        return
    with Stream(Api(), name, "console") as stream:
        if follow:
            for data in stream.data():
                emit(data, sys.stdout)
        else:
            say(f"{name}'s console; ^] leaves")
            interact(stream)


@instance.add(context_settings=_OPTIONS, examples="sf instance ssh web\nsf instance ssh web -l debian uptime")
@click.option("-l", "--user", default="debian", show_default=True)
@click.option("-i", "--identity", type=file, help="The private key.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(name: str, user: str, identity: Path | None, command: tuple[str, ...]) -> None:
    """Log in to a guest through the API. scp, rsync and others: ProxyCommand sf instance connect %h %p."""
    found = Api()("GET", "instances", name)
    known = settings().user_file.with_name("known_hosts")
    known.parent.mkdir(parents=True, exist_ok=True)
    for flag, value in settings().flags.items():
        os.environ[f"SF_{flag.upper()}"] = value
    proxy = " ".join(map(shlex.quote, (sys.argv[0], "instance", "connect", found["uuid"])))
    # Networks share addresses, and guests get them one after another: a host key belongs to the uuid.
    options = (
        f"ProxyCommand={proxy.replace('%', '%%')} %p",
        f"HostKeyAlias={found['uuid']}",
        f'UserKnownHostsFile="{known}"',
        "StrictHostKeyChecking=accept-new",
    )
    argv = ["ssh", *(word for o in options for word in ("-o", o))]
    argv += [*(("-i", str(identity)) if identity else ()), "-l", user, "--", found["uuid"], *command]
    os.execvp("ssh", argv)  # noqa: S606 - replaces this process; an argument list, no shell


@instance.add(examples="ssh -o 'ProxyCommand sf instance connect %h %p' debian@web")
@click.argument("port", type=_PORT)
def connect(name: str, port: int) -> None:
    """Standard input and output are a connection to a guest's port."""
    with Stream(Api(), name, "connect", port=port) as stream, open(1, "wb", 0, closefd=False) as out:
        carry(stream, lambda: os.read(0, 1 << 16), out.write)


@instance.add("forward", examples="sf instance forward web 8080:80\nsf instance forward db 5432")
@click.argument("ports", metavar="[LOCAL:]PORT")
def forward_(name: str, ports: str) -> None:
    """Make a guest's port one of this machine's, on loopback, until Ctrl-C."""
    here, _, port = ports.rpartition(":")
    there, local = _PORT(port), click.IntRange(0, 65535)(here or port)
    api = Api()
    uuid = api("GET", "instances", name)["uuid"]
    forward(local, lambda: Stream(api, uuid, "connect", port=there))


@instance.add(examples="sf instance vnc web\nsf instance vnc web --listen 5901")
@click.option("--listen", type=click.IntRange(0, 65535), metavar="PORT", help="Of loopback, for a viewer.")
def vnc(name: str, listen: int | None, form: str) -> None:
    """A guest's screen (create --vdi): the address of a page that shows it, once, to who opens it within a minute.

    A port of --listen asks for no password. SPICE has a port of the node and one, for viewers that reach the node.
    """
    api = Api()
    found = api("GET", "instances", name)
    kind, uuid = (found["video"] or {}).get("vdi"), found["uuid"]
    row = {"name": name, "kind": kind, "password": found["vdi_password"]}
    if listen is not None and kind == "spice":
        raise click.UsageError(f"{name}'s screen is SPICE, at a port of its node: without --listen")
    if found.get("vdi_port"):
        row["address"] = f"{api('GET', 'nodes', found['node'])['ip']}:{found['vdi_port']}"
    elif kind != "vnc" or found["power_state"] not in ("on", "paused"):
        raise Problem(f"{name} shows no screen now", hint="create --vdi vnc, and start it", code=MISSING)
    elif listen is not None:
        forward(listen, lambda: Stream(api, uuid, "vnc"))
    else:
        api.asked_by_anybody("screen")  # the server says so if it has no page
        ticket = api("POST", "instances", uuid, "streams", "vnc")["ticket"]
        row["address"] = f"{api.url}/screen#{uuid}.{ticket}"
    show_one(row, (("address", "address"), ("kind", "kind"), ("password", "password")), form)
