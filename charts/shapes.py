"""charts/topwork/files/spec.json: the shape of the job spec, from which the chart's templates fill in defaults.

A template knows no types: what is 10 to it may be 10 or 10.0 in the spec, and a run is named by the digest of its
spec, in which the two differ. So each key is described by what a value of each type of JSON means there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from topwork.spec import TransferJob
from topwork.spec.fine_tune import UNFREEZE_MODELS
from topwork.spec.job import EXCLUDED_FROM_DIGEST
from topwork.spec.schema.key_types import KeyType, expand_types, fields_by_key, is_list, is_model, walk_models
from topwork.spec.spec_model import SpecModel

Shape = dict[str, Any]

# YAML as Helm reads it takes these words for true and false.
SWITCHES = {"on", "off"}
# Which key tells one part from another where several may stand.
TELLING_KEYS = {part: key for key, part in UNFREEZE_MODELS.items()}


def shapes_text() -> str:
    """Write the shape of every part of the spec.

    Returns:
        JSON: for each part its keys in order, and for each key its shape and its default.
    """
    found = {part.__name__: part_shape(part) for _, part in walk_models(TransferJob)}
    for part, key in without_result(TransferJob, EXCLUDED_FROM_DIGEST):
        found[part]["fields"][key]["noResult"] = True
    return json.dumps({"root": TransferJob.__name__, "parts": found}, indent=1, sort_keys=True) + "\n"


def without_result(part: type[SpecModel], excluded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find the keys by which a run is not named.

    Args:
        part: A part of the spec.
        excluded: What is left out of it, by the names of Python; True is a whole key.

    Yields:
        The name of a part and a key in it.
    """
    for key, field in fields_by_key(part).items():
        left_out = excluded.get(next(name for name, one in part.model_fields.items() if one is field))
        if left_out is True:
            yield part.__name__, key
        elif left_out:
            for kind in expand_types(field.annotation):
                yield from without_result(kind.python_type, left_out)


def part_shape(part: type[SpecModel]) -> Shape:
    """Describe a part.

    Args:
        part: The part.

    Returns:
        `order`, its keys as the reference has them, and `fields`, the shape of each.
    """
    fields = fields_by_key(part)
    return {"order": list(fields), "fields": {key: field_shape(field) for key, field in fields.items()}}


def field_shape(field: FieldInfo) -> Shape:
    """Describe a key: the shape of its value, and its default where it has one other than nothing."""
    found = shape(expand_types(field.annotation, field.metadata))
    default = plain(field.default)
    if not field.is_required() and default is not None:
        found["default"] = default
    return found


def plain(default: Any) -> Any:
    """Give a default as a person would write it: a part with what differs from its own defaults."""
    if isinstance(default, SpecModel):
        return default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return list(default) if isinstance(default, tuple) else default


def shape(allowed: Iterable[KeyType]) -> Shape:
    """Describe what may stand in one place.

    Args:
        allowed: The types that are allowed there.

    Returns:
        What a text, a number, a truth value, a list and a mapping mean there, as far as they are allowed.
    """
    found: Shape = {}
    for kind in allowed:
        if is_model(kind.python_type):
            telling = {"key": TELLING_KEYS[kind.python_type]} if kind.python_type in TELLING_KEYS else {}
            found.setdefault("parts", []).append(telling | {"part": kind.python_type.__name__})
        elif is_list(kind.python_type):
            found["list"] = shape(expand_types(get_args(kind.python_type)[0]))
        elif get_origin(kind.python_type) is dict:
            found["map"] = True
        elif get_origin(kind.python_type) is Literal:
            found["switch"] = bool(SWITCHES & set(get_args(kind.python_type)))
        elif kind.python_type is float:
            # Beside whole numbers, as with cpu, a number is whole where it can be.
            found["number"] = "any" if found.get("number") == "whole" else "real"
        elif kind.python_type is int:
            found["number"] = "any" if found.get("number") == "real" else "whole"
    return {key: value for key, value in found.items() if value is not False}
