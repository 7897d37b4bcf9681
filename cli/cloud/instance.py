"""`sf instance`: guests."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from cli.cloud.api import Api, poll
from cli.cloud.console import answers, up
from cli.cloud.create import LOSS, asked, follow_start, gigabytes, guest, power, wait
from cli.cloud.network import EVENTS, link_text
from cli.cloud.snapshots import moved, take
from cli.command import API, DURATION, GIBIBYTES, MEBIBYTES, Group
from cli.errors import CAPACITY, MISSING, TIMEOUT, Problem
from cli.output import Row, confirm, left, say, show_list, show_one, size, when

COLUMNS = (
    ("name", "name"),
    ("state", lambda i: i["power_state"] if i["state"] == "created" else i["state"]),
    ("addresses", lambda i: " ".join(filter(None, (n["ipv4"] or n["ipv6"] for n in i["interfaces"])))),
    ("cpus", "cpus"),
    ("memory", lambda i: size((i.get("memory") or 0) * 2**20)),
    ("node", "node"),
)
FIELDS = (
    *COLUMNS[:1],
    ("state", "state"),
    ("power", "power_state"),
    *COLUMNS[2:],
    ("uuid", "uuid"),
    ("namespace", "namespace"),
    ("interfaces", lambda i: [link_text(link) for link in i.get("interfaces") or []]),
    ("disks", lambda i: [_disk(disk) for disk in i.get("disks") or []]),
    ("labels", lambda i: [f"{key}={value}" for key, value in (i.get("metadata") or {}).items()]),
    ("autostart", lambda i: f"{i.get('autostart')}, order {i.get('order')}, delay {i.get('delay_s')} s"),
    ("on node loss", "on_node_loss"),
    ("ends", lambda i: _ends(i)),
    ("moves to", "moving"),
    ("remains on", "left"),
    ("created", lambda i: when(i.get("created"))),
    ("changed", lambda i: when(i.get("updated"))),
    ("screen", lambda i: _screen(i)),
    ("accelerator", "accel"),
    ("progress", "progress"),
    ("image", lambda i: [_arrived(*d) for d in sorted((i.get("image_bytes") or {}).items())]),
    ("agent", "agent_state"),
    ("error", "error_message"),
)


def _ends(found: Row) -> str:
    """When it is deleted by itself."""
    how = (("ephemeral", "when off"), ("held_until", "with its maker"))
    return ", ".join(filter(None, (left(found.get("until")), *(text for key, text in how if found.get(key)))))


def _disk(disk: Row) -> str:
    return f"{disk.get('device', '')} {size(disk.get('size_bytes') or None)} {disk.get('base') or 'blank'}"


def _screen(found: Row) -> str:
    """How a viewer gets in, while the guest runs."""
    port, kind = found.get("vdi_port"), (found.get("video") or {}).get("vdi")
    if kind == "vnc" and not port:
        return f"sf instance vnc {found['name']}" if found["power_state"] == "on" else ""
    return f"{kind} on port {port} of {found['node']}, password {found.get('vdi_password')}" if port else ""


def _arrived(device: str, figures: Mapping[str, Any]) -> str:
    """What part of a disk's image is here, from where it came, and how long the guest waited for it."""
    here, whole = figures.get("present_bytes", 0), figures.get("data_bytes", 0)
    received = sorted(figures.get("received", {}).items())
    came = ", ".join(f"{size(count)} from {origin}" for origin, count in received)
    share = f"{100 * here // whole}%" if whole else ""
    return f"{device} {share} here ({came or 'nothing fetched'}; reads waited {figures.get('waited_s', 0):.1f} s)"


JUDGED = (
    ("node", "name"),
    ("vcpus free", "cpus"),
    ("memory free", lambda node: size(node["memory_mib"] << 20)),
    ("disk free", lambda node: size(node["disk_bytes"])),
    ("answer", lambda node: node["why_not"] or "would be taken"),
)
_SIGNS: dict[str, Any] = {"created": None, "boot": up, "agent": answers}
instance = Group("instance", needs=API, help="Create, watch and control guests.")


@instance.add(
    examples="""sf instance create web --image debian:12 --network lan --cpus 1 --memory 512 --wait boot
    sf instance create y --image https://cloud.example/y.qcow2.xz --wait boot
    sf instance create db --image debian:12 --network lan,address=10.42.0.9 --disk 20G --disk 100G
    sf instance create ci --image debian:12 --network lan --ssh-key ~/.ssh/id_ed25519.pub --user-data init.yaml
    sf instance create try --image debian:12 --network lan --ttl 2h --ephemeral
    sf instance create web2 --image debian:12 --label role=web --apart role=web --node-label rack=a --dry-run"""
)
@guest
@click.option("--ttl", type=DURATION, help="How long it lives; then it is deleted.")
@click.option("--ephemeral", is_flag=True, help="Delete it once it is off.")
@click.option("--dry-run", is_flag=True, help="Make nothing; say of each node why it would be taken or not.")
@click.option("--wait", type=click.Choice(["no", *_SIGNS]), default="no", show_default=True)
@click.option("--timeout", type=DURATION, default="15m", show_default=True, help="How long --wait waits.")
def create(name: str, form: str, **given: Any) -> None:
    """Create a guest and start it."""
    api = Api()
    made = asked(api, name, given)
    if given["dry_run"]:
        show_list(made, JUDGED, form)
        if not any(node["fits"] for node in made):
            raise Problem(f"no node has room for {name}", hint="see: sf node ls", code=CAPACITY)
        return
    if not given["networks"]:
        say(f"{name} has no network: nobody will reach it but by its console (--network NAME)")
    elif not given["ssh_keys"] and not given["user_data"]:
        say(f"{name} has no key: nobody will log in unless its image has a password (--ssh-key FILE.pub)")
    if given["wait"] != "no":
        made = wait(api, made["uuid"], _SIGNS[given["wait"]], given["timeout"])
    show_one(made, COLUMNS, form)


@instance.add(examples="sf instance ls --format name")
def ls(everything: bool, form: str) -> None:
    """List guests."""
    rows = Api()("GET", "instances", all=everything)
    show_list(rows, (*COLUMNS, ("ends", _ends)) if any(map(_ends, rows)) else COLUMNS, form)


@instance.add(examples="sf instance show web")
def show(name: str, form: str) -> None:
    """Show a guest: its state, addresses and disks, and why it failed."""
    show_one(Api()("GET", "instances", name), FIELDS, form)


@instance.add(examples="sf instance events web")
def events(name: str, limit: int, form: str) -> None:
    """What happened to a guest, newest first."""
    show_list(Api()("GET", "instances", name, "events", limit=limit), EVENTS, form, name="message")


@instance.add(examples="sf instance delete web")
@click.option("--wait", is_flag=True, help="Until nothing is left of them.")
def delete(names: tuple[str, ...], wait: bool, force: bool) -> None:
    """Delete guests and their disks."""
    confirm(f"delete {' '.join(names)} with all disks?", force)
    api = Api()
    doomed = {name: api("GET", "instances", name)["uuid"] for name in names}
    for uuid in doomed.values():
        api("DELETE", "instances", uuid)
    for name, uuid in doomed.items() if wait else ():
        if not any(api("GET", "instances", uuid)["state"] == "deleted" for _ in poll(120, 0.3)):
            raise Problem(f"{name} is not gone after 120 s", hint=f"sf instance events {uuid}", code=TIMEOUT)
    say(f"{' '.join(names)} {'deleted' if wait else 'being deleted'}")


@instance.add(
    "set",
    examples="""sf instance set web --cpus 2 --memory 2G
    sf instance set db --disk 40G --disk vdb=200G
    sf instance set try --ttl 4h
    sf instance set db --autostart yes --order 1 --delay 20s --on-node-loss restore""",
)
@click.option("--cpus", type=click.IntRange(min=1))
@click.option("--memory", type=MEBIBYTES, help="512M, 8G; a number: MiB.")
@click.option("--disk", "disks", multiple=True, metavar="[DEVICE=]40G", help="Grow it; default: vda.")
@click.option("--ttl", type=DURATION, help="From now on; then it is deleted. 0: it stays.")
@LOSS
@click.option("--autostart", type=click.Choice(["yes", "no", "last"]), help="With its machine; last: if on.")
@click.option("--order", type=click.IntRange(0, 9), help="A namespace's lower ones start first, end last.")
@click.option("--delay", "delay_s", type=DURATION, help="Before the next order starts.")
def set_(names: tuple[str, ...], cpus: int | None, memory: int | None, **given: Any) -> None:
    """Change guests: disks of one that runs grow at once, the rest counts from its next start on."""
    disks, start = given.pop("disks"), given
    if not (cpus or memory or disks) and all(value is None for value in start.values()):
        raise click.UsageError("nothing to set")
    pairs, api = [text.rpartition("=") for text in disks], Api()
    sizes = {device or "vda": gigabytes(GIBIBYTES.convert(each, None, None)) for device, _, each in pairs}
    if len(sizes) < len(disks):
        raise click.UsageError("--disk: one size for a device")
    for name in names:
        memory_mib = memory and memory // 2**20
        found = api("PATCH", "instances", name, cpus=cpus, memory=memory_mib, disks=sizes or None, **start)
        if found["power_state"] == "off" and (cpus or memory or disks):
            say(f"{name} is off: it has what was set from its next start on")
        elif cpus or memory:
            say(f"{name} has its cpus and memory from its next start on (sf instance reboot {name} --hard)")


@instance.add(examples="sf instance rename web www")
@click.argument("new", metavar="NEW")
def rename(name: str, new: str) -> None:
    """Call a guest otherwise: for DNS at once, in the guest itself from its next start if it asks then."""
    Api()("PATCH", "instances", name, name=new)


def _power(word: str, path: str, text: str) -> None:
    """Make a command that posts to /instances/R/<path> for each name."""

    @instance.add(word, help=text, examples=f"sf instance {word} web")
    def run(names: tuple[str, ...]) -> None:
        api = Api()
        for name in names:
            api("POST", "instances", name, path)


_power("pause", "pause", "Stop guests' processors.")
_power("unpause", "unpause", "Let paused guests go on.")


_until_up = click.option("--wait", is_flag=True, help="Until the guest agent answers after that.")


@instance.add(examples="sf instance start web db --wait")
@_until_up
@click.option("--timeout", type=DURATION, default="15m", show_default=True, help="How long --wait waits.")
def start(names: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Switch guests on."""
    api = Api()
    for name in names:
        switch = partial(api, "POST", "instances", name, "poweron")
        follow_start(api, name, switch, timeout, power(api, name) != "on") if wait else switch()


@instance.add(examples="sf instance stop web db --wait\nsf instance stop web --force")
@click.option("--timeout", type=DURATION, default="60s", show_default=True, help="Then its power is taken.")
@click.option("--force", is_flag=True, help="Take the power at once, as by holding down the power button.")
@click.option("--wait", is_flag=True, help="Until they are off.")
def stop(names: tuple[str, ...], timeout: float, force: bool, wait: bool) -> None:
    """Ask guests to end, by their power button and their agent; their power is taken after a while."""
    api, grace_s = Api(), 0 if force else math.ceil(timeout)
    for name in names:
        api("POST", "instances", name, "poweroff", timeout_s=grace_s or None)
    for name in names if wait else ():
        if not any(api("GET", "instances", name)["power_state"] == "off" for _ in poll(grace_s + 60, 0.3)):
            raise Problem(f"{name} is not off", hint=f"sf instance events {name}", code=TIMEOUT)


@instance.add(examples="sf instance reboot web\nsf instance reboot web --hard")
@click.option("--hard", is_flag=True, help="A reset, without asking the guest.")
def reboot(name: str, hard: bool) -> None:
    """Reboot a guest."""
    Api()("POST", "instances", name, "reboothard" if hard else "rebootsoft")


SNAPSHOT = (
    ("name", "name"),
    ("state", "state"),
    ("new", lambda s: size(s.get("new"))),
    ("known", lambda s: size(s.get("known"))),
    ("file systems", lambda s: "frozen" if s.get("frozen") else "as after a crash"),
)
SNAPSHOT_FIELDS = (
    *SNAPSHOT,
    ("held", lambda s: size(s.get("held"))),
    ("read", lambda s: size(s.get("read"))),
    ("written", lambda s: size(s.get("written"))),
    ("digests", lambda s: [f"{device} {digest}" for device, digest in sorted(s["digests"].items())]),
    ("note", "note"),
    ("error", "error_message"),
)


@instance.add(examples="sf instance snapshot web")
@click.option("--timeout", type=DURATION, default="1h", show_default=True, help="How long it may take.")
def snapshot(name: str, form: str, timeout: float) -> None:
    """Keep all disks of a running guest as they are now, as images under my/."""
    show_one(take(Api(), name, "snapshot", timeout), SNAPSHOT_FIELDS, form)


@instance.add(examples="sf instance migrate web --on server2")
@click.option("--on", "node", metavar="NODE", help="Default: the best other one.")
@click.option("--timeout", type=DURATION, default="60s", show_default=True, help="Then its power is taken.")
@click.option("--cold", is_flag=True, help="It is off meanwhile.")
def migrate(name: str, form: str, node: str | None, timeout: float, cold: bool) -> None:
    """Move a guest to another node while it runs; where that cannot be (it says why), it ends and starts there anew."""
    show_one(moved(Api(), name, timeout, node, cold=cold), COLUMNS, form)


@instance.add(examples="sf instance restore web\nsf instance restore web my/web:20261224-180000 --wait")
@_until_up
@click.option("--timeout", type=DURATION, default="1h", show_default=True)
@click.argument("image", required=False)
def restore(name: str, image: str | None, force: bool, timeout: float, wait: bool) -> None:
    """Give a guest the disks of a snapshot again (its newest); what it has now is kept as a snapshot first."""
    api = Api()
    whole = [one["name"] for one in api("GET", "instances", name, "snapshot") if one["state"] == "created"]
    if not (image := image or next(iter(whole), "")):
        raise Problem(f"{name} has no snapshot", hint=f"sf instance snapshot {name}", code=MISSING)
    confirm(f"restart {name} with the disks of {image}?", force)

    def begin() -> None:
        kept = take(api, name, "restore", timeout, image=str(image))
        say(f"{name} starts with {image}; what it had is {kept['name']}")

    follow_start(api, name, begin, timeout) if wait and power(api, name) != "off" else begin()


@instance.add(examples="sf instance snapshots web")
def snapshots(name: str, form: str) -> None:
    """List the snapshots of a guest, the newest first."""
    show_list(Api()("GET", "instances", name, "snapshot"), SNAPSHOT, form)
