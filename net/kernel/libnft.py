"""nft transactions through libnftables: 0.1 to 2 ms each, where a process of nft costs 3 to 30 (libnftables(3)).

A context's netlink socket belongs to the network namespace in which the calling thread stands.
"""

import ctypes
import functools
import subprocess
import threading
from pathlib import Path

from net.errors import Failed

_JSON, _TERSE = 1 << 4, 1 << 11
_lock = threading.Lock()  # the library's parser and its start-up are not safe beside themselves


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise Failed(f"libnftables cannot be loaded: {error}", hint="install the package nftables") from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    return library


def run(commands: str, *, json: bool = False) -> str:
    """Runs commands as one transaction: all of them hold, or none. Returns what they print; raises Failed.

    As JSON, what is in sets and maps is listed only where one of them is asked for.
    """
    terse = json and not commands.startswith(("list set", "list map"))
    # libnftables waits with select(2), which aborts the process when its socket's number is 1024 or more.
    with Path("/dev/null").open("rb") as file:
        descriptors_run_high = file.fileno() > 900
    if descriptors_run_high:
        argv = ["nft", "-jt" if terse else "-j", commands] if json else ["nft", "-f", "-"]
        done = subprocess.run(argv, input=commands.encode(), capture_output=True, timeout=60)
        status, printed, said = done.returncode, done.stdout, done.stderr
    else:
        with _lock:
            library = _library()
            context = library.nft_ctx_new(0)
            try:
                library.nft_ctx_buffer_output(context)
                library.nft_ctx_buffer_error(context)
                library.nft_ctx_output_set_flags(context, (_JSON | _TERSE if terse else _JSON) if json else 0)
                status = library.nft_run_cmd_from_buffer(context, commands.encode())
                printed = library.nft_ctx_get_output_buffer(context)
                said = library.nft_ctx_get_error_buffer(context)
            finally:
                library.nft_ctx_free(context)
    if status != 0:
        raise Failed(f"nft refused: {' '.join(said.decode(errors='replace').split())}"[:600])
    return printed.decode()
