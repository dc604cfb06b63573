"""Tables of the API server used in tests: the columns that `kubectl get` prints."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from api_kinds import Kind, Object

NAME_COLUMN = {"name": "Name", "type": "string", "format": "name", "description": "Name of the object.", "priority": 0}
AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
STEP = re.compile(r"\.([A-Za-z0-9_-]+)|\['([^']+)'\]|\[(\d+|\*)\]|\[\?\(@\.([A-Za-z]+)==[\"']([^\"']*)[\"']\)\]")


def table(
    kind: Kind, objects: list[Object], metadata: Object, *, include: str = "", with_columns: bool = True
) -> Object:
    """Return a Table.

    Args:
        kind: Kind of the objects.
        objects: The objects, one per row.
        metadata: Metadata of the list.
        include: What each row contains: Metadata (default), Object or None.
        with_columns: Whether to define the columns; only the first event of a watch does.
    """
    columns = kind.served_version.get("additionalPrinterColumns") or [AGE]
    definitions = [
        {"format": "", "description": "", "priority": 0} | {key: column[key] for key in column if key != "jsonPath"}
        for column in columns
    ]
    rows = [
        {"cells": [obj["metadata"]["name"], *(_cell(obj, column) for column in columns)]}
        | _row_object(kind, obj, include)
        for obj in objects
    ]
    content = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
    return content | {"columnDefinitions": [NAME_COLUMN, *definitions] if with_columns else None, "rows": rows}


def _row_object(kind: Kind, obj: Object, include: str) -> Object:
    if include == "None":
        return {}
    if include == "Object":
        return {"object": {"kind": kind.name, "apiVersion": kind.api_version} | obj}
    partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
    return {"object": partial}


def _cell(obj: Object, column: Object) -> Any:
    """Return the content of a cell: None if the object has no value of the type of the column."""
    value = next(_values(obj, column["jsonPath"]), None)
    kind = column["type"]
    if value is None:
        return None
    if kind == "string":
        return value if isinstance(value, str) else _text(value)
    if kind == "date":
        return _age(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        return int(value) if is_number else None
    return value if (is_number if kind == "number" else isinstance(value, bool)) else None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(value: Any, path: str) -> Iterator[Any]:
    """Yield the values of a JSONPath, such as `.status.conditions[?(@.type=="Complete")].status`."""
    values = [value]
    for name, quoted, index, key, expected in STEP.findall(path):
        found: list[Any] = []
        for item in values:
            if name or quoted:
                found += [item[name or quoted]] if isinstance(item, dict) and (name or quoted) in item else []
            elif isinstance(item, list) and key:
                found += [element for element in item if element.get(key) == expected]
            elif isinstance(item, list):
                found += item if index == "*" else item[int(index) : int(index) + 1]
        values = found
    yield from values


def _age(timestamp: str) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
    except (TypeError, ValueError):
        return "<invalid>"
    return human_duration(int(seconds))


def human_duration(seconds: int) -> str:
    """Format a duration as kubectl does: 90s, 5m30s, 45m, 7h5m, 30h, 3d4h, 100d."""
    if seconds < 0:
        return "0s" if seconds >= -2 else "<invalid>"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    return f"{days}d" if days < 730 else f"{days // 365}y{days % 365}d"
