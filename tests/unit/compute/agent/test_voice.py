"""What a guest's owner says of it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from compute.agent.guest import host
from compute.errors import Unavailable
from compute.wire.spec import NodeEvent


def test_what_is_waited_for_is_said_with_what_to_do_and_not_again_at_every_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, said = [1000.0], list[NodeEvent]()
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    voice = host.Voice(cast(Any, SimpleNamespace(note=said.append)), "uuid")
    busy = Unavailable("libvirt is busy", hint="restart libvirtd")
    for second in range(100):
        now[0] = 1000.0 + second
        voice.waits(busy)
    assert [event.message for event in said] == ["waiting: libvirt is busy (restart libvirtd)"]
    voice.waits(Unavailable("libvirt is away"))  # another reason is said as well
    assert len(said) == 2
    voice.waits(None)
    now[0] += 20
    voice.waits(busy)  # another wait, and a short one
    assert len(said) == 2
    now[0] += 31
    voice.waits(busy)
    assert len(said) == 3
