"""The `sf` command. Every group is imported only when it is used, so that help and completion stay quick."""

import logging
import os
import sys

import click

from cli.command import Group, shared
from cli.errors import INTERRUPTED, OK, USAGE, cleaned, exit_code, one_line

MEMBERS = {
    "image": ("cli.image.image:image", "Push, pull and manage disk images."),
    "instance": ("cli.cloud.inside:instance", "Create, watch and control guests."),
    "run": ("cli.cloud.run:run", "Run a command in a guest that is made for it."),
    "network": ("cli.cloud.network:network", "Virtual networks for guests."),
    "rules": ("cli.cloud.rules:rules", "Who may begin to speak to guests."),
    "store": ("cli.image.store:store", "Make, check and copy image stores."),
    "cache": ("cli.operate.caches:cache", "Images that nodes hold."),
    "mirror": ("cli.image.mirror:mirror", "Carry images for others, sign their names, serve them."),
    "remote": ("cli.image.store:remote", "Other stores to look names up in."),
    "events": ("cli.cloud.events:events", "What happened to what you see."),
    "top": ("cli.cloud.events:top", "What guests use, in the last 15 seconds."),
    "backup": ("cli.cloud.backup:backup", "Keep guests' disks, regularly."),
    "node": ("cli.operate.cluster:node", "Machines of the cluster."),
    "namespace": ("cli.operate.cluster:namespace", "Tenants."),
    "key": ("cli.operate.cluster:key", "Keys of a namespace."),
    "login": ("cli.cloud.login:login", "Keep a key for a server elsewhere."),
    "context": ("cli.cloud.login:context", "Servers that you logged in to."),
    "state": ("cli.operate.serve:state", "The server's own records, kept elsewhere and put back."),
    "serve": ("cli.operate.serve:serve", "Run the API and this machine's agent."),
    "agent": ("cli.operate.serve:agent", "Run this machine as a node of a server elsewhere."),
    "imaged": ("cli.operate.caches:imaged", "Run this node's image service."),
    "doctor": ("cli.operate.doctor:doctor", "Say what is well here and what is not."),
    "completion": ("cli.operate.serve:completion", "Print the shell's completion script."),
}

EPILOG = """\b
Start here:
  sf serve                                   run the API and the agent
  sf image push disk.qcow2 debian:12         keep a disk image under a name
  sf network create lan 10.42.0.0/24
  sf instance create web --image debian:12 --network lan --wait boot

\b
Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 authentication,
5 conflict, 6 no capacity or space, 7 timeout, 8 unreachable,
130 interrupted. Settings: flags, then SF_* variables, then
~/.config/sf/config.toml and /etc/sf/config.toml.
"""


@click.group(
    cls=Group,
    epilog=EPILOG,
    params=[shared("quiet"), shared("debug")],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="sf-cloud", prog_name="sf", message="%(prog)s %(version)s")
def sf() -> None:
    """Keep disk images in a content-addressed store; boot guests from them by name."""


sf.lazy |= MEMBERS


def _log() -> None:
    """What our libraries warn of is said; what others log is for --debug only."""
    handler = logging.StreamHandler()
    handler.addFilter(cleaned)
    handler.addFilter(lambda record: record.name.partition(".")[0] in ("imagestore", "compute", "net"))
    logging.basicConfig(format="sf: %(message)s", level=logging.WARNING, handlers=[handler])


def main() -> None:
    """Entry point: every way out has its code, and an error is one line on standard error."""
    flags: dict[str, str] = {}
    _log()
    try:
        result = sf.main(prog_name="sf", standalone_mode=False, obj=flags)
        sys.stdout.flush()
        code = result if isinstance(result, int) else OK
    except BrokenPipeError:
        # The reader (head, less) has gone: not an error, and nothing can be printed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = USAGE
    except (KeyboardInterrupt, click.Abort):
        print("sf: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last place that can turn an error into one line
        if flags.get("debug"):
            import traceback

            traceback.print_exc()
        print(f"sf: {one_line(error)}", file=sys.stderr)
        code = exit_code(error)
    sys.exit(code)
