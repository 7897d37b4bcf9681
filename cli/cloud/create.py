"""What `sf instance create`, `sf run` and `sf image build` make of a guest's options, and how they wait for it."""

import base64
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click

from cli.cloud.api import Api, Object, poll
from cli.cloud.console import answers, last_line
from cli.command import GIBIBYTES, MEBIBYTES, pairs
from cli.errors import MISSING, TIMEOUT, USAGE, Problem
from cli.image.push import keep
from cli.output import confirm, say, size, status

file = click.Path(exists=True, dir_okay=False, path_type=Path)
_AWAY = "Anew elsewhere. Its node stops it after 20 s without the server, a frozen one when it has thawed."
LOSS = click.option("--on-node-loss", type=click.Choice(["leave", "restart", "restore"]), help=_AWAY)
_DISKS = (".qcow2", ".raw", ".img", ".vmdk", ".vhdx", ".vdi")
_BARE = (
    click.option("--sync", is_flag=True, help="Fetch an image that only a source list names, unasked."),
    click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True),
    click.option("--memory", type=MEBIBYTES, default="1G", show_default=True, help="512M, 8G; bare: MiB."),
    click.option("--disk", "disks", multiple=True, metavar="8G[,bus=sata]", help="Image's; more: blank."),
    click.option("--cpu", "cpu_model", default="", metavar="MODEL", help="One of virsh cpu-models x86_64."),
    click.option("--on", "placed_on", metavar="NODE", help="The node to run on."),
    click.option("--node-label", "where", multiple=True, metavar="KEY=VALUE", help="Only on such nodes."),
    click.option("--near", multiple=True, metavar="KEY=VALUE", help="Rather beside guests of that label."),
    click.option("--apart", multiple=True, metavar="KEY=VALUE", help="Rather not beside such guests."),
)
_MACHINE = (
    click.option("--network", "networks", multiple=True, metavar="NAME[,…]", help="May be repeated."),
    *_BARE,
    click.option("--cdrom", "cdroms", multiple=True, metavar="IMAGE[,bus=scsi]", help="An ISO, read only."),
    click.option("--boot", type=click.Choice(["disk", "cdrom"]), default="disk", help="What is tried first."),
    click.option("--uefi", is_flag=True, help="UEFI instead of SeaBIOS."),
    click.option("--secure-boot", is_flag=True, help="UEFI that starts what Microsoft's keys signed."),
    click.option("--tpm", is_flag=True, help="A TPM 2.0."),
)
_GUEST = (
    click.option("--image", help="What is on the first disk: NAME[:TAG][@b3:DIGEST], a URL, or a file."),
    *_MACHINE,
    click.option("--publish", "ports", multiple=True, metavar="8080:80[/udp]", help="On the first network."),
    click.option("--ssh-key", "ssh_keys", multiple=True, type=file, help="A public key. May be repeated."),
    click.option("--user-data", type=file, help="For cloud-init."),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Metadata. May be repeated."),
    LOSS,
    click.option("--vdi", type=click.Choice(["vnc", "spice"]), help="A graphical console as well."),
)
_NONE, _NO = ("ports", "ssh_keys", "labels", "networks", "cdroms"), ("boot", "uefi", "secure_boot", "tpm")
_NOT_GIVEN: Object = dict.fromkeys(_NONE, ()) | dict.fromkeys((*_NO, "user_data", "vdi"))


def guest(command: Callable[..., Any], options: Sequence[Callable[..., Any]] = _GUEST) -> Callable[..., Any]:
    """Decorates a command that makes a guest: `asked` takes these options."""
    return reduce(lambda made, option: option(made), reversed(options), command)


machine, bare = partial(guest, options=_MACHINE), partial(guest, options=_BARE)


def gigabytes(size_bytes: int) -> int:
    whole, rest = divmod(size_bytes, 2**30)
    if rest or not whole:
        raise Problem(f"not a disk size: {size(size_bytes)}", hint="whole gigabytes, such as 8G", code=USAGE)
    return whole


def drive(text: str, what: str) -> Object:
    """`8G,bus=sata` or `debian-netinst:12,bus=scsi`; `what` is what stands first: size (GB) or base."""
    first, _, bus = text.partition(",bus=")
    value = gigabytes(GIBIBYTES.convert(first, None, None)) if what == "size" else first
    return {what: value, "bus": bus or None}


def attachment(api: Api, text: str) -> Object:
    """`lan`, or `lan,address=10.42.0.9,mac=02:…,model=virtio,rules=web,float`."""
    name, *options = text.split(",")
    keys = {"address": "address", "mac": "macaddress", "model": "model", "rules": "rules"}
    found: Object = {"network_uuid": api("GET", "networks", name)["uuid"]}
    for option in options:
        key, _, value = option.partition("=")
        if key not in (*keys, "float") or bool(value) != (key in keys):
            hint = f"{name},address=ADDRESS,mac=MAC,model=MODEL,rules=NAME,float"
            raise Problem(f"not an option of --network: {option!r}", hint=hint, code=USAGE)
        found[keys.get(key, key)] = value if key in keys else True
    return found


def ssh_key(path: Path) -> str:
    text = path.read_text(errors="replace").strip()
    if not re.match(r"(ssh|ecdsa|sk)-\S+ \S+", text):
        raise Problem(f"{path} is no public ssh key", hint="the file that ends in .pub", code=USAGE)
    return text


def image_of(api: Api, file: Path) -> str:
    """Keep a disk image's file in the local store, which this machine's server reads; the name that it got."""
    if not api.local:
        hint = "sf image push FILE NAME --store URL, to a store that the server reads"
        raise Problem(f"{api.url} cannot see {file}", hint=hint, code=USAGE)
    name = re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:60] or "disk"
    name += time.strftime(":%Y%m%d-%H%M%S", time.localtime(file.stat().st_mtime))
    keep(str(file), name, platform.machine())
    say(f"{file} is {name} from now on")
    return name


def asked(api: Api, name: str, given: Object, **more: Any) -> Any:
    """A guest of these options is asked for; `more` goes into the call as it is."""
    given = _NOT_GIVEN | given
    image, disks = given["image"] or "", [drive(each, "size") for each in given["disks"]] or [Object()]
    if Path(image).is_file() and ("/" in image or Path(image).suffix in _DISKS):
        if given.get("dry_run"):
            raise Problem(f"a dry run does not keep {image}", hint="sf image push FILE NAME", code=USAGE)
        image = image_of(api, Path(image))
    if not image and not given["disks"]:
        raise Problem("a guest needs a disk", hint="--image NAME, or --disk 8G for a blank one", code=USAGE)
    disks[0] |= {"base": image or None}
    liking = {"affinity": dict.fromkeys(given["near"], 1) | dict.fromkeys(given["apart"], -1)}
    cdroms = [drive(each, "base") | {"type": "cdrom"} for each in given["cdroms"]]
    body: Object = {
        "name": name,
        "cpus": given["cpus"],
        "memory": given["memory"] // 2**20,
        "disk": cdroms + disks if given["boot"] == "cdrom" else disks + cdroms,
        "network": [attachment(api, text) for text in given["networks"]],
        "ssh_key": "\n".join(map(ssh_key, given["ssh_keys"])) or None,
        "user_data": base64.b64encode(data.read_bytes()).decode() if (data := given["user_data"]) else None,
        "node_labels": pairs(given["where"]) or None,
        **{key: given[key] or None for key in ("placed_on", "uefi", "secure_boot", "tpm", "cpu_model")},
        "video": {"model": "virtio", "memory": 16384, "vdi": given["vdi"]} if given["vdi"] else None,
        "metadata": (pairs(given["labels"]) | (liking if liking["affinity"] else {})) or None,
        **{key: given.get(key) for key in ("ttl", "ephemeral", "dry_run", "on_node_loss")},
    }
    if given["ports"] and not body["network"]:
        raise Problem("ports are published for a network", hint="--network NAME", code=USAGE)
    made = created(api, {**body, **more}, sync=given["sync"])
    for ports in () if body["dry_run"] else given["ports"]:
        try:
            api("POST", "interfaces", made["interfaces"][0]["uuid"], "publish", ports=ports)
        except Problem as error:
            raise Problem(f"{name} is created, but {error}", hint=error.hint, code=error.code) from error
    return made


def created(api: Api, body: Object, *, sync: bool) -> Object:
    """Ask for it; and on a terminal, whether an image is to be fetched that only a source list names."""
    try:
        return api("POST", "instances", **body, sync=sync or None)  # type: ignore[no-any-return]
    except Problem as error:
        _, asks, host = error.hint.partition("--sync fetches it from ")
        if sync or body["dry_run"] or not asks or not sys.stdin.isatty():
            raise
        confirm(f"{error}; fetch it from {host}?", force=False)
    return created(api, body, sync=True)


def wait(api: Api, uuid: str, shown: Callable[[Api, Object], str] | None, timeout_s: float) -> Object:
    """Follow an instance until it is created, and until something is `shown` by it then."""
    hint = f"sf instance events {uuid}"
    with status() as tell:
        for gone_s in poll(timeout_s):
            found: Object = api("GET", "instances", uuid)
            state, name = found["state"], found["name"]
            if state.endswith("error") or found.get("power_state") == "crashed":
                raise Problem(f"{name}: {found.get('error_message') or 'the guest crashed'}", hint=hint)
            if state in ("delete-wait", "deleted"):
                raise Problem(f"{name} was deleted meanwhile", hint=hint, code=MISSING)
            sign = (shown(api, found) if shown else "created") if state == "created" else ""
            if sign:
                ready = f"{name}: {sign} after {gone_s:.1f} s"
                break
            if state == "created" and found["power_state"] == "off":
                raise Problem(f"{name} has gone off", hint=hint)
            doing = found.get("progress") or ("booting" if state == "created" else state)
            tell(f"{name}: {doing}", f"{gone_s:.0f} s  {last_line(api, found) if shown else ''}")
        else:
            raise Problem(f"{name} is not that far after {timeout_s:.0f} s", hint=hint, code=TIMEOUT)
    say(ready)
    return found


def power(api: Api, name: str) -> str:
    return str(api("GET", "instances", name)["power_state"])


def follow_start(api: Api, name: str, act: Callable[[], object], timeout: float, anew: bool = True) -> None:
    """Until a guest is up, by its agent's word, which `act` has start (`anew`: it does not run yet). Raises Problem."""

    def starts() -> list[float]:
        events = api("GET", "instances", name, "events", limit=100)
        return [event["timestamp"] for event in events if event["message"] == "started"][:1]

    before = starts()
    act()
    if anew and not any(starts() != before for _ in poll(timeout)):
        raise Problem(f"{name} has not started", hint=f"sf instance events {name}", code=TIMEOUT)
    wait(api, name, answers, timeout)
