"""What waits for a snapshot of a guest: one that is kept, one by which it moves."""

import math
from typing import Any

from cli.cloud.api import Api, Object, poll
from cli.cloud.create import wait
from cli.errors import CONFLICT, TIMEOUT, Problem
from cli.output import say, status


def take(api: Api, name: str, verb: str, timeout: float, **asked: Any) -> Object:
    """The snapshot that a request begins once no other is under way, as it ended (a move's is gone). Raises Problem."""
    made: Object = {}
    with status() as tell:
        for gone_s in poll(timeout):
            try:
                made = made or api("POST", "instances", name, verb, **asked)
            except Problem as error:
                if "is under way" not in str(error):
                    raise
                tell(f"{name}: another snapshot is under way", f"{gone_s:.0f} s")
                continue
            every = api("GET", "instances", name, "snapshot")
            mine = (one for one in every if one["uuid"] == made["uuid"])
            over = {"state": "created" if made.get("to") else "error", "error_message": "it was taken away"}
            found: Object = next(mine, made | over)
            if found["state"] in ("created", "error"):
                break
            if found["note"] and found["note"] != made["note"]:  # it moves cold, and why
                say(f"{name}: {found['note']}")
                made["note"] = found["note"]
            tell(f"{found['name']}: {found['state']}", f"{gone_s:.0f} s")
        else:
            raise Problem(f"{name}: not stored yet", hint=f"sf instance snapshots {name}", code=TIMEOUT)
    if found["state"] == "error":
        raise Problem(f"{found['name']}: {found['error_message']}", hint=f"sf instance events {name}")
    return found


def moved(api: Api, name: str, timeout: float, node: str | None = None, *, cold: bool = False) -> Object:
    """A guest, once it is on another node, and up there unless it is to be off. Raises Problem."""
    told: Object = {"placed_on": node, "timeout_s": math.ceil(timeout), **({"live": False} if cold else {})}
    made = take(api, name, "migrate", limit_s := timeout + 3600, **told)

    def there(_: Api, seen: Object) -> str:
        if seen["node"] != made["to"]:
            why = f"{seen['name']} is on {seen['node']}: its move was ended"
            raise Problem(why, hint=f"sf instance events {name}", code=CONFLICT)
        up = seen["power"] == "off" or (not seen["arriving"] and seen["power_state"] in ("on", "paused"))
        return f"on {seen['node']}" if up else ""

    return wait(api, made["instance_uuid"], there, limit_s)
