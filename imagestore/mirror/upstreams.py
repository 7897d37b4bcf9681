"""When each upstream was last there: a mirror's own memory, so that its keeper learns of one that went away."""

import json
import time
from pathlib import Path
from typing import Any

from imagestore.backends.directory import Directory


def read(path: Path) -> dict[str, dict[str, Any]]:
    """URL to {seen_s, gone_since_s (0 while it is there), error}; empty where nothing was noted or it is damaged."""
    try:
        body = json.loads(path.read_text())
        return {
            str(url): {
                "seen_s": float(seen["seen_s"]),
                "gone_since_s": float(seen["gone_since_s"]),
                "error": str(seen["error"]),
            }
            for url, seen in body.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note(path: Path, url: str, error: str) -> None:
    """Write down that a sync from `url` went well ("") or found it gone."""
    known = read(path)
    before = known.get(url, {"seen_s": 0.0, "gone_since_s": 0.0})
    now = time.time()
    known[url] = {
        "seen_s": before["seen_s"] if error else now,
        "gone_since_s": (before["gone_since_s"] or now) if error else 0.0,
        "error": error,
    }
    Directory(path.parent).put(path.name, json.dumps(known, indent=1).encode())
