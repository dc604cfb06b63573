"""Rules of structural schemas, which the API server requires of a CustomResourceDefinition.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

from crd_cel import compile_problem
from crd_pruning import Schema, child_schema, prune, set_defaults
from crd_validation import validate_schema

TYPES = {"array", "boolean", "integer", "number", "object", "string"}
SCALARS = {"boolean", "integer", "number", "string"}
VALUE_VALIDATIONS = {
    "allOf",
    "anyOf",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "oneOf",
    "pattern",
    "required",
}
STRUCTURE = {"type", "properties", "items", "additionalProperties", "default", "description", "title", "nullable"}
STRUCTURE |= {"example", "externalDocs"}
EXTENSIONS = {
    f"x-kubernetes-{name}"
    for name in (
        "embedded-resource",
        "int-or-string",
        "list-map-keys",
        "list-type",
        "map-type",
        "preserve-unknown-fields",
        "validations",
    )
}
FORBIDDEN = {"definitions", "dependencies", "deprecated", "discriminator", "id", "patternProperties", "readOnly"}
FORBIDDEN |= {"writeOnly", "xml", "$ref", "uniqueItems"}
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]
RULE_KEYS = {"rule", "message", "messageExpression", "reason", "fieldPath", "optionalOldSelf"}
REASONS = {"FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"}
MAX_MESSAGE = 2048
# Syntax that RE2 does not have: look-around, backreferences, possessive quantifiers, atomic groups.
NOT_RE2 = re.compile(r"\(\?(?:[=!>]|<[=!])|\\[1-9]|[*+?}]\+")


def structural_problems(schema: Schema) -> list[str]:
    """Return why a schema is not structural; empty if it is."""
    return [*_node_problems(schema, "openAPIV3Schema", is_root=True)]


def _node_problems(schema: Schema, path: str, *, is_root: bool = False) -> Iterator[str]:
    yield from _keyword_problems(schema, path)
    yield from _type_problems(schema, path, is_root=is_root)
    for name, child in schema.get("properties", {}).items():
        if not (is_root and name == "metadata"):
            yield from _node_problems(child, f"{path}.properties[{name}]")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from _node_problems(schema[name], f"{path}.{name}")
    if is_root:
        yield from _metadata_problems(schema.get("properties", {}).get("metadata", {"type": "object"}), path)
    yield from _junctor_problems(schema, schema, path)
    yield from _list_and_map_problems(schema, path)
    yield from _default_problems(schema, path)
    for index, rule in enumerate(schema.get("x-kubernetes-validations", ())):
        yield from _rule_problems(rule, schema, f"{path}.x-kubernetes-validations[{index}]", is_root=is_root)


def _keyword_problems(schema: Schema, path: str) -> Iterator[str]:
    for name in schema:
        if name in FORBIDDEN:
            yield f"{path}.{name}: Forbidden: {name} must not be set"
        elif name not in VALUE_VALIDATIONS | STRUCTURE | EXTENSIONS:
            yield f"{path}.{name}: unknown field"
    if "pattern" in schema and (problem := _pattern_problem(schema["pattern"])):
        yield f"{path}.pattern: must be a valid regular expression, but isn't: {problem}"
    for name in ("enum", "required"):
        values = schema.get(name, ())
        if len({repr(value) for value in values}) < len(values):
            yield f"{path}.{name}: Duplicate value"


def _pattern_problem(pattern: str) -> str:
    try:
        re.compile(pattern.replace(r"\z", r"\Z"))
    except re.error as error:
        return str(error)
    match = NOT_RE2.search(pattern)
    return f"invalid or unsupported Perl syntax: `{match[0]}`" if match else ""


def _type_problems(schema: Schema, path: str, *, is_root: bool) -> Iterator[str]:
    kind = schema.get("type")
    is_int_or_string = schema.get("x-kubernetes-int-or-string")
    preserves = schema.get("x-kubernetes-preserve-unknown-fields")
    if kind is not None and kind not in TYPES:
        yield f"{path}.type: Unsupported value: {kind!r}"
    if is_root and kind != "object":
        yield f"{path}.type: must be object at the root"
    if kind is None and not is_int_or_string and not preserves:
        yield f"{path}.type: Required value: must not be empty for specified object fields"
    if is_int_or_string and preserves:
        yield f"{path}.x-kubernetes-preserve-unknown-fields: must be false if x-kubernetes-int-or-string is true"
    if preserves is False:
        yield f"{path}.x-kubernetes-preserve-unknown-fields: must be true or undefined"
    yield from _children_problems(schema, path, is_root=is_root)


def _children_problems(schema: Schema, path: str, *, is_root: bool) -> Iterator[str]:
    if schema.get("type") == "array" and not isinstance(schema.get("items"), dict):
        yield f"{path}.items: Required value: must be specified"
    additional = schema.get("additionalProperties")
    if additional is False:
        yield f"{path}.additionalProperties: Forbidden: must not be false"
    if additional and "properties" in schema:
        yield f"{path}.additionalProperties: Forbidden: additionalProperties and properties are mutual exclusive"
    if additional and is_root:
        yield f"{path}.additionalProperties: Forbidden: must not be used at the root"


def _metadata_problems(metadata: Schema, path: str) -> Iterator[str]:
    allowed = metadata.get("properties", {}).keys() <= {"name", "generateName"}
    if metadata.get("type") != "object" or not allowed or metadata.keys() - {"type", "properties"}:
        reason = "must not specify anything other than name and generateName, but metadata is implicitly specified"
        yield f"{path}.properties[metadata]: Forbidden: {reason}"


def _junctor_problems(nested: Schema, main: Schema, path: str) -> Iterator[str]:
    """Check that allOf, anyOf, oneOf and not only restrict values of fields that the main schema specifies."""
    for name in ("allOf", "anyOf", "oneOf"):
        if name == "anyOf" and main.get("x-kubernetes-int-or-string") and nested.get(name) == INT_OR_STRING:
            continue
        for index, member in enumerate(nested.get(name, ())):
            yield from _nested_problems(member, main, f"{path}.{name}[{index}]")
    if "not" in nested:
        yield from _nested_problems(nested["not"], main, f"{path}.not")


def _nested_problems(nested: Schema, main: Schema, path: str) -> Iterator[str]:
    yield from _keyword_problems(nested, path)
    for name in ("type", "additionalProperties", "default", "title", "description", "nullable", *sorted(EXTENSIONS)):
        if name in nested:
            yield f"{path}.{name}: Forbidden: must be undefined to be structural"
    for name, child in nested.get("properties", {}).items():
        specified = child_schema(main, name) if "properties" in main else None
        if specified is None:
            yield f"{path}.properties[{name}]: Required value: must be specified in the main schema, too"
        yield from _nested_problems(child, specified or {}, f"{path}.properties[{name}]")
    if "items" in nested:
        if "items" not in main:
            yield f"{path}.items: Required value: must be specified in the main schema, too"
        yield from _nested_problems(nested["items"], main.get("items", {}), f"{path}.items")
    yield from _junctor_problems(nested, main, path)


def _list_and_map_problems(schema: Schema, path: str) -> Iterator[str]:
    list_type, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", [])
    items = schema.get("items", {})
    if list_type is not None and schema.get("type") != "array":
        yield f"{path}.x-kubernetes-list-type: must be array"
    if list_type not in {None, "atomic", "set", "map"}:
        yield f"{path}.x-kubernetes-list-type: Unsupported value: {list_type!r}"
    if bool(keys) != (list_type == "map"):
        yield f"{path}.x-kubernetes-list-map-keys: required if x-kubernetes-list-type is map, forbidden otherwise"
    is_atomic = items.get("x-kubernetes-map-type") == "atomic" or items.get("x-kubernetes-list-type") == "atomic"
    if list_type == "set" and items.get("type") not in SCALARS and not is_atomic:
        yield f"{path}.items: items of a set must be scalars or atomic"
    if list_type == "set" and items.get("nullable"):
        yield f"{path}.items.nullable: Forbidden: cannot be nullable when x-kubernetes-list-type is set"
    if list_type == "map" and items.get("type") != "object":
        yield f"{path}.items.type: must be object if parent array's x-kubernetes-list-type is map"
    yield from _key_problems(keys, items, path)
    map_type = schema.get("x-kubernetes-map-type")
    if map_type is not None and (map_type not in {"atomic", "granular"} or schema.get("type") != "object"):
        yield f"{path}.x-kubernetes-map-type: must be atomic or granular, of an object"


def _key_problems(keys: list[str], items: Schema, path: str) -> Iterator[str]:
    for key in keys:
        field = items.get("properties", {}).get(key, {})
        if field.get("type") not in SCALARS:
            yield f"{path}.x-kubernetes-list-map-keys: {key} must be a scalar property of the items"
        if key not in items.get("required", ()) and "default" not in field:
            yield f"{path}.items.properties[{key}].default: {key} must be required or have a default"


def _default_problems(schema: Schema, path: str) -> Iterator[str]:
    if "default" not in schema:
        return
    default = copy.deepcopy(schema["default"])
    if unknown := prune(default, schema):
        yield f"{path}.default: must not have unknown fields: {', '.join(unknown)}"
    set_defaults(default, schema)
    for error in validate_schema(default, schema, f"{path}.default"):
        yield str(error)


def _rule_problems(rule: dict[str, Any], schema: Schema, path: str, *, is_root: bool) -> Iterator[str]:
    for name in rule.keys() - RULE_KEYS:
        yield f"{path}.{name}: unknown field"
    if "type" not in schema and not schema.get("x-kubernetes-int-or-string"):
        yield f"{path}: Forbidden: rules need a type"
        return
    if problem := compile_problem(rule["rule"], schema, "bool", is_root=is_root):
        yield f"{path}.rule: compilation failed: {problem}"
    if "messageExpression" in rule:
        problem = compile_problem(rule["messageExpression"], schema, "string", is_root=is_root)
        if problem:
            yield f"{path}.messageExpression: compilation failed: {problem}"
    message = rule.get("message", "")
    if "\n" in message or len(message) > MAX_MESSAGE or (message and not message.strip()):
        yield f"{path}.message: must be one line of at most {MAX_MESSAGE} characters"
    if "\n" in rule["rule"] and not message:
        yield f"{path}.message: Required value: message must be specified if rule contains line breaks"
    if rule.get("reason", "FieldValueInvalid") not in REASONS:
        yield f"{path}.reason: Unsupported value: {rule['reason']!r}"
    if "fieldPath" in rule and _schema_at(rule["fieldPath"], schema) is None:
        yield f"{path}.fieldPath: does not refer to a valid field"


def _schema_at(field_path: str, schema: Schema) -> Schema | None:
    """Return the schema that a path such as `.spec.splits` or `.spec['splits']` refers to."""
    tokens = re.findall(r"\.([^.\[\]]+)|\['([^']+)'\]", field_path)
    if "".join(f".{name}" if name else f"['{key}']" for name, key in tokens) != field_path:
        return None
    found: Schema | None = schema
    for name, key in tokens:
        found = child_schema(found, name or key) if found is not None else None
    return found
