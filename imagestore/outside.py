"""What outsiders say, before it is a value of ours: JSON and numbers. Whatever is wrong with it is a ValueError.

Its message is one short line without the value's bulk; the caller, who knows whose words they were, makes the error
of its own kind from it.
"""

import json
import math
from typing import Any

DEPTH = 32  # more than any of our formats nests
MOST = 2**63 - 1
YEAR_9999_S = 253_402_300_799.0  # seconds since 1970 of the last day that calendars here can name


def read_json(data: bytes, *, most_bytes: int = 64 << 20) -> Any:
    """RFC 8259 and no more: no NaN, infinities or half surrogates, integers of 64 bits, DEPTH levels."""
    if len(data) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    try:
        text = data.decode()
        found = json.loads(text, parse_constant=_constant, parse_float=_float, parse_int=_int)
        if text.count("[") + text.count("{") > DEPTH:
            _check_depth(found)
        if "\\u" in text:  # half a surrogate pair cannot be encoded
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError("not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return found


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEPTH + 1):
        nested = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in nested for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _float(text: str) -> float:
    return real(float(text), -math.inf)


def _int(text: str) -> int:
    return whole(int(text) if len(text) < 32 else None, -MOST - 1)


def whole(value: object, low: int = 0, high: int = MOST) -> int:
    """An integer from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"not an integer from {low} to {high}: {value!r:.40}")
    return value


def real(value: object, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number from `low` to `high`; of integers those of 64 bits."""
    if type(value) is int:
        value = float(whole(value, -MOST - 1))
    if type(value) is not float or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"not a number from {low:g} to {high:g}: {value!r:.40}")
    return value


def decimal(text: str) -> int | None:
    """A header's number: 1 to 18 of the digits 0 to 9; None for all else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
