"""Digests of the job spec, in a canonical form that new spec keys do not change.

Only values that differ from their default count: a spec that does not use a new key keeps its digest. A default whose
meaning changes needs a new format number of the stage, in `topwork.registry.stage_keys`.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from topwork.spec.compute import Compute

if TYPE_CHECKING:
    from topwork.spec.job import JobSpec

DIGEST_LENGTH = 16
"""Hex digits of a stage key: 64 bits."""

# Fields that do not affect any result.
NO_RESULT: dict[str, Any] = {
    "compute": dict.fromkeys(set(Compute.model_fields) - {"precision"}, True),
    "metrics": True,
    "tracking": True,
    "suspend": True,
}
# Fields that do not affect the trained weights. Checks of the data decide only whether a job fails.
NOT_TRAINED: dict[str, Any] = {
    **NO_RESULT,
    "dataset": dict.fromkeys(("on_corrupt_image", "max_rejected_ratio", "on_missing_class", "audit"), True),
    "evaluate": True,
    "publish": True,
}


def result_content(spec: "JobSpec") -> dict[str, Any]:
    """Return all values that can affect what a job does, except where and how fast it runs.

    Args:
        spec: The job's `spec`.

    Returns:
        The values that differ from their defaults, by their keys in the spec, as JSON types.
    """
    return _without_empty_compute(_non_default(spec, exclude=NO_RESULT))


def training_content(spec: "JobSpec") -> dict[str, Any]:
    """Return the values that can affect the trained weights, in the form of `result_content`."""
    return _without_empty_compute(_non_default(spec, exclude=NOT_TRAINED))


def evaluation_content(spec: "JobSpec") -> dict[str, Any]:
    """Return all values that can affect the evaluation and the published files. Gates change neither."""
    audit = _non_default(spec.dataset.audit)
    return {
        "evaluate": _non_default(spec.evaluate, exclude={"gates": True}),
        "publish": _non_default(spec.publish),
        **({"audit": audit} if audit else {}),
    }


def digest_of(content: Any) -> str:
    """Return the SHA-256 in hex of JSON content, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _non_default(model: Any, exclude: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=exclude)
    return content


def _without_empty_compute(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "compute" or value}
