"""Errors of fields of custom resources, with the texts of the API server."""

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

REASONS = {
    "FieldValueRequired": "Required value",
    "FieldValueDuplicate": "Duplicate value",
    "FieldValueInvalid": "Invalid value",
    "FieldValueTypeInvalid": "Invalid value",
    "FieldValueNotSupported": "Unsupported value",
    "FieldValueForbidden": "Forbidden",
    "FieldValueTooLong": "Too long",
    "FieldValueTooMany": "Too many",
}
WITHOUT_VALUE = {"FieldValueRequired", "FieldValueForbidden", "FieldValueTooLong"}
# Rules are not evaluated for an object with one of these errors.
BLOCKING = {
    "FieldValueNotSupported",
    "FieldValueRequired",
    "FieldValueTooLong",
    "FieldValueTooMany",
    "FieldValueTypeInvalid",
}
MAX_EXPONENT = 6
OMITTED = object()
"""Value that does not appear in the text."""


@dataclass(frozen=True)
class FieldError:
    """An error of a field.

    Attributes:
        path: Path of the field, such as `spec.splits[0].name`; empty for the whole object.
        reason: Kind of the error, such as FieldValueInvalid.
        value: The value of the field; OMITTED if it is not shown.
        detail: What is wrong.
    """

    path: str
    reason: str
    value: Any
    detail: str = ""

    @property
    def field(self) -> str:
        """Path as in messages."""
        return self.path or "<nil>"

    @property
    def body(self) -> str:
        """Text without the path."""
        text = REASONS[self.reason]
        if self.value is not OMITTED and self.reason not in WITHOUT_VALUE:
            text += f": {go_text(self.value)}"
        return f"{text}: {self.detail}" if self.detail else text

    def __str__(self) -> str:
        return f"{self.field}: {self.body}"


def go_text(value: Any) -> str:
    """Format a value as Go does: numbers with %v, strings with %q, other values as JSON."""
    if isinstance(value, float):
        return go_float(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def go_float(value: float) -> str:
    """Format a floating-point number as Go does with %v: 0.5, 3, 1e+06."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    shortest = next(text for count in range(18) if float(text := f"{value:.{count}e}") == value)
    mantissa, _, exponent = shortest.partition("e")
    if not -4 <= int(exponent) < MAX_EXPONENT:
        return f"{mantissa}e{int(exponent):+03d}"
    return format(Decimal(repr(value)), "f").removesuffix(".0")


def status_of(kind: str, group: str, name: str, errors: list[FieldError]) -> dict[str, Any]:
    """Return the `Status` of an invalid object, 422."""
    texts = list(dict.fromkeys(str(error) for error in errors))
    full = f"{kind}.{group}" if group else kind
    causes = [{"reason": error.reason, "message": error.body, "field": error.field} for error in errors]
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f'{full} "{name}" is invalid: ' + (texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"),
        "reason": "Invalid",
        "details": {"name": name, "group": group, "kind": kind, "causes": causes},
        "code": 422,
    }
