"""Namespace defaults for storage, compute and metrics: filled into a document before it is validated.

In a TransferSearch, they are filled into its template.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from topwork.spec.loading.yaml_document import Path

# Each key of these sections of the spec can have a default. `storage` is a single value.
SECTIONS = ("compute", "metrics")
STORAGE = "storage"


@dataclass
class SpecDefaults:
    """Values for keys that a spec does not set.

    Attributes:
        source: Where the defaults come from, for messages.
        values: Default of each path.
        used: Paths of `values` that were filled into at least one document so far.
    """

    source: str
    values: Mapping[Path, Any]
    used: set[Path] = field(default_factory=set)

    def fill(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], set[Path]]:
        """Fill in keys that a document does not set.

        Args:
            data: Plain data of the document; not modified.

        Returns:
            A copy of the data with defaults, and the paths that were filled in.
        """
        result = deepcopy(dict(data))
        parent = ("spec", "template") if data.get("kind") == "TransferSearch" else ("spec",)
        filled = set()
        for path, value in self.values.items():
            target = (*parent, *path[1:])
            if _set_if_unset(result, target, deepcopy(value)):
                filled.add(target)
                self.used.add(path)
        return result, filled


def flatten_defaults(spec: Mapping[str, Any]) -> dict[Path, Any]:
    """Convert a partial spec to a mapping from paths to default values.

    Args:
        spec: `storage`, and any keys of `compute` and `metrics`, as in a job spec.

    Returns:
        The default of each path.

    Example:
        >>> flatten_defaults({"storage": "s3://bucket", "compute": {"gpus": 2}})
        {('spec', 'storage'): 's3://bucket', ('spec', 'compute', 'gpus'): 2}
    """
    values: dict[Path, Any] = {("spec", STORAGE): spec[STORAGE]} if spec.get(STORAGE) is not None else {}
    for section in SECTIONS:
        values |= {
            ("spec", section, key): value for key, value in (spec.get(section) or {}).items() if value is not None
        }
    return values


def _set_if_unset(data: dict[str, Any], path: Path, value: Any) -> bool:
    """Set a value and return True, or return False if the path is set or a parent is not a mapping."""
    current: Any = data
    for depth, step in enumerate(path):
        if not isinstance(current, dict):
            return False
        if depth == len(path) - 1:
            if current.get(step) is not None:
                return False
            current[step] = value
        elif current.get(step) is None:
            current[step] = {}
        current = current[step]
    return True
