"""What the splits of a job depend on besides its spec and its dataset. Each process reads it once."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class SplitList:
    """A list of the images of a split.

    Attributes:
        uri: Where it was read from.
        content: Content of the text file.
    """

    uri: str
    content: bytes = field(repr=False)


class EvaluatedImage(NamedTuple):
    """An image on which a version was evaluated.

    Attributes:
        digest: First 16 hex digits of the digest of its pixels.
        class_name: Its class.
        name: Its name in the source.
    """

    digest: str
    class_name: str
    name: str


@dataclass(frozen=True)
class PinnedTest:
    """The test set of an earlier version.

    Attributes:
        version: Version number.
        images: Its images; images with the same pixels occur several times.
    """

    version: int
    images: tuple[EvaluatedImage, ...] = field(repr=False)

    def describe(self) -> str:
        """Return a sentence for the log and the report."""
        return f"The test split is the test set of version {self.version} ({len(self.images)} images)."


@dataclass(frozen=True)
class SplitInputs:
    """Inputs of the splits.

    Attributes:
        lists: The list of each split, if the splits are lists.
        pinned: The test set of the version that `pinTest` names; None without it.
    """

    lists: Mapping[str, SplitList] = field(default_factory=dict)
    pinned: PinnedTest | None = None

    def content(self) -> dict[str, Any]:
        """Return digests of everything that the splits depend on, for the keys of stages; empty if there is nothing."""
        content: dict[str, Any] = {}
        if self.lists:
            content["lists"] = {name: _sha256(part.content) for name, part in self.lists.items()}
        if self.pinned:
            content["pinnedTest"] = _sha256(json.dumps(self.pinned.images).encode())
        return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
