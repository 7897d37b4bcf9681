"""Disks that boot, for tests that need a guest and no operating system. They run in real mode."""


def boot_sector(message: str, *, repeat: bool = False) -> bytes:
    """Prints `message` on the first serial port through its data register, once or for ever, then halts."""
    text = message.encode("ascii") + b"\0"
    code = bytes.fromhex(
        "fa"  # cli
        "31c0 8ed8"  # ds = 0
        "be187c"  # start: si = 0x7c18, the text
        "baf803"  # dx = 0x3f8, COM1
        "ac"  # next: lodsb
        "84c0 7403"  # test al, al; jz done
        "ee"  # out dx, al
        "ebf8"  # jmp next
    )
    code += bytes.fromhex("ebf0" if repeat else "f4ebfd")  # done: jmp start, or hlt for ever
    sector = code.ljust(0x18, b"\0") + text
    return _disk(sector)


def typewriter() -> bytes:
    """Writes each key that is pressed on the screen, and on the first serial port."""
    code = bytes.fromhex(
        "baf803"  # dx = 0x3f8, COM1
        "b400 cd16"  # next: wait for a key: al
        "ee"  # out dx, al
        "b40e bb0700 cd10"  # write al, light on black
        "ebf2"  # jmp next
    )
    return _disk(code)


def _disk(sector: bytes) -> bytes:
    assert len(sector) <= 510
    return (sector.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")  # SeaBIOS refuses one of 512 bytes
