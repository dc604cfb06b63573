"""Custom resources of the API server used in tests: decoding and validation by the schema of their definition."""

import copy
from typing import NamedTuple

import api_statuses
from api_kinds import Key, Kind, Object
from api_statuses import ApiError
from crd_definition import definition_problems
from crd_errors import BLOCKING, FieldError, status_of
from crd_pruning import prune, prune_nulls, root_schema, set_defaults
from crd_rules import validate_rules
from crd_typed_patch import typed_problems
from crd_validation import validate_schema

UNCHECKED = (
    "some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)


class Decoded(NamedTuple):
    """A decoded object, and warnings about its unknown fields."""

    object: Object
    warnings: tuple[str, ...] = ()


def decode(kind: Kind, obj: Object, field_validation: str = "Ignore", *, is_apply: bool = False) -> Decoded:
    """Decode a custom resource: reject or remove unknown fields, remove null, and set defaults.

    Args:
        kind: Kind of the object; an object without a schema stays as it is.
        obj: The object.
        field_validation: What to do with unknown fields: Strict, Warn or Ignore.
        is_apply: Whether the object is the partial object of server-side apply, which gets no defaults.
    """
    if not kind.definition:
        return Decoded(obj)
    schema = root_schema(kind.schema)
    if is_apply and (problems := [*typed_problems(obj, schema)]):
        name = f"{obj['metadata'].get('namespace', '')}/{obj['metadata']['name']}; {kind.api_version}, Kind={kind.name}"
        text = problems[0] if len(problems) == 1 else "errors:" + "".join(f"\n  {problem}" for problem in problems)
        raise ApiError(api_statuses.status(500, "", f"failed to create typed patch object ({name}): {text}"))
    decoded = copy.deepcopy(obj)
    unknown = [f'unknown field "{path}"' for path in prune(decoded, schema)]
    if unknown and field_validation == "Strict":
        context = f'{kind.name} in version "{kind.version}" cannot be handled as a {kind.name}'
        raise ApiError(api_statuses.bad_request(f"{context}: strict decoding error: {', '.join(unknown)}"))
    prune_nulls(decoded, schema)
    if not is_apply:
        set_defaults(decoded, schema)
    return Decoded(decoded, tuple(unknown) if field_validation == "Warn" else ())


def validate(kind: Kind, key: Key, new: Object, old: Object | None) -> None:
    """Validate a custom resource by its schema, and then by its rules."""
    schema = root_schema(kind.schema)
    errors = [*validate_schema(new, schema, old=old)]
    if any(error.reason in BLOCKING for error in errors):
        errors.append(FieldError("", "FieldValueInvalid", "null", UNCHECKED))
    else:
        errors += validate_rules(new, schema, old=old)
    if errors:
        raise ApiError(status_of(kind.name, kind.group, key.name, errors))


def validate_definition(key: Key, definition: Object) -> None:
    """Validate a CustomResourceDefinition."""
    if problems := definition_problems(definition):
        errors = [FieldError(path, "FieldValueInvalid", "", text) for path, _, text in map(_split, problems)]
        raise ApiError(status_of("CustomResourceDefinition", "apiextensions.k8s.io", key.name, errors))


def _split(problem: str) -> tuple[str, str, str]:
    return problem.partition(": ")
