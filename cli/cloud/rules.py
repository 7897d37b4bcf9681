"""`sf rules`: who may begin to speak to which guests."""

import click

from cli.cloud.api import Api
from cli.cloud.interfaces import link_of
from cli.command import API, Group
from cli.output import confirm, say, show_list, show_one

COLUMNS = (
    ("name", "name"),
    ("allow", lambda r: " ".join(r["allow"]) or "nothing"),
    ("namespace", "namespace"),
)

rules = Group("rules", needs=API, help="Who may begin to speak to guests.")
_allow = click.option(
    "--allow",
    multiple=True,
    metavar="PROTOCOL[:PORTS][@BLOCK|@NETWORK]",
    help="tcp, udp, icmp, any. May be repeated.",
)


@rules.add(examples="sf rules create web --allow tcp:80,443 --allow tcp:22@192.0.2.0/24 --allow icmp")
@_allow
def create(name: str, allow: tuple[str, ...], form: str) -> None:
    """Make rules; without --allow nobody may. What a guest itself begins is answered."""
    show_one(Api()("POST", "rules", name=name, allow=list(allow)), COLUMNS, form)


@rules.add("set", examples="sf rules set web --allow tcp:443 --allow icmp")
@_allow
def set_(name: str, allow: tuple[str, ...], form: str) -> None:
    """Put other lines in the place of all that rules have. Connections that are still allowed go on."""
    show_one(Api()("PUT", "rules", name, allow=list(allow)), COLUMNS, form)


@rules.add(examples="sf rules ls")
def ls(everything: bool, form: str) -> None:
    """List rules."""
    show_list(Api()("GET", "rules", all=everything), COLUMNS, form)


@rules.add(examples="sf rules show web")
def show(name: str, form: str) -> None:
    """Show what rules allow."""
    show_one(Api()("GET", "rules", name), COLUMNS, form)


def _attach(verb: str, method: str, text: str) -> None:
    @rules.add(verb, help=text, examples=f"sf rules {verb} web www")
    @click.argument("guest", metavar="INSTANCE")
    def run(name: str, guest: str, interface: str | None) -> None:
        Api()(method, "interfaces", link_of(guest, interface), "rules", rules=name)


_attach("attach", "POST", "Let those alone speak to a guest whom its rules allow.")
_attach("detach", "DELETE", "Take rules from a guest; without any it is open, unless on an isolated network.")


@rules.add(examples="sf rules delete web")
def delete(names: tuple[str, ...], force: bool) -> None:
    """Delete rules that no guest has any more."""
    confirm(f"delete {' '.join(names)}?", force)
    for name in names:
        Api()("DELETE", "rules", name)
        say(f"{name} is deleted")
