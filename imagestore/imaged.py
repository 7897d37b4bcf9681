"""The image service's process: `python -m imagestore.imaged STATE_DIR STORE…`, or `sf imaged`.

It leaves SIGTERM and SIGINT with everything flushed. Started by an agent (`while_needed`) it also ends by itself once
no guest reads through it, nothing is being filled and no agent has asked anything for a while.
"""

import argparse
import asyncio
import contextlib
import fcntl
import grp
import os
import pwd
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from imagestore.control import ControlServer
from imagestore.errors import Conflict, Invalid
from imagestore.service import ImageService, Options

_LONELY_S = 3.0


def control_socket(state: Path) -> Path:
    """Where the service of a state directory listens."""
    return state / "run" / "imaged.sock"


def parse_size(text: str) -> int:
    """Bytes from `20G`, `500M` or a number. Raises Invalid."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:iB|B)?", text)
    if match is None:
        raise Invalid(f"not a size: {text!r}", hint="such as 20G or 500M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def run(
    state: Path,
    stores: Sequence[str],
    options: Options,
    *,
    user: str = "",
    group: str = "",
    while_needed: bool = False,
) -> None:
    """Serve until told to end. Raises Conflict when another one serves this state directory, Invalid."""
    try:
        options = options if not group else options.for_group(grp.getgrnam(group).gr_gid)
        entry = pwd.getpwnam(user) if user else None
    except KeyError as error:
        raise Invalid(f"there is no user {user!r} or no group {group!r}") from error
    directories = (state / "cache", state / "run", state / "run" / "nbd")
    for directory in directories:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        if entry:
            os.chown(directory, entry.pw_uid, entry.pw_gid)
    if entry:
        os.setgroups([options.socket_group] if group else [])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    # Plain asyncio copies what it sends once more and answers half as many small reads.
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve(state, stores, options, while_needed))


async def _serve(state: Path, stores: Sequence[str], options: Options, while_needed: bool) -> None:
    with (state / "cache" / ".service").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"an image service runs on {state} already") from error
        service = ImageService(state / "cache", state / "run" / "nbd", stores, options)
        control = ControlServer(service, control_socket(state))
        await service.start()
        await control.start()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await ended.wait()
            if not (state / "cache").is_dir():
                break  # the installation was removed under us: nobody can reach us any more
            if while_needed and not service.busy and control.silent_s > (0 if control.alone else _LONELY_S):
                break
        await control.close()
        await service.close()


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(prog="imagestore.imaged", description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("store", nargs="*")
    parser.add_argument("--user", default="")
    parser.add_argument("--group", default="")
    parser.add_argument("--fill-rate", type=parse_size, default=0)
    parser.add_argument("--cache-size", type=parse_size, default=0)
    parser.add_argument("--while-needed", action="store_true")
    told = parser.parse_args()
    options = Options(fill_bytes_s=told.fill_rate, cache_bytes=told.cache_size)
    run(told.state, told.store, options, user=told.user, group=told.group, while_needed=told.while_needed)


if __name__ == "__main__":
    main()
