"""The lines of objects' histories; `Transaction.event` writes them."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from compute.cluster.records.stored import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Stored):
    KIND: ClassVar[str] = "event"
    LIMIT: ClassVar[int] = 256
    """Events kept per object; up to TRIM more may wait for the broom."""
    TRIM: ClassVar[int] = 32
    name: str
    """`<type>/<object's uuid>/<microseconds, 20 digits>-<random>`: key order is time order."""
    timestamp_s: float
    type: str
    message: str
    node: str = ""
    duration_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
