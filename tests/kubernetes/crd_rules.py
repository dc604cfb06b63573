"""Rules (x-kubernetes-validations) of custom resources, with the texts of the API server."""

import re
from collections.abc import Iterator
from typing import Any

from crd_cel import CelError, cel_value, evaluate
from crd_errors import OMITTED, FieldError
from crd_pruning import Schema, child_schema
from crd_validation import is_same

USES_OLD = re.compile(r"\boldSelf\b")


def validate_rules(
    value: Any, schema: Schema, path: str = "", old: Any = None, *, is_root: bool = True
) -> Iterator[FieldError]:
    """Yield the violated rules of a value that has no blocking errors of its schema.

    Args:
        value: The value.
        schema: Its schema.
        path: Its path.
        old: The value before an update; None if there is none or if it cannot be correlated.
        is_root: Whether the value is a whole object.
    """
    if value is None:
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        yield from _violations(rule, value, schema, path, old, is_root=is_root)
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        for index, item in enumerate(value):
            before = _correlated(item, old, keys)
            yield from validate_rules(item, schema.get("items", {}), f"{path}[{index}]", before, is_root=False)
    elif isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        is_map = "additionalProperties" in schema
        for name, item in value.items():
            if (child := child_schema(schema, name)) is not None:
                child_path = f"{path}[{name}]" if is_map else _child(path, name)
                yield from validate_rules(item, child, child_path, before.get(name), is_root=False)


def _violations(
    rule: dict[str, Any], value: Any, schema: Schema, path: str, old: Any, *, is_root: bool
) -> Iterator[FieldError]:
    text, is_optional = rule["rule"].strip(), rule.get("optionalOldSelf", False)
    uses_old = bool(USES_OLD.search(text))
    if uses_old and old is None and not is_optional:
        return
    if not uses_old and old is not None and is_same(value, old):
        return
    values = {"self": cel_value(value, schema, is_root=is_root)}
    values["oldSelf"] = values["oldSelfValue"] = cel_value(old, schema, is_root=is_root)

    def expression(source: str) -> str:
        optional = "optional.none()" if old is None else "optional.of(oldSelfValue)"
        return f"cel.bind(oldSelf, {optional}, {source})" if is_optional else source

    try:
        if evaluate(expression(text), values) is True:
            return
    except CelError as error:
        detail = f"{error} evaluating rule: {rule.get('message') or text}"
        yield FieldError(path, "FieldValueInvalid", schema.get("type"), detail)
        return
    message = rule.get("message", "").strip() or f"failed rule: {text}"
    if "messageExpression" in rule:
        message = _evaluated_message(expression(rule["messageExpression"]), values) or message
    shown = OMITTED if schema.get("type") in {"object", "array"} else value
    reason = rule.get("reason", "FieldValueInvalid")
    detail = "" if reason == "FieldValueDuplicate" else message  # the API server drops this message
    yield FieldError(path + _suffix(rule, path), reason, shown, detail)


def _evaluated_message(expression: str, values: dict[str, Any]) -> str:
    """Return the text of a message expression; empty if it fails, or has no valid text."""
    try:
        message = evaluate(expression, values)
    except CelError:
        return ""
    is_valid = isinstance(message, str) and "\n" not in message
    return message.strip() if is_valid else ""


def _suffix(rule: dict[str, Any], path: str) -> str:
    field_path = rule.get("fieldPath", "")
    return field_path if path else field_path.removeprefix(".")


def _correlated(item: Any, old: Any, keys: list[str]) -> Any:
    """Return the item of the old list with the same keys."""
    if not keys or not isinstance(old, list):
        return None
    return next((other for other in old if all(other.get(key) == item.get(key) for key in keys)), None)


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
