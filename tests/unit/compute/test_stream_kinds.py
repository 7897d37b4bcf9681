"""Which streams of a node a guest's owner may ask for."""

from typing import Any
from unittest.mock import MagicMock

import pytest

from compute.api import streams
from compute.errors import Invalid


@pytest.mark.parametrize("kind", ["arrive", "leave", "anything"])
def test_what_carries_guests_that_move_is_the_servers_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks would be in the middle of a move that is the administrator's, or wait in the node's agent for ever."""
    known: Any = MagicMock(node="n1", uuid="u")
    monkeypatch.setattr(streams, "_find", lambda ctx, ref: known)
    with pytest.raises(Invalid, match="no stream"):
        streams._target(MagicMock(), "web", kind, {"move": ""})
    for own in ("console", "exec", "vnc", "screen"):
        assert streams._target(MagicMock(), "web", own, {}) == (known, "n1", "u", {})
