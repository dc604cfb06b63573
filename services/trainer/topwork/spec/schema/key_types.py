"""Types and bounds of each key of the spec, and their descriptions for messages and the reference."""

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from topwork.spec.spec_model import SpecModel, ValueDescription


@dataclass(frozen=True)
class KeyType:
    """One type that a key allows.

    Attributes:
        python_type: A class, a Literal, or a generic alias of tuple or dict.
        metadata: Bounds, description and tag from the annotation.
    """

    python_type: Any
    metadata: tuple[Any, ...] = ()

    def find(self, kind: type[Any]) -> Any:
        """Return the first metadata of a kind, such as `Ge`, or None."""
        return next((item for item in self.metadata if isinstance(item, kind)), None)


def expand_types(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[KeyType]:
    """Expand an annotation into the types that it allows, without None.

    Args:
        annotation: A type, possibly Annotated or a union.
        metadata: Metadata that applies to all members of a union.

    Yields:
        Each type with its metadata.
    """
    metadata = tuple(_flatten(metadata))
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        yield from expand_types(inner, (*own, *metadata))
    elif get_origin(annotation) in {Union, types.UnionType}:
        for member in get_args(annotation):
            yield from expand_types(member, metadata)
    elif annotation is not types.NoneType:
        yield KeyType(annotation, metadata)


def types_at(root: type[SpecModel], path: tuple[str | int, ...]) -> tuple[KeyType, ...]:
    """Return the types that are allowed at a path.

    Args:
        root: Model where the path starts.
        path: Keys and list indices; a tag such as `<layers>` selects a member of a union.

    Returns:
        The allowed types; empty if the path does not exist.
    """
    selected: tuple[KeyType, ...] = (KeyType(root),)
    for step in path:
        if isinstance(step, str) and step.startswith("<"):
            selected = tuple(key_type for key_type in selected if (tag := key_type.find(Tag)) and tag.tag == step)
        else:
            selected = tuple(inner for key_type in selected for inner in _types_below(key_type, step))
    return selected


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by their YAML keys."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def walk_models(root: type[SpecModel], path: str = "") -> Iterator[tuple[str, type[SpecModel]]]:
    """Yield a model and all models below it, depth first, each with its path.

    `[]` represents the index of a list, and `.*` the key of a mapping.
    """
    yield path, root
    for key, field in fields_by_key(root).items():
        for key_type in expand_types(field.annotation):
            for model, suffix in _models_in(key_type.python_type):
                yield from walk_models(model, f"{path}.{key}{suffix}".removeprefix("."))


def is_model(annotation: Any) -> bool:
    """Return whether a type is a model, that is, a mapping of the spec with known keys."""
    return isinstance(annotation, type) and issubclass(annotation, SpecModel)


def is_list(annotation: Any) -> bool:
    """Return whether a type is a list."""
    return get_origin(annotation) is tuple


def describe_types(key_types: Iterable[KeyType]) -> str:
    """Describe the values that these types allow, such as `an integer from 1 to 10000`."""
    key_types = tuple(key_types)
    descriptions = {text.text if (text := key_type.find(ValueDescription)) else None for key_type in key_types}
    if len(descriptions) == 1 and (description := descriptions.pop()):
        return str(description)
    return " or ".join(dict.fromkeys(_describe(key_type) for key_type in key_types))


def literal_values(key_types: Iterable[KeyType]) -> list[str]:
    """Return the values of all Literal types."""
    return [
        str(value)
        for key_type in key_types
        if get_origin(key_type.python_type) is Literal
        for value in get_args(key_type.python_type)
    ]


def _flatten(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flatten(item.metadata)
        elif hasattr(item, "__iter__") and not isinstance(item, str):
            yield from item  # a group such as StringConstraints
        else:
            yield item


def _models_in(annotation: Any) -> Iterator[tuple[type[SpecModel], str]]:
    if is_list(annotation):
        yield from ((model, f"[]{suffix}") for item in get_args(annotation)[:1] for model, suffix in _models_in(item))
    elif get_origin(annotation) is dict:
        yield from ((model, f".*{suffix}") for item in get_args(annotation)[1:] for model, suffix in _models_in(item))
    elif is_model(annotation):
        yield annotation, ""


def _types_below(key_type: KeyType, step: str | int) -> Iterator[KeyType]:
    arguments = get_args(key_type.python_type)
    if isinstance(step, int) and is_list(key_type.python_type):
        yield from expand_types(arguments[0] if Ellipsis in arguments else arguments[min(step, len(arguments) - 1)])
    elif isinstance(step, str) and get_origin(key_type.python_type) is dict:
        yield from expand_types(arguments[1])
    elif is_model(key_type.python_type) and step in fields_by_key(key_type.python_type):
        field = fields_by_key(key_type.python_type)[str(step)]
        yield from expand_types(field.annotation, field.metadata)


def _describe(key_type: KeyType) -> str:
    if description := key_type.find(ValueDescription):
        return str(description.text)
    if get_origin(key_type.python_type) is Literal:
        return ", ".join(map(str, get_args(key_type.python_type)))
    if is_list(key_type.python_type):
        return _describe_list(key_type)
    if get_origin(key_type.python_type) is dict:
        return "a mapping"
    if key_type.python_type is bool:
        return "true or false"
    if key_type.python_type in {int, float}:
        return " ".join(["an integer" if key_type.python_type is int else "a number", *_describe_bounds(key_type)])
    if is_model(key_type.python_type):
        return f"a mapping with {', '.join(fields_by_key(key_type.python_type))}"
    return "a string"


def _describe_list(key_type: KeyType) -> str:
    arguments = get_args(key_type.python_type)
    minimum, maximum = key_type.find(MinLen), key_type.find(MaxLen)
    if Ellipsis not in arguments:
        count = f"{len(arguments)}"
    elif minimum and maximum:
        count = f"{minimum.min_length} to {maximum.max_length}"
    elif maximum:
        count = f"up to {maximum.max_length}"
    else:
        count = f"at least {minimum.min_length}" if minimum else "any number"
    return f"a list of {count}, each {describe_types(expand_types(arguments[0]))}"


def _describe_bounds(key_type: KeyType) -> Iterator[str]:
    minimum, above, maximum, below = key_type.find(Ge), key_type.find(Gt), key_type.find(Le), key_type.find(Lt)
    if minimum:
        yield f"from {minimum.ge:g}" if abs(minimum.ge) < 1e6 else f"from {minimum.ge}"
    if above:
        yield f"above {above.gt:g}"
    if maximum:
        yield f"{'to' if minimum else 'and at most' if above else 'at most'} {maximum.le:.15g}"
    if below:
        yield f"{'to ' if minimum else 'and ' if above else ''}below {below.lt:g}"
