"""What a manifest and a store say about how their chunks were cut (docs/adr/0003-chunking.md)."""

from dataclasses import asdict, dataclass
from typing import Self

from imagestore.errors import Invalid

BLOCK = 4096  # chunks start and end at multiples of this many bytes, but at the end of a disk


@dataclass(frozen=True, slots=True)
class ChunkerParams:
    """The cutter and its parameters. Sizes in bytes, multiples of 4 KiB."""

    name: str = "blocks-1"
    min_bytes: int = 8 << 10
    average_bytes: int = 32 << 10
    max_bytes: int = 128 << 10

    def __post_init__(self) -> None:
        ordered = BLOCK <= self.min_bytes <= self.average_bytes <= self.max_bytes <= 1 << 20
        aligned = not (self.min_bytes % BLOCK or self.max_bytes % BLOCK)
        blocks = self.average_bytes // BLOCK
        if self.name != "blocks-1" or not ordered or not aligned or blocks * BLOCK != self.average_bytes:
            raise Invalid(f"unknown chunker or parameters: {asdict(self)}", hint="a newer sf may know them")
        if blocks & (blocks - 1):
            raise Invalid(f"the average chunk size is no power of two: {self.average_bytes}")

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Out of the JSON form, which `asdict` makes. Raises Invalid."""
        keys = {"name", "min_bytes", "average_bytes", "max_bytes"}
        if not isinstance(data, dict) or set(data) != keys:
            raise Invalid("chunker parameters are missing or unknown")
        if not isinstance(data["name"], str) or not all(type(data[k]) is int for k in keys - {"name"}):
            raise Invalid("chunker parameters have the wrong type")
        return cls(**data)
