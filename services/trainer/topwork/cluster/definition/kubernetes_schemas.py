"""Schemas of tolerations and affinity, which Kubernetes defines and `topwork.spec.kubernetes_types` checks."""

from typing import Any

from topwork.spec.kubernetes_types import (
    AFFINITY,
    NODE_OPERATORS,
    POD_OPERATORS,
    TOLERATION_ENUMS,
    TOLERATION_KEYS,
)

Schema = dict[str, Any]


def toleration_schema() -> Schema:
    """Return the schema of a toleration."""
    properties: dict[str, Schema] = {key: {"type": "string"} for key in TOLERATION_KEYS}
    properties["tolerationSeconds"] = {"type": "integer"}
    for key, values in TOLERATION_ENUMS.items():
        properties[key]["enum"] = list(values)
    return {"type": "object", "properties": properties}


def affinity_schema() -> Schema:
    """Return the schema of the affinity of a pod."""
    operators = {kind: NODE_OPERATORS if kind == "nodeAffinity" else POD_OPERATORS for kind in AFFINITY}
    properties = {kind: _schema(schema, operators[kind]) for kind, schema in AFFINITY.items()}
    return {"type": "object", "properties": properties}


def _schema(schema: Any, operators: tuple[str, ...]) -> Schema:
    """Convert a schema in the form of `AFFINITY`."""
    if schema is str:
        return {"type": "string"}
    if schema is int:
        return {"type": "integer", "minimum": 1, "maximum": 100}
    if isinstance(schema, list):
        return {"type": "array", "items": _schema(schema[0], operators), "x-kubernetes-list-type": "atomic"}
    if "*" in schema:
        return {"type": "object", "additionalProperties": _schema(schema["*"], operators)}
    result: Schema = {"type": "object"}
    if required := [key[:-1] for key in schema if key.endswith("!")]:
        result["required"] = required
    result["properties"] = {key.removesuffix("!"): _schema(inner, operators) for key, inner in schema.items()}
    if "operator" in result["properties"]:
        result["properties"]["operator"]["enum"] = list(operators)
    return result
