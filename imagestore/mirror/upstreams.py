"""When each upstream was last there: a mirror's own memory, so that its keeper learns of one that went away."""

import json
import time
from pathlib import Path
from typing import Any

from imagestore.backends.directory import Directory
from imagestore.outside import read_json, real


def read(path: Path) -> dict[str, dict[str, Any]]:
    """URL to {seen_s, gone_since_s (0 while it is there), error}; empty where nothing was noted or it is damaged."""
    try:
        noted = read_json(path.read_bytes()).items()
        times = ("seen_s", "gone_since_s")
        return {
            str(url): {key: real(seen[key]) for key in times} | {"error": str(seen["error"])}
            for url, seen in noted
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note(path: Path, url: str, error: str) -> None:
    """Write down that a sync from `url` went well ("") or found it gone."""
    known, now = read(path), time.time()
    before = known.get(url, {"seen_s": 0.0, "gone_since_s": 0.0})
    gone = {"seen_s": before["seen_s"], "gone_since_s": before["gone_since_s"] or now}
    known[url] = (gone if error else {"seen_s": now, "gone_since_s": 0.0}) | {"error": error}
    Directory(path.parent).put(path.name, json.dumps(known, indent=1).encode())
