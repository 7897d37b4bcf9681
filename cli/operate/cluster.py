"""`sf node`, `sf namespace` and `sf key`."""

import secrets

import click

from cli.cloud.api import Api, Object
from cli.cloud.instance import COLUMNS
from cli.cloud.network import EVENTS
from cli.cloud.snapshots import moved
from cli.command import API, DURATION, Group, pairs
from cli.errors import CONFLICT, Problem
from cli.output import ago, confirm, left, say, show_list, show_one

NODES = (
    ("name", "name"),
    ("address", "ip"),
    ("state", "state"),
    ("last seen", lambda n: ago(n.get("lastseen"))),
    ("release", "release"),
    ("labels", lambda n: " ".join(f"{key}={value}" for key, value in n["metadata"].items())),
)
NAMESPACES = (
    ("name", "name"),
    ("keys", lambda n: " ".join(n.get("keys") or [])),
    ("trusts", lambda n: " ".join((n.get("trust") or {}).get("full", []))),
)
KEYS = (
    ("name", "name"),
    ("may", lambda k: "read" if k.get("read_only") else "read and change"),
    ("ends", lambda k: "expired" if left(k["expires"]) == "in 0 s" else left(k["expires"]) or "never"),
)
BASE = ("auth", "namespaces")

node = Group("node", needs=API, help="Machines of the cluster.")
namespace = Group("namespace", needs=API, help="Tenants: each has its own guests, networks and keys.")
QUOTAS = (("what", "name"), ("used", "used"), ("at most", "most"))
key = Group("key", needs=API, help="Keys of a namespace.")
of = click.argument("of", metavar="NAMESPACE")


@node.add(examples="sf node ls")
def ls(form: str) -> None:
    """List nodes."""
    show_list(Api()("GET", "nodes"), NODES, form)


@node.add(examples="sf node show server1")
def show(name: str, form: str) -> None:
    """Show a node."""
    found = Api()("GET", "nodes", name)
    rest = sorted(found.keys() - {"name", "ip", "state", "lastseen", "release", "metadata"})
    show_one(found, (*NODES, *((key, key) for key in rest)), form)


@node.add(examples="sf node token")
def token(form: str) -> None:
    """Make a single-use token, good for ten minutes, with which another machine joins (sf agent --join)."""
    columns = (("url", "url"), ("token", "token"), ("expires in (s)", "expires_in"))
    show_one(Api()("POST", "nodes", "token"), columns, form)


@node.add(examples="sf node drain server1\nsf node drain server1 --move\nsf node drain server1 --undo")
@click.option("--undo", is_flag=True, help="Use the node again; guests that were moved stay where they are.")
@click.option("--move", is_flag=True, help="Move its guests away, one by one, as sf instance migrate does.")
@click.option("--timeout", type=DURATION, help="For a guest to end, with --move.  [default: 60s]")
def drain(name: str, form: str, undo: bool, move: bool, timeout: float | None) -> None:
    """Place nothing new on a node and route elsewhere; guests that run there go on, or are moved.

    A guest that cannot be moved runs on; killed, this command is begun again and does the rest.
    """
    if (undo and move) or (timeout is not None and not move):
        raise click.UsageError("--move, with its --timeout, or --undo")
    api, rows, failed = Api(), dict[str, Object](), list[Problem]()
    name = api("POST", "nodes", name, "undrain" if undo else "drain")["name"]
    while move:
        here = (one for one in api("GET", "instances") if one["node"] == name and one["uuid"] not in rows)
        if not (one := next((one for one in here if one["state"] != "delete-wait"), None)):
            break
        try:
            rows[one["uuid"]] = moved(api, one["uuid"], 60 if timeout is None else timeout)
        except Problem as error:
            rows[one["uuid"]] = one | {"error_message": str(error)}
            failed.append(error)
    if move:
        show_list(rows.values(), (*COLUMNS, ("error", "error_message")), form)
    if failed:
        raise Problem(f"{len(failed)} guests are still on {name}", hint=failed[0].hint, code=failed[0].code)


@node.add("set", examples="sf node set server1 --label rack=a --label disk=")
@click.option("--label", "labels", multiple=True, required=True, metavar="KEY=VALUE", help="KEY=: removed.")
def node_set(name: str, labels: tuple[str, ...]) -> None:
    """Label a node, for guests that ask for such a one (sf instance create --node-label)."""
    api, known = Api(), ("nodes", name, "metadata")
    for key, value in pairs(labels).items():
        api("POST", *known, key=key, value=value) if value else api("DELETE", *known, key)


ORPHANS = (
    ("uuid", "uuid"),
    ("node", "node"),
    ("name", lambda o: f"{o['namespace']}/{o['name']}" if o["name"] else "unknown"),
    ("power", "power_state"),
    ("state", "state"),
    ("since", lambda o: ago(o["since"])),
    ("trouble", "error_message"),
)


@node.add(examples="sf node orphans\nsf node orphans --adopt UUID\nsf node orphans --delete UUID")
@click.option("--adopt", metavar="UUID", help="Make its records anew.")
@click.option("--delete", metavar="UUID", help="Remove it, disks and all.")
def orphans(adopt: str, delete: str, form: str) -> None:
    """Guests that run on nodes and are in no record: they are left as they are until you adopt or delete them."""
    api = Api()
    if adopt:
        made = api("POST", "nodes", "orphans", adopt, "adopt")
        say(f"{made['namespace']}/{made['name']} adopted")
    if delete:
        api("DELETE", "nodes", "orphans", delete)
        say(f"deletion of {delete} asked for")
    if not adopt and not delete:
        show_list(api("GET", "nodes", "orphans"), ORPHANS, form)


@node.add(examples="sf node remove server2")
def remove(name: str, force: bool) -> None:
    """Forget a node that is gone, and the guests that were on it."""
    confirm(f"forget {name} and all guests on it?", force)
    Api()("DELETE", "nodes", name)


@namespace.add("ls", examples="sf namespace ls")
def namespace_ls(form: str) -> None:
    """List the namespaces that this key may see."""
    show_list(Api()("GET", *BASE), NAMESPACES, form)


@namespace.add("show", examples="sf namespace show shop")
def namespace_show(name: str, form: str) -> None:
    """Show a namespace."""
    show_one(Api()("GET", *BASE, name), NAMESPACES, form)


@namespace.add("create", examples="sf namespace create shop")
def namespace_create(name: str, form: str) -> None:
    """Make a namespace; `sf key add` gives it a key."""
    show_one(Api()("POST", *BASE, namespace=name), NAMESPACES, form)


@namespace.add("delete", examples="sf namespace delete shop")
def namespace_delete(name: str, force: bool) -> None:
    """Delete a namespace that has no guests and networks any more."""
    confirm(f"delete namespace {name} and its keys?", force)
    Api()("DELETE", *BASE, name)
    say(f"{name} deleted")


@namespace.add("events", examples="sf namespace events shop")
def namespace_events(name: str, limit: int, form: str) -> None:
    """Who made and removed its keys, and trusts whom, newest first."""
    show_list(Api()("GET", *BASE, name, "events", limit=limit), EVENTS, form, name="message")


quota = Group("quota", needs=API, help="What a namespace may have at most.")
namespace.add_command(quota)


@quota.add("show", examples="sf namespace quota show shop")
def quota_show(name: str, form: str) -> None:
    """Show what a namespace has, and may have at most."""
    show_list(Api()("GET", *BASE, name, "quota"), QUOTAS, form)


@quota.add("set", examples="sf namespace quota set shop instances=10 stored_gb=50")
@click.argument("limits", nargs=-1, required=True, metavar="WHAT=MOST...")
def quota_set(name: str, limits: tuple[str, ...]) -> None:
    """Change limits; what is there already stays."""
    Api()("PUT", *BASE, name, "quota", **{what: click.INT(most) for what, most in pairs(limits).items()})


@key.add("ls", examples="sf key ls shop")
@of
def key_ls(of: str, form: str) -> None:
    """List a namespace's keys: what each may, and when it ends."""
    found = Api()("GET", *BASE, of)
    show_list([{"name": name} | found["about_keys"][name] for name in found["keys"]], KEYS, form)


@key.add("add", examples="sf key add shop laptop\nsf key add shop monitoring --ttl 30d --read-only")
@of
@click.option("--ttl", type=DURATION, help="Until when it holds: 12h, 30d; default: for ever.")
@click.option("--read-only", is_flag=True, help="It sees everything and changes nothing; no streams.")
def key_add(of: str, name: str, ttl: float | None, read_only: bool) -> None:
    """Make a new key and print it; it is not shown again. What is logged in with it ends when it does."""
    made = secrets.token_urlsafe(32)
    may = {"ttl_s": ttl and int(ttl), "read_only": read_only or None}
    Api()("POST", *BASE, of, "keys", key_name=name, key=made, **may)
    print(made)


@key.add("rm", examples="sf key rm shop laptop")
@of
def key_rm(of: str, name: str, force: bool) -> None:
    """Remove a key; what was logged in with it ends at once."""
    api = Api()
    api("GET", *BASE, of)
    if (of, name) == api.known_as and not force:
        # Not even without a terminal: this is how root was locked out of its own server.
        hint = "--force does it; sf serve makes system's local key anew when it starts"
        raise Problem(f"{name} is the key that you use: you would be locked out", hint=hint, code=CONFLICT)
    confirm(f"remove key {name} of {of}? What is logged in with it ends at once.", force)
    api("DELETE", *BASE, of, "keys", name)
    say(f"{name} removed")
