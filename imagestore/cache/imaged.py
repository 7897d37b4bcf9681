"""The image service's process: `sf imaged`; an agent's: `python -m imagestore.cache.imaged STATE_DIR OPTIONS STORE…`.

It leaves SIGTERM and SIGINT with everything flushed. Started by an agent (`while_needed`) it also ends by itself once
no guest reads through it, nothing is being filled and no agent has asked anything for a while. OPTIONS are JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagestore.cache.control import ControlServer
from imagestore.cache.open_images import Options
from imagestore.cache.service import ImageService
from imagestore.durable import locked, opened
from imagestore.errors import Conflict
from imagestore.settings import Settings
from imagestore.units import size_bytes

_LONELY_S = 3.0


def control_socket(state: Path) -> Path:
    """Where the service of a state directory listens."""
    return state / "run" / "imaged" / "sock"


def prepare(state: Path, uid: int = -1) -> None:
    """Make the service's directories; give them, and what another user's service left there, to this user.

    Nothing here follows a link: the directories may have been the user's before. The cache is closed to others.
    """
    for name in ("cache", "cache/readers", "cache/traces", "run/imaged", "run/nbd"):
        (state / name).mkdir(mode=0o711, parents=True, exist_ok=True)
        if name == "cache":
            (state / name).chmod(0o710)
        if uid >= 0:
            with opened(state / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as directory:
                os.fchown(directory, uid, -1)
                for entry in os.listdir(directory):  # noqa: PTH208 - of what is open, whatever its name is now
                    os.chown(entry, uid, -1, dir_fd=directory, follow_symlinks=False)


def unprivileged(state: Path, stores: Sequence[str]) -> tuple[list[str], Path | None]:
    """What root puts before the service's command line so that it runs as a user of its own, one without a name.

    What this user may not read (a program below /root, a private store, root's S3 keys) is returned: then it keeps the
    right to read everything, and nothing else of root's. Raises OSError.
    """
    # A number that neither adduser nor systemd gives away, nor a container's 16 bits leave out.
    uid = 60706 + zlib.crc32(os.fsencode(state.resolve())) % 478
    prepare(state, uid)
    needed = [Path(sys.executable), Path(sys.prefix), Path(__file__).parent, state]
    for parts in map(urlsplit, stores):
        if parts.scheme in ("", "file"):
            needed.append(Path(unquote(parts.path)) / "packs")
        elif parts.scheme == "s3":
            needed += [Path("~/.aws/config").expanduser(), Path("~/.aws/credentials").expanduser()]
    closed = next((path for path in needed if path.exists() and not _open_to_all(path)), None)
    rights = "-all,+dac_read_search" if closed else "-all"
    argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
    return [*argv, *(f"--{kind}={rights}" for kind in ("inh-caps", "ambient-caps", "bounding-set"))], closed


def _open_to_all(path: Path) -> bool:
    path = path.resolve()
    readable = path.is_dir() or path.stat().st_mode & 0o004
    return bool(readable) and all(p.stat().st_mode & 0o001 for p in (path, *path.parents) if p.is_dir())


def options_of(settings: Settings) -> Options:
    """What the settings say of a service, whoever starts it. Raises Invalid."""
    return Options(
        fill_bytes_s=settings.parsed("fill_rate", size_bytes, "0"),
        cache_bytes=settings.parsed("cache_size", size_bytes, "0"),
        read_ahead=settings.parsed("read_ahead", int, "2"),
    )


def run_service(state: Path, stores: Sequence[str], options: Options, *, while_needed: bool = False) -> None:
    """Serve until told to end. Raises Conflict when another one serves this state directory."""
    prepare(state)
    # Plain asyncio copies what it sends once more and answers half as many small reads.
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve(state, stores, options, while_needed))


async def _serve(state: Path, stores: Sequence[str], options: Options, while_needed: bool) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(state / "cache" / ".service", wait=False, mode=0o644))
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
                await asyncio.wait_for(ended.wait(), 1)
            if not (state / "cache").is_dir():
                break  # the installation was removed under us: nobody can reach us any more
            lonely = control.silent_s > (0 if control.alone else _LONELY_S)
            if while_needed and lonely and not service.images.busy:
                break
        await control.close()
        await service.close()


def main() -> None:
    """Entry point of the module."""
    state, options, *stores = sys.argv[1:]
    run_service(Path(state), stores, Options(**json.loads(options)), while_needed=True)


if __name__ == "__main__":
    main()
