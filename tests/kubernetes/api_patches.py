"""Patches of the API server used in tests: JSON merge patch (RFC 7396) and JSON patch (RFC 6902)."""

import copy
from typing import Any

import api_statuses
from api_statuses import ApiError


def merge_patch(value: Any, change: Any) -> Any:
    """Mappings merge, None removes, other values replace."""
    if not isinstance(change, dict):
        return change
    merged = dict(value) if isinstance(value, dict) else {}
    for key, new in change.items():
        if new is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), new)
    return merged


def json_patch(value: Any, operations: list[dict[str, Any]]) -> Any:
    """Apply the operations add, replace, remove and test."""
    value = copy.deepcopy(value)
    for operation in operations:
        *parents, last = [name.replace("~1", "/").replace("~0", "~") for name in operation["path"].split("/")[1:]]
        parent = value
        try:
            for name in parents:
                parent = parent[int(name)] if isinstance(parent, list) else parent[name]
            _change(parent, last, operation)
        except (KeyError, IndexError, ValueError):
            message = (
                "the server rejected our request due to an error in our request: "
                f"{operation['op']} operation does not apply: doc is missing path: {operation['path']}: missing value"
            )
            raise ApiError(api_statuses.status(422, "Invalid", message)) from None
    return value


def _change(parent: Any, name: str, operation: dict[str, Any]) -> None:
    index: Any = name
    if isinstance(parent, list):
        index = len(parent) if name == "-" else int(name)
    if operation["op"] == "add" and isinstance(parent, list):
        parent.insert(index, operation["value"])
    elif operation["op"] == "add":
        parent[index] = operation["value"]
    elif operation["op"] == "replace":
        _ = parent[index]
        parent[index] = operation["value"]
    elif operation["op"] == "remove":
        del parent[index]
    elif operation["op"] != "test" or parent[index] != operation["value"]:
        raise ValueError(name)
