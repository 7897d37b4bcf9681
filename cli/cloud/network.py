"""`sf network`: virtual networks."""

from typing import Any

import click

from cli.cloud.api import Api, poll
from cli.command import API, Group
from cli.errors import USAGE, Problem, clean
from cli.output import Row, ago, confirm, say, show_list, show_one

COLUMNS = (
    ("name", "name"),
    ("netblock", lambda n: " ".join(filter(None, (n["bridge"], n["netblock"] or n["netblock6"])))),
    ("vni", "vxlan_id"),
    ("state", "state"),
    ("services", lambda n: " ".join(s for s in ("dhcp", "dns", "nat") if n.get(f"provide_{s}"))),
)
MADE = (*COLUMNS, ("ipv6", "netblock6"))
FIELDS = (
    *MADE,
    ("uuid", "uuid"),
    ("router", "router_node"),
    ("floating gateway", "floating_gateway"),
    ("namespace", "namespace"),
    ("dns", lambda n: [f"{entry} {address}" for entry, address in sorted(n["dns"].items())]),
    ("addresses", lambda n: [link_text(i, i.get("instance_uuid") or "") for i in n.get("interfaces", [])]),
)
FINDINGS = (("node", "node"), ("problem", "problem"), ("fix", "fix"))
EVENTS = (
    ("time", lambda e: ago(e.get("timestamp"))),
    ("type", "type"),
    ("node", "fqdn"),
    ("message", "message"),
    ("by", lambda e: " from ".join(filter(None, (e.get("by"), e.get("from"))))),
)

network = Group("network", needs=API, help="Virtual networks for guests.")


def link_text(link: Row, whose: str = "") -> str:
    """An interface: its addresses, its MAC, whose it is, what leads to it from outside."""
    known = " ".join(filter(None, map(link.get, ("ipv4", "ipv6")))) or "by DHCP"
    floating = f"floating {link['floating']}" if link.get("floating") else ""
    ports = " ".join(["published", *link["published"]]) if link.get("published") else ""
    return " ".join(filter(None, (known, link.get("macaddr"), whose, floating, ports)))


@network.add(
    examples="""sf network create lan 10.42.0.0/24
    sf network create both 10.44.0.0/24 --ipv6 auto
    sf network create six --ipv6 auto
    sf network create quiet 10.43.0.0/24 --no-nat --no-dhcp
    sf network create home --bridge br0
    sf network create home --bridge br0 192.168.1.0/24 --range 192.168.1.200-192.168.1.220"""
)
@click.argument("netblock", required=False)
@click.option(
    "--ipv6",
    metavar="auto|PREFIX/64",
    help="IPv6, beside NETBLOCK or alone: a block of its own, or a site's.",
)
@click.option("--slaac", is_flag=True, help="Guests may choose IPv6 addresses for themselves, too.")
@click.option("--isolated", is_flag=True, help="Nobody may speak to its guests but who their rules allow.")
@click.option("--bridge", metavar="DEVICE", help="The nodes' own: guests get addresses of its LAN's DHCP.")
@click.option("--range", metavar="A-B", help="What of the LAN's NETBLOCK is for guests, without DHCP.")
@click.option("--gateway", metavar="ADDRESS", help="The LAN's router, if not the first address of NETBLOCK.")
@click.option("--dhcp/--no-dhcp", default=True, show_default=True, help="Hand out addresses.")
@click.option("--nat/--no-nat", default=True, show_default=True, help="Let guests reach the world.")
@click.option("--dns/--no-dns", default=True, show_default=True, help="Answer for guests' names.")
def create(name: str, netblock: str | None, form: str, **given: Any) -> None:
    """Make a network with the IPv4 addresses of NETBLOCK, a /29 or larger; or one on the nodes' own LAN.

    Guests get the IPv6 address that goes with their IPv4 one; without NETBLOCK, IPv6 alone. An administrator's PREFIX
    is routed as it is: the site's routers must lead it to the node that routes the network. What `auto` chooses is
    translated on its way out.

    The bridge must be there on each node that is to run its guests. Nothing of it is ever changed.
    """
    if not (netblock or given["bridge"] or given["ipv6"]):
        raise Problem("no NETBLOCK", hint=f"sf network create {name} 10.42.0.0/24", code=USAGE)
    plain = ("isolated", "ipv6", "slaac", "bridge", "gateway", "range")
    api, wanted = Api(), {key: given[key] for key in plain}
    wanted |= {f"provide_{key}": given[key] for key in ("dhcp", "nat", "dns")}
    show_one(api("POST", "networks", name=name, netblock=netblock or "", **wanted), MADE, form)
    if given["bridge"]:  # the nodes look while we wait
        for row in next((rows for _ in poll(3, 0.5) if (rows := api("GET", "networks", name, "doctor"))), ()):
            say(f"{row['node']}: {row['problem']}{row['fix'] and '; ' + row['fix']}")


@network.add(examples="sf network ls --format json")
def ls(everything: bool, form: str) -> None:
    """List networks."""
    show_list(Api()("GET", "networks", all=everything), COLUMNS, form)


@network.add(examples="sf network show lan")
def show(name: str, form: str) -> None:
    """Show a network and who has which address on it."""
    api = Api()
    found = api("GET", "networks", name)
    show_one({**found, "interfaces": api("GET", "networks", name, "interfaces")}, FIELDS, form)


@network.add(examples="sf network delete lan")
def delete(names: tuple[str, ...], force: bool) -> None:
    """Delete networks that no guest uses any more."""
    confirm(f"delete {' '.join(names)}?", force)
    api = Api()
    for name in names:
        api("DELETE", "networks", name)
        say(f"{name} is being deleted")


@network.add(
    examples="""sf network dns lan db.example.net 10.42.0.9
    sf network dns lan printer 192.168.1.9
    sf network dns lan printer --undo"""
)
@click.argument("entry", metavar="ENTRY")
@click.argument("address", required=False)
@click.option("--undo", is_flag=True, help="Forget the entry.")
def dns(name: str, entry: str, address: str | None, undo: bool) -> None:
    """Have a network's DNS answer for ENTRY with ADDRESS, and for ADDRESS with ENTRY. `sf network show` lists them."""
    if undo == bool(address):
        raise Problem("an ADDRESS, or --undo", hint=f"sf network dns {name} {entry} 10.42.0.9", code=USAGE)
    what = {"name": entry} | ({} if undo else {"value": address})
    Api()("DELETE" if undo else "POST", "networks", name, "dns", **what)


@network.add(examples="sf network ping lan 10.42.0.17")
@click.argument("address")
def ping(name: str, address: str) -> None:
    """Ping ADDRESS from the router of a network; exit 1 when nothing answers."""
    answer = Api()("GET", "networks", name, "ping", address)
    print("\n".join(map(clean, answer["stdout"])))
    if not any("bytes from" in line for line in answer["stdout"]):
        raise Problem(f"{address} does not answer on {name}", hint=" ".join(answer["stderr"]))


@network.add(examples="sf network doctor lan")
def doctor(name: str, form: str) -> None:
    """Compare a network with what it should be, on every node; exit 1 when anything differs."""
    found = Api()("GET", "networks", name, "doctor")
    if found or form != "table":
        show_list(found, FINDINGS, form, name="problem")
    if found:
        raise Problem(f"{name}: {len(found)} findings")
    say(f"{name} is as it should be, on every node")


@network.add(examples="sf network events lan")
def events(name: str, limit: int, form: str) -> None:
    """What happened to a network, newest first."""
    show_list(Api()("GET", "networks", name, "events", limit=limit), EVENTS, form, name="message")
