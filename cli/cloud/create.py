"""What `sf instance create` makes of its options, and how it waits for the guest."""

import platform
import re
import sys
import time
from pathlib import Path

from cli.cloud.api import Api, Object, poll
from cli.cloud.console import last_line, up
from cli.errors import MISSING, TIMEOUT, USAGE, Problem
from cli.image.push import keep
from cli.output import confirm, say, size, status


def gigabytes(size_bytes: int) -> int:
    whole, rest = divmod(size_bytes, 2**30)
    if rest or not whole:
        raise Problem(f"not a disk size: {size(size_bytes)}", hint="whole gigabytes, such as 8G", code=USAGE)
    return whole


def attachment(api: Api, text: str) -> Object:
    """`lan`, or `lan,address=10.42.0.9,mac=02:…,model=virtio,rules=web,float`."""
    name, *options = text.split(",")
    keys = {"address": "address", "mac": "macaddress", "model": "model", "rules": "rules"}
    found: Object = {"network_uuid": api("GET", "networks", name)["uuid"]}
    for option in options:
        key, _, value = option.partition("=")
        if key not in (*keys, "float"):
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
    keep(str(file), name, platform.machine(), alone=False)
    say(f"{file} is {name} from now on")
    return name


def created(api: Api, body: Object, *, sync: bool) -> Object:
    """Ask for it; and on a terminal, whether an image is to be fetched that only a source list names."""
    try:
        return api("POST", "instances", **body, sync=sync or None)  # type: ignore[no-any-return]
    except Problem as error:
        _, asks, host = error.hint.partition("--sync fetches it from ")
        if sync or not asks or not sys.stdin.isatty():
            raise
        confirm(f"{error}; fetch it from {host}?", force=False)
    return created(api, body, sync=True)


def wait(api: Api, uuid: str, boot: bool, timeout_s: float) -> Object:
    """Follow an instance until it is created, or up."""
    hint = f"sf instance events {uuid}"
    with status() as tell:
        for gone_s in poll(timeout_s):
            found: Object = api("GET", "instances", uuid)
            state, name = found["state"], found["name"]
            if state.endswith("error") or found.get("power_state") == "crashed":
                raise Problem(f"{name}: {found.get('error_message') or 'the guest crashed'}", hint=hint)
            if state in ("delete-wait", "deleted"):
                raise Problem(f"{name} was deleted meanwhile", hint=hint, code=MISSING)
            sign = (up(api, found) if boot else "created") if state == "created" else ""
            if sign:
                ready = f"{name}: {sign} after {gone_s:.1f} s"
                break
            doing = found.get("progress") or ("booting" if state == "created" else state)
            tell(f"{name}: {doing}", f"{gone_s:.0f} s  {last_line(api, found) if boot else ''}")
        else:
            raise Problem(f"{uuid} is not up after {timeout_s:.0f} s", hint=hint, code=TIMEOUT)
    say(ready)
    return found
