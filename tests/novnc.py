"""noVNC for tests: what is installed, else the files of its package, which brings a lot with it, alone."""

import fcntl
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from guest_images.packages import fetch, unpack


def novnc() -> Path:
    """The directory that holds core/rfb.js; fetched at most once per machine."""
    installed = Path("/usr/share/novnc")
    if (installed / "core/rfb.js").exists():
        return installed
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sf-tests"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock-novnc").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "novnc/usr/share/novnc/core/rfb.js").exists():
            unpack(fetch(["novnc"], cache / "novnc.deb"), cache / "novnc")
    return cache / "novnc/usr/share/novnc"
