"""What waits for a move or a snapshot says well only when it is so."""

from typing import Any

import click
import pytest

from cli.cloud.console import up
from cli.cloud.snapshots import moved, take
from cli.errors import CONFLICT, MISSING, Problem


class Server:
    """It has taken the snapshot away by the first look, and the guest is on this node."""

    def __init__(self, node: str, to: str) -> None:
        self.node, self.made = (
            node,
            {"uuid": "s", "instance_uuid": "i", "name": "my/web:1", "state": "initial", "to": to},
        )

    def __call__(self, method: str, *path: str, **body: Any) -> Any:
        guest = {"name": "web", "state": "created", "power": "on", "power_state": "on", "arriving": False}
        return (
            self.made if method == "POST" else [] if path[-1] == "snapshot" else guest | {"node": self.node}
        )


def test_a_move_that_was_ended_is_no_move() -> None:
    there: Any = Server("n2", to="n2")
    with click.Context(click.Command("sf"), obj={}):
        assert moved(there, "web", 9)["node"] == "n2"
    ended: Any = Server("n1", to="n2")
    with pytest.raises(Problem, match="web is on n1: its move was ended") as error:
        moved(ended, "web", 9)
    assert error.value.code == CONFLICT


def test_a_node_that_does_not_know_the_guest_yet_ends_no_wait_for_it() -> None:
    class Arriving(Server):
        """Until its console was asked for."""

        arriving = True

        def __call__(self, method: str, *path: str, **body: Any) -> Any:
            if path[-1] == "consoledata":
                self.arriving = False
                raise Problem("no instance i on node n2", code=MISSING)
            found = super().__call__(method, *path, **body)
            return found | {"uuid": "i", "arriving": self.arriving} if isinstance(found, dict) else found

    there: Any = Arriving("n2", to="n2")
    with click.Context(click.Command("sf"), obj={}):
        assert moved(there, "web", 9)["node"] == "n2"
    assert not there.arriving and up(there, {"uuid": "i"}) == ""


def test_a_snapshot_that_was_taken_away_is_none() -> None:
    away: Any = Server("n1", to="")
    with pytest.raises(Problem, match="my/web:1: it was taken away"):
        take(away, "web", "snapshot", 9)
