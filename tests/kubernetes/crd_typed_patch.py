"""Errors of server-side apply, which converts the applied object to the types of the schema before it merges it."""

from collections.abc import Iterator
from typing import Any

from crd_pruning import Schema, child_schema


def typed_problems(value: Any, schema: Schema, path: str = "", *, is_open: bool = False) -> Iterator[str]:
    """Yield the fields of an applied object that are unknown or have another type.

    Args:
        value: The value.
        schema: Its schema; without a type, it accepts scalars, lists and maps.
        path: Its path.
        is_open: Whether a schema above it preserves unknown fields, and therefore all schemas below do.
    """
    if value is None:
        return
    kind = schema.get("type")
    is_open = is_open or bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if kind == "object" and not isinstance(value, dict):
        yield f"{path}: expected map, got &{{{_go_value(value)}}}"
    elif kind == "array" and not isinstance(value, list):
        yield f"{path}: expected list, got &{{{_go_value(value)}}}"
    elif kind == "string" and not isinstance(value, str):
        yield f"{path}: expected string, got &value.valueUnstructured{{Value:{_go_value(value)}}}"
    elif kind == "boolean" and not isinstance(value, bool):
        yield f"{path}: expected boolean, got &{{{_go_value(value)}}}"
    elif kind in {"integer", "number"} and (isinstance(value, bool) or not isinstance(value, int | float)):
        yield f"{path}: expected numeric (int or float), got {_go_type(value)}"
    elif isinstance(value, dict):
        yield from _field_problems(value, schema, path, is_open=is_open)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from typed_problems(item, schema.get("items", {}), f"{path}[{index}]", is_open=is_open)


def _field_problems(value: dict[str, Any], schema: Schema, path: str, *, is_open: bool) -> Iterator[str]:
    allows_others = is_open or "properties" not in schema or schema.get("additionalProperties") is True
    for name, item in value.items():
        child = child_schema(schema, name)
        if child is not None:
            yield from typed_problems(item, child, f"{path}.{name}", is_open=is_open)
        elif not allows_others:
            yield f"{path}.{name}: field not declared in schema"


def _go_type(value: Any) -> str:
    names: dict[type, str] = {bool: "bool", str: "string", list: "[]interface {}", dict: "map[string]interface {}"}
    return names.get(type(value), "float64")


def _go_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{' '.join(map(_go_value, value))}]"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{_go_value(item)}' for key, item in value.items())}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
