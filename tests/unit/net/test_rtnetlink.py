"""What the kernel says of its tables, read out of its bytes."""

import socket
import struct

from net.kernel import rtnetlink

_NEWLINK, _DONE, _INTERRUPTED = 16, 3, 0x10


def _message(kind: int, body: bytes, flags: int = 2) -> bytes:
    return struct.pack("=LHHLL", 16 + len(body), kind, flags, 1, 0) + body


def _device(index: int, name: bytes, flags: int = 2) -> bytes:
    attribute = struct.pack("=HH4s", 8, 3, name)
    return _message(_NEWLINK, struct.pack("=BxHiII", 0, 0, index, 1, 0) + attribute, flags)


def test_a_dump_that_a_change_came_between_is_asked_for_again() -> None:
    """A device that such a one lacks would be made anew under the network that uses it."""
    done = _message(_DONE, bytes(4))
    kernel, asking = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, asking:
        for answer in (
            [_device(1, b"one"), _message(_DONE, bytes(4), 2 | _INTERRUPTED)],
            [_device(1, b"one"), _device(3, b"two", 2 | _INTERRUPTED) + done],
            [_device(1, b"one") + _device(2, b"mid"), _device(3, b"two"), done],
        ):
            for part in answer:
                kernel.send(part)
        assert [link.name for link in rtnetlink.links(asking).values()] == ["one", "mid", "two"]
        asked = [kernel.recv(99) for _ in range(3)]
        assert asked[0] == asked[1] == asked[2]


def test_a_kernel_whose_tables_always_change_is_believed_in_the_end() -> None:
    kernel, asking = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, asking:
        for _ in range(rtnetlink._TRIES):
            kernel.send(_device(1, b"one", 2 | _INTERRUPTED) + _message(_DONE, bytes(4)))
        assert [link.name for link in rtnetlink.links(asking).values()] == ["one"]
