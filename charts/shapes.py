"""Types and defaults of the job spec, which chart templates read from charts/topwork/files/spec.json.

Helm does not distinguish 10 from 10.0, but the digest in the name of a run does. The file therefore describes, for each
key, how to interpret a value of each JSON type.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from topwork.spec import TransferJob
from topwork.spec.digest import NO_RESULT
from topwork.spec.fine_tune import UNFREEZE_MODELS
from topwork.spec.job import JobSpec
from topwork.spec.schema.key_types import KeyType, expand_types, fields_by_key, is_list, is_model, walk_models
from topwork.spec.spec_model import SpecModel
from topwork.spec.splits import GROUP_MODELS

Shape = dict[str, Any]

# Helm parses YAML 1.1, in which these strings are booleans.
SWITCHES = {"on", "off"}
# Keys that distinguish the models of a union.
DISCRIMINATOR_KEYS = {part: key for key, part in (GROUP_MODELS | UNFREEZE_MODELS).items()}


def shapes_text() -> str:
    """Generate files/spec.json.

    Returns:
        JSON that contains, for each model of the spec, its keys in order and the shape and default of each key.
    """
    shapes = {part.__name__: part_shape(part) for _, part in walk_models(TransferJob)}
    for part, key in excluded_keys(JobSpec, NO_RESULT):
        shapes[part]["fields"][key]["noResult"] = True
    return (
        json.dumps({"root": TransferJob.__name__, "spec": JobSpec.__name__, "parts": shapes}, indent=1, sort_keys=True)
        + "\n"
    )


def excluded_keys(part: type[SpecModel], excluded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find the keys that are not part of the digest of a run.

    Args:
        part: A model of the spec.
        excluded: Excluded fields by Python name, as in `model_dump(exclude=…)`. True excludes a complete field.

    Yields:
        The name of a model and a key in it.
    """
    for key, field in fields_by_key(part).items():
        nested = excluded.get(next(name for name, candidate in part.model_fields.items() if candidate is field))
        if nested is True:
            yield part.__name__, key
        elif nested:
            for kind in expand_types(field.annotation):
                yield from excluded_keys(kind.python_type, nested)


def part_shape(part: type[SpecModel]) -> Shape:
    """Describe a model of the spec.

    Args:
        part: The model.

    Returns:
        `order`, the keys in the order of the reference, and `fields`, the shape of each key.
    """
    fields = fields_by_key(part)
    return {"order": list(fields), "fields": {key: field_shape(field) for key, field in fields.items()}}


def field_shape(field: FieldInfo) -> Shape:
    """Describe a key: the shape of its value, and its default if it has one other than null."""
    result = shape(expand_types(field.annotation, field.metadata))
    default = to_json_value(field.default)
    if not field.is_required() and default is not None:
        result["default"] = default
    return result


def to_json_value(default: Any) -> Any:
    """Convert a default to JSON values; models contain only keys that differ from their own defaults."""
    if isinstance(default, SpecModel):
        return default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return list(default) if isinstance(default, tuple) else default


def shape(allowed: Iterable[KeyType]) -> Shape:
    """Describe the values of one key.

    Args:
        allowed: Types that the key accepts.

    Returns:
        How to interpret a number, a boolean, a list and a mapping, for each of these that the key accepts.
    """
    result: Shape = {}
    for kind in allowed:
        if is_model(kind.python_type):
            discriminator = (
                {"key": DISCRIMINATOR_KEYS[kind.python_type]} if kind.python_type in DISCRIMINATOR_KEYS else {}
            )
            result.setdefault("parts", []).append(discriminator | {"part": kind.python_type.__name__})
        elif is_list(kind.python_type):
            result["list"] = shape(expand_types(get_args(kind.python_type)[0]))
        elif get_origin(kind.python_type) is dict:
            result["map"] = True
        elif get_origin(kind.python_type) is Literal:
            result["switch"] = bool(SWITCHES & set(get_args(kind.python_type)))
        elif kind.python_type is float:
            # If integers are accepted too, as for cpu, whole numbers are written as integers.
            result["number"] = "any" if result.get("number") == "whole" else "real"
        elif kind.python_type is int:
            result["number"] = "any" if result.get("number") == "real" else "whole"
    return {key: value for key, value in result.items() if value is not False}
