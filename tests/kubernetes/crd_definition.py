"""Validation of CustomResourceDefinitions beyond their schemas: names, versions, printer columns, selectable fields."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from crd_structural import structural_problems

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
COLUMN_TYPES = {"integer", "number", "string", "boolean", "date"}
MAX_SELECTABLE_FIELDS = 8
# Printer columns accept a subset of JSONPath.
JSON_PATH = re.compile(
    r"(\.[A-Za-z_][A-Za-z0-9_-]*|\[\d+\]|\[\*\]|\['[^']+'\]|\[\?\(@\.[A-Za-z]+==[\"'][^\"']*[\"']\)\])+"
)
FIELD_PATH = re.compile(r"(\.[A-Za-z_][A-Za-z0-9_]*)+")
VERSION_KEYS = {"name", "served", "storage", "schema", "subresources", "additionalPrinterColumns", "selectableFields"}
VERSION_KEYS |= {"deprecated", "deprecationWarning"}


def definition_problems(definition: dict[str, Any]) -> list[str]:
    """Return why the API server would reject a CustomResourceDefinition; empty if it would not."""
    return [*_cached_problems(json.dumps(definition, sort_keys=True))]


@functools.lru_cache(maxsize=16)
def _cached_problems(text: str) -> tuple[str, ...]:
    """Many tests install the same definition, and to check its rules takes a second."""
    return tuple(_problems(json.loads(text)))


def _problems(definition: dict[str, Any]) -> Iterator[str]:
    spec = definition["spec"]
    names, versions = spec["names"], spec["versions"]
    expected = f"{names['plural']}.{spec['group']}"
    if definition["metadata"]["name"] != expected:
        yield 'metadata.name: must be spec.names.plural+"."+spec.group'
    for key in ("plural", "singular"):
        if not LABEL.fullmatch(names.get(key, names["kind"].lower())):
            yield f"spec.names.{key}: must be a lowercase RFC 1035 label"
    for key in ("shortNames", "categories"):
        for index, name in enumerate(names.get(key, ())):
            if not LABEL.fullmatch(name):
                yield f"spec.names.{key}[{index}]: must be a lowercase RFC 1035 label"
    if sum(version["storage"] for version in versions) != 1:
        yield "spec.versions: must have exactly one version marked as storage version"
    for index, version in enumerate(versions):
        yield from _version_problems(version, f"spec.versions[{index}]")


def _version_problems(version: dict[str, Any], path: str) -> Iterator[str]:
    for name in version.keys() - VERSION_KEYS:
        yield f"{path}.{name}: unknown field"
    schema = version.get("schema", {}).get("openAPIV3Schema")
    if schema is None:
        yield f"{path}.schema.openAPIV3Schema: Required value: schemas are required"
        return
    for problem in structural_problems(schema):
        yield f"{path}.schema.{problem}"
    for index, column in enumerate(version.get("additionalPrinterColumns", ())):
        yield from _column_problems(column, f"{path}.additionalPrinterColumns[{index}]")
    fields = version.get("selectableFields", ())
    if len(fields) > MAX_SELECTABLE_FIELDS:
        yield f"{path}.selectableFields: must have at most {MAX_SELECTABLE_FIELDS} items"
    for index, field in enumerate(fields):
        if not _is_selectable(field["jsonPath"], schema):
            yield f"{path}.selectableFields[{index}].jsonPath: must be a string, integer or boolean field"


def _column_problems(column: dict[str, Any], path: str) -> Iterator[str]:
    if column.keys() - {"name", "type", "format", "description", "priority", "jsonPath"}:
        yield f"{path}: unknown field"
    if column["type"] not in COLUMN_TYPES:
        yield f"{path}.type: Unsupported value: {column['type']!r}"
    if not JSON_PATH.fullmatch(column["jsonPath"]):
        yield f"{path}.jsonPath: must be a simple JSON path"


def _is_selectable(json_path: str, schema: dict[str, Any]) -> bool:
    if not FIELD_PATH.fullmatch(json_path) or json_path.startswith(".metadata."):
        return False
    for name in json_path.split(".")[1:]:
        schema = schema.get("properties", {}).get(name, {})
    return schema.get("type") in {"string", "integer", "boolean"}
