"""How far a long operation is: a value handed to a callable. Libraries never print."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """All in bytes since the operation began; `stage` is a word for people (push, pull, verify, …)."""

    stage: str
    done_bytes: int
    total_bytes: int
    new_bytes: int = 0
    known_bytes: int = 0
    written_bytes: int = 0


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """For callers who do not want to know."""
