"""`sf doctor`: is this installation well? Looks at everything, changes nothing."""

import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

import compute
import imagestore
import imagestore.mirror
from cli.cloud.api import Api
from cli.command import API, Command, settings
from cli.errors import Problem, clean
from cli.image.stores import opened
from cli.output import show_list, size, when
from cli.settings import RESERVED

OK, WARNING, WRONG = "ok", "warning", "wrong"
COLUMNS = (("", "level"), ("part", "part"), ("what", "what"), ("mend it with", "mend"))
Line = tuple[str, str, str]
"""How it is, what was seen, and the command that mends it (which is not said where all is well)."""
_SOCKETS = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")
_SKEW_S = 60
_SOON = timedelta(days=2)


def _state() -> Iterator[Line]:
    path, mend = settings().state_dir / "sf.db", "stop sf serve, and put a copy of it back"
    if settings().get("state"):
        members = compute.state_members(compute.load(settings()))
        yield from ((WRONG if cure else OK, seen, cure) for seen, cure in members)
        return
    if not path.exists():
        yield OK, f"no server keeps its state in {path.parent}", ""
        return
    said = "it is empty"
    if path.stat().st_size:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
            said = database.execute("pragma quick_check(1)").fetchone()[0]
    yield (OK, f"{path} is whole", "") if said == "ok" else (WRONG, f"{path}: {said}", mend)
    if not (path.parent / "installation.json").exists():
        yield WRONG, f"{path.parent}/installation.json is lost: no guest or network is known as ours", mend
    if where := settings().get("state_backup"):
        made = next((made for made, _ in compute.state_backups(where)), None)
        oldest_s = time.time() - 2 * compute.load(settings()).state_backup_every_s
        late = not made or made.trouble or made.made_s < oldest_s
        said = f"the newest backup of it is of {when(made.made_s)} {made.trouble}" if made else ""
        yield WARNING if late else OK, said or "it has no backup", f"sf state backup {where}"


def _stores() -> Iterator[Line]:
    for name, url in settings().stores.items():
        try:
            with opened(url) as store:
                skew_s = 0.0 if store.backend.read_only else store.backend.now() - time.time()
        except imagestore.StoreError as error:
            lost = isinstance(error, imagestore.NotFound)
            if lost and name == "local" and settings().store_is_default:
                yield OK, f"{name}: none yet", ""
            else:
                mend = "sf store verify" if name == "local" else f"sf remote rm {name}, if it is gone"
                yield WRONG, f"{name}: {error}", mend if lost else error.hint or mend
            continue
        yield OK, f"{name}: {store.url}", ""
        if abs(skew_s) > _SKEW_S:
            what = f"{name}: its clock and ours differ by {skew_s:.0f} s, and graces are judged by it"
            yield WARNING, what, "set both clocks (chrony)"


def _trust() -> Iterator[Line]:
    dates = []
    for name, url in settings().remotes.items():
        if signer := url.partition("#")[2]:
            until = imagestore.trusted_until(imagestore.Digest.parse(signer))
            dates.append((f"names of {name}", until, f"sf image ls {name}, or ask its keeper"))
    keys = imagestore.mirror.Keyring(settings().state_dir / "mirror" / "keys")
    if (keys.directory / "fingerprint").exists():
        with opened() as store:
            until = imagestore.mirror.Publisher(store, keys).published()[1]
            dates.append(("names that we publish", until, "sf mirror refresh"))
    for what, until, mend in dates:
        if until is None:
            yield WARNING, f"{what}: none was seen yet", mend
            continue
        left = until - datetime.now(UTC)
        level = WRONG if left < timedelta() else WARNING if left < _SOON else OK
        yield level, f"{what} hold until {until:%Y-%m-%d %H:%M} UTC", mend


def _space() -> Iterator[Line]:
    state, store = settings().state_dir, Path(settings().store_url.removeprefix("file://"))
    paths = (state, state / "cache", settings().instance_dir, store)
    for path in {path.stat().st_dev: path for path in reversed(paths) if path.is_dir()}.values():
        disk = shutil.disk_usage(path)
        share = disk.free / disk.total
        level = WRONG if share < 0.02 else WARNING if share < 0.1 else OK
        said = f"{path}: {size(disk.free)} of {size(disk.total)} are free"
        yield level, said, "sf cache prune; sf image gc"


def _libvirt() -> Iterator[Line]:
    state, uri = settings().state_dir, settings().get("libvirt_uri", "qemu:///system")
    runs_guests = (state / "sf.db").exists() or (state / "agent.json").exists()
    if runs_guests and uri == "qemu:///system":
        answers = [path for path in _SOCKETS if socket.socket(socket.AF_UNIX).connect_ex(path) == 0]
        if answers:
            yield OK, f"{answers[0]} answers", ""
        else:
            yield WRONG, "it does not answer: no guest starts or stops", "systemctl start libvirtd"


def _server() -> Iterator[Line]:
    api = Api()
    try:
        namespaces = api("GET", "auth", "namespaces")
    except Problem as error:
        level = WRONG if (settings().state_dir / "sf.db").exists() else WARNING
        yield level, str(error), error.hint
        return
    yield OK, f"{api.url} answers", ""
    for name in sorted({n["name"] for n in namespaces} & {*settings().stores, *RESERVED}):
        yield WARNING, f"{name} is a namespace and a store: {name}/… means the store", f"sf remote rm {name}"
    for node in api("GET", "nodes"):
        name, state = node["name"], node["state"]
        mend = f"start sf agent there, or: sf node remove {name}"
        if node.get("awaited"):
            what = f"nothing begins before node {name} has said what runs there: {node['awaited']}"
            yield WRONG, what, mend
        elif state == "missing" and node["is_database_node"]:
            what = f"node {name}, the server's own, has said nothing since the server started"
            yield WARNING, what, "ask again in a moment; then: journalctl -u sf-serve"
        elif state == "missing":
            yield WRONG, f"node {name} says nothing", mend
        elif state == "drained":
            yield WARNING, f"node {name} is drained: it gets nothing new", f"sf node drain {name} --undo"
        else:
            yield OK, f"node {name}: {node['accel']}", ""
    for one in api("GET", "nodes", "orphans") if api.namespace == "system" else ():
        name = f"{one['namespace']}/{one['name']}" if one["name"] else one["uuid"]
        trouble = f": {one['error_message']}" if one["error_message"] else ""
        what = f"node {one['node']} keeps guest {name}, which no record knows{trouble}"
        yield WARNING, what, "sf node orphans"
    yield from _guests(api)


def _guests(api: Api) -> Iterator[Line]:
    for one in api("GET", "instances"):
        name = f"{one['namespace']}/{one['name']}"
        halted = one["power_state"] == "paused" and one["error_message"]
        if one["state"].endswith("error") or one["power_state"] == "crashed" or halted:
            what = f"guest {name}: {one['error_message'] or 'it crashed'}"
            yield WARNING, what, f"sf instance events {name}"
    for one in api("GET", "networks") if api.namespace == "system" else ():
        name, found = f"{one['namespace']}/{one['name']}", api("GET", "networks", one["uuid"], "doctor")
        for finding in found:
            yield WRONG, f"network {name} on {finding['node']}: {finding['problem']}", finding["fix"]
        if not found:
            yield OK, f"network {name} is as it should be", ""


CHECKS: dict[str, Callable[[], Iterator[Line]]] = {
    "state": _state, "store": _stores, "trust": _trust, "space": _space, "libvirt": _libvirt, "server": _server,
}  # fmt: skip


def examine() -> Iterator[dict[str, str]]:
    """Every check, each to its end or to its error."""
    for part, check in CHECKS.items():
        try:
            for level, what, mend in check():
                told = {"what": clean(what), "mend": clean(mend) if level != OK else ""}
                yield {"level": level, "part": part, **told}
        except (Problem, imagestore.StoreError, OSError, sqlite3.Error) as error:
            denied = isinstance(error, PermissionError) and os.geteuid() != 0
            mend = "be root for this" if denied else getattr(error, "hint", "")
            yield {"level": WARNING if denied else WRONG, "part": part, "what": clean(error), "mend": mend}


@click.command(cls=Command, needs=API, examples="sf doctor\nsf doctor --format json")
def doctor(form: str) -> None:
    """Say what is well here and what is not: state, stores, trust, space, libvirt, nodes, networks; exit 1 if wrong."""
    found = list(examine())
    show_list(found, COLUMNS, form, name="what")
    if wrong := sum(finding["level"] == WRONG for finding in found):
        raise Problem(f"{wrong} of {len(found)} findings are wrong")
