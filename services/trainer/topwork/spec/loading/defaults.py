"""What a spec does not say itself and takes from elsewhere, put into a document before it is checked."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from topwork.spec.loading.yaml_document import Path

# Parts of a spec of which each key may come from elsewhere; storage may as a whole.
PARTS = ("compute", "metrics")
STORAGE = "storage"


@dataclass
class SpecDefaults:
    """Values for keys that a spec leaves out.

    Attributes:
        source: Where they come from, for messages.
        values: Each value by its path.
        taken: Those of the paths that some spec has left out so far.
    """

    source: str
    values: Mapping[Path, Any]
    taken: set[Path] = field(default_factory=set)

    def fill(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], set[Path]]:
        """Put in what a document leaves out.

        Args:
            data: Plain data of the document; left as it is.

        Returns:
            A copy of the data with the defaults in it, and the paths of those.
        """
        result = deepcopy(dict(data))
        filled = {path for path, value in self.values.items() if _put(result, path, deepcopy(value))}
        self.taken |= filled
        return result, filled


def default_values(spec: Mapping[str, Any]) -> dict[Path, Any]:
    """Name the path of each default.

    Args:
        spec: `storage`, and any keys of `compute` and `metrics`, as in a job spec.

    Returns:
        The values by their paths.
    """
    found: dict[Path, Any] = {("spec", STORAGE): spec[STORAGE]} if spec.get(STORAGE) is not None else {}
    for part in PARTS:
        found |= {("spec", part, key): value for key, value in (spec.get(part) or {}).items() if value is not None}
    return found


def _put(data: dict[str, Any], path: Path, value: Any) -> bool:
    """Set a value that is not there; False where it is, or where the document has no such place."""
    here: Any = data
    for depth, step in enumerate(path):
        if not isinstance(here, dict):
            return False
        if depth == len(path) - 1:
            if here.get(step) is not None:
                return False
            here[step] = value
        elif here.get(step) is None:
            here[step] = {}
        here = here[step]
    return True
