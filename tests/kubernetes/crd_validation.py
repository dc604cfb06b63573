"""Validation of custom resources by their schema, with the texts of the API server.

An update may keep values that were already invalid: errors of unchanged values are ignored (CRDValidationRatcheting).
"""

import base64
import binascii
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from crd_errors import FieldError, go_float
from crd_pruning import Schema, child_schema

TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
UUID = re.compile(r"(?i)^[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}$")


def validate_schema(
    value: Any, schema: Schema, path: str = "", old: Any = None, *, in_union: bool = False
) -> Iterator[FieldError]:
    """Yield the errors of a value.

    Args:
        value: The value.
        schema: Its schema.
        path: Its path.
        old: The value before an update; None if there is none.
        in_union: Whether the schema is below allOf, anyOf, oneOf or not, which do not consider the old value.
    """
    if old is not None and is_same(value, old):
        return
    yield from _type_errors(value, schema, path)
    yield from _union_errors(value, schema, path)
    if "enum" in schema and not any(is_same(value, allowed) for allowed in schema["enum"]):
        supported = ", ".join(f'"{_plain(allowed)}"' for allowed in schema["enum"])
        yield FieldError(path, "FieldValueNotSupported", value, f"supported values: {supported}")
    if isinstance(value, str):
        yield from _string_errors(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number_errors(value, schema, path)
    elif isinstance(value, list):
        yield from _list_errors(value, schema, path, None if in_union else old)
    elif isinstance(value, dict):
        yield from _object_errors(value, schema, path, None if in_union else old)


def _type_errors(value: Any, schema: Schema, path: str) -> Iterator[FieldError]:
    actual = TYPES[type(value)]
    types = ["integer", "string"] if schema.get("x-kubernetes-int-or-string") else [schema.get("type", actual)]
    is_integral = actual == "number" and value.is_integer()
    accepted = (
        {*types} | ({"integer"} if "number" in types else set()) | ({"null"} if schema.get("nullable") else set())
    )
    if actual not in accepted and not ("integer" in types and is_integral):
        yield _type_error(path, ",".join(types), actual)
    if actual == "number" and types == ["integer"] and not is_integral:
        form = f"with format {schema['format']}" if "format" in schema else "(default format)"
        yield _composite_error(f"Checked value must be of type integer {form} in {path}")


def _type_error(path: str, expected: str, actual: str) -> FieldError:
    detail = f'{path} in body must be of type {expected}: "{actual}"'
    return FieldError(path, "FieldValueTypeInvalid", actual, detail)


def _union_errors(value: Any, schema: Schema, path: str) -> Iterator[FieldError]:
    def errors_of(key: str) -> list[list[FieldError]]:
        return [[*validate_schema(value, member, path, in_union=True)] for member in schema.get(key, ())]

    valid = sum(not errors for errors in errors_of("oneOf"))
    if "oneOf" in schema and valid != 1:
        found = f"Found {valid} valid alternatives" if valid else "Found none valid"
        yield _composite_error(f'"{path}" must validate one and only one schema (oneOf). {found}')
    any_of = errors_of("anyOf")
    if any_of and all(any_of):
        yield _composite_error(f'"{path}" must validate at least one schema (anyOf)')
        yield from min(any_of, key=len)
    all_of = [error for errors in errors_of("allOf") for error in errors]
    if all_of:
        yield _composite_error(f'"{path}" must validate all the schemas (allOf)')
        yield from all_of
    if "not" in schema and not [*validate_schema(value, schema["not"], path, in_union=True)]:
        yield _composite_error(f'"{path}" must not validate the schema (not)')


def _composite_error(text: str) -> FieldError:
    return FieldError("", "FieldValueInvalid", "", text)


def _string_errors(value: str, schema: Schema, path: str) -> Iterator[FieldError]:
    if len(value) > schema.get("maxLength", len(value)):
        detail = f"may not be more than {_count(schema['maxLength'], 'byte')}"
        yield FieldError(path, "FieldValueTooLong", value, detail)
    elif len(value) < schema.get("minLength", 0):
        yield _invalid(path, value, f"should be at least {schema['minLength']} chars long")
    elif "pattern" in schema and not re.search(_python_pattern(schema["pattern"]), value):
        yield _invalid(path, value, f"should match '{schema['pattern']}'")
    if "format" in schema and not _has_format(value, schema["format"]):
        detail = f'{path} in body must be of type {schema["format"]}: "{value}"'
        yield FieldError(path, "FieldValueTypeInvalid", value, detail)


def _python_pattern(pattern: str) -> str:
    """Convert a pattern of RE2: `$` matches only at the end of the text, and classes contain only ASCII characters."""
    return "(?a)" + re.sub(r"(?<!\\)\$", r"\\Z", pattern.replace(r"\z", r"\Z"))


def _has_format(value: str, name: str) -> bool:
    if name == "date-time":
        return _is_date_time(value)
    if name == "uuid":
        return bool(UUID.match(value))
    if name == "byte":
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error:
            return False
    return True


def _is_date_time(value: str) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None and "T" in value
    except ValueError:
        return False


def _number_errors(value: float, schema: Schema, path: str) -> Iterator[FieldError]:
    """Check the bounds. The API server compares an integer with the integer part of the bound."""

    def bound(name: str) -> float:
        return int(schema[name]) if isinstance(value, int) else schema[name]

    for name, is_below, text in (("minimum", True, "greater than"), ("maximum", False, "less than")):
        if name not in schema:
            continue
        limit, is_exclusive = bound(name), schema.get(f"exclusive{name.capitalize()}", False)
        is_beyond = value < limit if is_below else value > limit
        if is_beyond or (is_exclusive and value == limit):
            limit_text = str(limit) if isinstance(value, int) else go_float(float(limit))
            yield _invalid(path, value, f"should be {text} {'' if is_exclusive else 'or equal to '}{limit_text}")
    factor = schema.get("multipleOf")
    if factor and value / factor != int(value / factor):
        yield _invalid(path, value, f"should be a multiple of {factor}")


def _list_errors(value: list[Any], schema: Schema, path: str, old: Any) -> Iterator[FieldError]:
    if len(value) > schema.get("maxItems", len(value)):
        detail = f"must have at most {_count(schema['maxItems'], 'item')}"
        yield FieldError(path, "FieldValueTooMany", len(value), detail)
    if len(value) < schema.get("minItems", 0):
        yield _invalid(path, len(value), f"should have at least {schema['minItems']} items")
    keys = schema.get("x-kubernetes-list-map-keys", ())
    previous = {_identity(item, keys): item for item in old} if keys and isinstance(old, list) else {}
    for index, item in enumerate(value):
        before = previous.get(_identity(item, keys))
        yield from validate_schema(item, schema.get("items", {}), f"{path}[{index}]", before)
    yield from _duplicate_errors(value, schema, path)


def _duplicate_errors(value: list[Any], schema: Schema, path: str) -> Iterator[FieldError]:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", ())
    seen: set[str] = set()
    for index, item in enumerate(value if kind in {"set", "map"} else ()):
        shown = {key: item[key] for key in keys if key in item} if kind == "map" and isinstance(item, dict) else item
        if (identity := repr(shown)) in seen:
            yield FieldError(f"{path}[{index}]", "FieldValueDuplicate", shown)
        seen.add(identity)


def _identity(item: Any, keys: tuple[str, ...]) -> str:
    return repr([item.get(key) for key in keys]) if isinstance(item, dict) else repr(item)


def _object_errors(value: dict[str, Any], schema: Schema, path: str, old: Any) -> Iterator[FieldError]:
    if len(value) > schema.get("maxProperties", len(value)):
        detail = f"must have at most {_count(schema['maxProperties'], 'item')}"
        yield FieldError(path, "FieldValueTooMany", len(value), detail)
    if len(value) < schema.get("minProperties", 0):
        yield _invalid(path, len(value), f"should have at least {schema['minProperties']} properties")
    for name in schema.get("required", ()):
        if name not in value:
            yield FieldError(_child(path, name), "FieldValueRequired", "")
    before = old if isinstance(old, dict) else {}
    for name, item in value.items():
        child = child_schema(schema, name)
        if child is not None:
            yield from validate_schema(item, child, _child(path, name), before.get(name))


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _invalid(path: str, value: Any, text: str) -> FieldError:
    return FieldError(path, "FieldValueInvalid", value, f"{path} in body {text}")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_same(one: Any, other: Any) -> bool:
    """Compare two JSON values; true and 1 differ."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
