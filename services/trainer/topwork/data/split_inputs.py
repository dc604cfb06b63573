"""What the splits of a job depend on besides its spec and its dataset. Each process reads it once."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SplitList:
    """A list of the images of a split.

    Attributes:
        uri: Where it was read from.
        content: Content of the text file.
    """

    uri: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class SplitInputs:
    """Inputs of the splits.

    Attributes:
        lists: The list of each split, if the splits are lists.
    """

    lists: Mapping[str, SplitList] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return digests of everything that the splits depend on, for the keys of stages; empty if there is nothing."""
        if not self.lists:
            return {}
        return {"lists": {name: hashlib.sha256(part.content).hexdigest() for name, part in self.lists.items()}}
