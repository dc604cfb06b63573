"""Decoding of custom resources: unknown fields, null and defaults, as in the API server."""

import copy
from typing import Any

Schema = dict[str, Any]
# Fields of metadata.
OBJECT_META = {
    "name",
    "generateName",
    "namespace",
    "selfLink",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
}


def root_schema(schema: Schema) -> Schema:
    """Return the schema of an object with the fields that every object has."""
    implicit = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    metadata = {"type": "object", "properties": dict.fromkeys(OBJECT_META, ANYTHING)}
    return schema | {"properties": schema.get("properties", {}) | implicit | {"metadata": metadata}}


ANYTHING: Schema = {"x-kubernetes-preserve-unknown-fields": True}


def prune(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Remove the fields that are not in the schema, and return their paths."""
    unknown: list[str] = []
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            unknown += prune(item, schema["items"], f"{path}[{index}]")
    if not isinstance(value, dict):
        return unknown
    properties, additional = schema.get("properties", {}), schema.get("additionalProperties")
    is_open = bool(schema.get("x-kubernetes-preserve-unknown-fields")) or additional is True
    for name in [*value]:
        child_path = f"{path}.{name}" if path else name
        if name in properties:
            unknown += prune(value[name], properties[name], child_path)
        elif isinstance(additional, dict):
            unknown += prune(value[name], additional, child_path)
        elif not is_open:
            del value[name]
            unknown.append(child_path)
    return unknown


def prune_nulls(value: Any, schema: Schema) -> None:
    """Remove null, except where the schema allows it."""
    if isinstance(value, list):
        for item in value:
            prune_nulls(item, schema.get("items", {}))
    if not isinstance(value, dict):
        return
    for name in [*value]:
        child = child_schema(schema, name)
        if child is None:
            continue
        if value[name] is None and not child.get("nullable"):
            del value[name]
        else:
            prune_nulls(value[name], child)


def set_defaults(value: Any, schema: Schema) -> None:
    """Set the defaults of missing fields."""
    if isinstance(value, list):
        for item in value:
            set_defaults(item, schema.get("items", {}))
    if not isinstance(value, dict):
        return
    for name, child in schema.get("properties", {}).items():
        if "default" in child:
            value.setdefault(name, copy.deepcopy(child["default"]))
    for name, item in value.items():
        set_defaults(item, child_schema(schema, name) or {})


def child_schema(schema: Schema, name: str) -> Schema | None:
    """Return the schema of a field; None if it has none."""
    additional = schema.get("additionalProperties")
    return schema.get("properties", {}).get(name, additional if isinstance(additional, dict) else None)
