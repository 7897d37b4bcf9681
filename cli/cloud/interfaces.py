"""`sf instance`, as far as it is about a guest's interfaces."""

import click

from cli.cloud.api import Api
from cli.cloud.create import attachment
from cli.cloud.instance import instance as instance
from cli.command import SIZE
from cli.errors import MISSING, Problem
from cli.output import show_one

LINKS = (
    ("address", "ipv4"),
    ("ipv6", "ipv6"),
    ("mac", "macaddr"),
    ("network", "network_uuid"),
    ("uuid", "uuid"),
)


@instance.add("add-interface", examples="sf instance add-interface web lan,address=10.42.0.9")
@click.argument("network", metavar="NETWORK[,…]")
def add_interface(name: str, network: str, form: str) -> None:
    """Plug an interface into a running guest."""
    api = Api()
    made = api("POST", "instances", name, "interfaces", network=attachment(api, network))
    show_one(made, LINKS, form, name="uuid")


@instance.add("remove-interface", examples="sf instance remove-interface web 10.42.0.9")
@click.argument("which", metavar="ADDRESS|MAC|UUID")
def remove_interface(name: str, which: str) -> None:
    """Unplug an interface from a running guest."""
    Api()("DELETE", "interfaces", link_of(name, which))


@instance.add("float", examples="sf instance float web 10.42.0.9\nsf instance float web 10.42.0.9 --undo")
@click.argument("which", metavar="ADDRESS|MAC|UUID")
@click.option("--undo", is_flag=True, help="Give the floating address back.")
def float_(name: str, which: str, form: str, undo: bool) -> None:
    """Make an interface reachable from outside, by an address of the floating pool."""
    made = Api()("POST", "interfaces", link_of(name, which), "defloat" if undo else "float")
    show_one(made, (*LINKS, ("floating", "floating")), form, name="uuid")


@instance.add(
    examples="""sf instance publish web 8080:80
    sf instance publish dns 53:53/udp --interface 10.42.0.9
    sf instance publish web 8080:80 --undo"""
)
@click.argument("ports", metavar="OUTER:INNER[/udp]")
@click.option("--undo", is_flag=True, help="Lead the ports there no more.")
def publish(name: str, ports: str, form: str, interface: str | None, undo: bool) -> None:
    """Make ports of a guest reachable at the addresses of the node that routes its network.

    Ranges are FIRST-LAST:FIRST-LAST. Refused are ports on which that node listens, and those that lead elsewhere.
    """
    verb = "DELETE" if undo else "POST"
    made = Api()(verb, "interfaces", link_of(name, interface), "publish", ports=ports)
    show_one(made, (*LINKS, ("published", "published")), form, name="uuid")


@instance.add(examples="sf instance limit web --in 10M --out 2M --packets-in 5000\nsf instance limit web")
@click.option("--in", "bytes_in", type=SIZE, default="0", help="Bytes in a second to the guest: 10M.")
@click.option("--out", "bytes_out", type=SIZE, default="0", help="From the guest.")
@click.option("--packets-in", type=click.IntRange(0, 2**40), default=0)
@click.option("--packets-out", type=click.IntRange(0, 2**40), default=0)
def limit(name: str, interface: str | None, **limits: int) -> None:
    """Limit what an interface carries in a second, from now on; what is not given is without limit."""
    Api()("PUT", "interfaces", link_of(name, interface), "limits", **limits)


def link_of(name: str, which: str | None) -> str:
    """The uuid of a guest's interface; None for its only one."""
    links = Api()("GET", "instances", name, "interfaces")
    keys = ("uuid", "ipv4", "ipv6", "macaddr")
    uuids = [str(link["uuid"]) for link in links if which is None or which in map(link.get, keys)]
    if len(uuids) != 1:
        which = f"no interface {which}" if which else f"{len(uuids)} interfaces, and --interface names none"
        raise Problem(f"{name} has {which}", hint=f"sf instance show {name}", code=MISSING)
    return uuids[0]
