"""Sizes, durations and switches as people write them, one parser each, for commands and settings alike."""

import re

from imagestore.errors import Invalid

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)([smhdw]?)", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SWITCH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def size_bytes(text: str, unit: str = "") -> int:
    """Bytes of `512M`, `8G`, `1.5T` (powers of two; `8GiB` will do); a bare number counts `unit`. Raises Invalid."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Invalid(f"not a size: {text[:40]!r}", hint="such as 512M or 8G")
    return int(float(match[1]) * 1024 ** " KMGTP".index(match[2].upper() or unit or " "))


def duration_s(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h`, `1d`, `4w`; a bare number counts seconds. Raises Invalid."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise Invalid(f"not a duration: {text[:40]!r}", hint="such as 90s, 30m, 2h, 1d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


def switch(text: str) -> bool:
    """Of `yes` or `no`, `on` or `off`, and TOML's own words. Raises Invalid."""
    if (found := _SWITCH.get(text.strip().lower())) is None:
        raise Invalid("neither yes nor no")
    return found


def size_text(count: float) -> str:
    """Bytes for people, in powers of two: 1.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
