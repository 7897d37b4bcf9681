"""What the cluster remembers of images."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from compute.cluster.records.stored import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(Stored):
    """What users add to an image name; the image itself lives in its store."""

    KIND: ClassVar[str] = "artifact"
    uuid: str
    metadata: dict[str, Any] = field(default_factory=dict)
