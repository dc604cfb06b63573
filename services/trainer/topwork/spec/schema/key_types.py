"""What each key of the spec may hold, in words: for messages and for the reference."""

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import Tag
from pydantic.fields import FieldInfo

from topwork.spec.section import Meaning, Part


@dataclass(frozen=True)
class Kind:
    """One of the types that a key may have, with what is said about it.

    Attributes:
        of: A class, a Literal, or a generic alias of tuple or dict.
        about: Bounds, meaning and tag from the annotation.
    """

    of: Any
    about: tuple[Any, ...] = ()

    def find(self, wanted: type[Any]) -> Any:
        """Give what the annotation says of one sort, such as `Ge`, or None."""
        return next((one for one in self.about if isinstance(one, wanted)), None)


def kinds(annotation: Any, about: Iterable[Any] = ()) -> Iterator[Kind]:
    """Take an annotation apart into the types that it allows, without None."""
    about = tuple(_flat(about))
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from kinds(inner, (*metadata, *about))
    elif get_origin(annotation) in {Union, types.UnionType}:
        for member in get_args(annotation):
            yield from kinds(member, about)
    elif annotation is not types.NoneType:
        yield Kind(annotation, about)


def at(root: type[Part], path: tuple[str | int, ...]) -> tuple[Kind, ...]:
    """Find what may stand at a path.

    Args:
        root: Part where the path begins.
        path: Keys and indices; a tag such as `<layers>` chooses among several types.

    Returns:
        The types that are allowed there; empty where the path leads nowhere.
    """
    found: tuple[Kind, ...] = (Kind(root),)
    for step in path:
        if isinstance(step, str) and step.startswith("<"):
            found = tuple(kind for kind in found if (tag := kind.find(Tag)) and tag.tag == step)
        else:
            found = tuple(inner for kind in found for inner in _below(kind, step))
    return found


def keys(part: type[Part]) -> dict[str, FieldInfo]:
    """Give the fields of a part by the keys of YAML."""
    return {field.alias or name: field for name, field in part.model_fields.items()}


def parts(root: type[Part], path: str = "") -> Iterator[tuple[str, type[Part]]]:
    """Give a part and all below it, depth first, each with its path; `[]` stands for the index in a list."""
    yield path, root
    for key, field in keys(root).items():
        for kind in kinds(field.annotation):
            for below, suffix in _parts_of(kind.of):
                yield from parts(below, f"{path}.{key}{suffix}".removeprefix("."))


def _parts_of(annotation: Any) -> Iterator[tuple[type[Part], str]]:
    if get_origin(annotation) is tuple:
        yield from ((part, f"[]{suffix}") for inner in get_args(annotation)[:1] for part, suffix in _parts_of(inner))
    elif is_part(annotation):
        yield annotation, ""


def is_part(annotation: Any) -> bool:
    """Whether a type is a mapping of the spec."""
    return isinstance(annotation, type) and issubclass(annotation, Part)


def is_list(annotation: Any) -> bool:
    """Whether a type is a list."""
    return get_origin(annotation) is tuple


def allowed(found: Iterable[Kind]) -> str:
    """Say what may stand where one of these types is expected, such as `a whole number from 1 to 10000`."""
    found = tuple(found)
    meaning = next((said.words for kind in found if (said := kind.find(Meaning))), None)
    if meaning and all(kind.find(Meaning) and kind.find(Meaning).words == meaning for kind in found):
        return str(meaning)
    return " or ".join(dict.fromkeys(_words(kind) for kind in found))


def options(found: Iterable[Kind]) -> list[str]:
    """Give the words that are allowed as they stand."""
    return [str(word) for kind in found if get_origin(kind.of) is Literal for word in get_args(kind.of)]


def _flat(about: Iterable[Any]) -> Iterator[Any]:
    for one in about:
        if isinstance(one, FieldInfo):
            yield from _flat(one.metadata)
        elif hasattr(one, "__iter__") and not isinstance(one, str):
            yield from one  # a group such as StringConstraints
        else:
            yield one


def _below(kind: Kind, step: str | int) -> Iterator[Kind]:
    arguments = get_args(kind.of)
    if isinstance(step, int) and get_origin(kind.of) is tuple:
        yield from kinds(arguments[0] if Ellipsis in arguments else arguments[min(step, len(arguments) - 1)])
    elif isinstance(step, str) and get_origin(kind.of) is dict:
        yield from kinds(arguments[1])
    elif isinstance(kind.of, type) and issubclass(kind.of, Part) and step in keys(kind.of):
        field = keys(kind.of)[str(step)]
        yield from kinds(field.annotation, field.metadata)


def _words(kind: Kind) -> str:
    if meaning := kind.find(Meaning):
        return str(meaning.words)
    if get_origin(kind.of) is Literal:
        return ", ".join(map(str, get_args(kind.of)))
    if get_origin(kind.of) is tuple:
        return _list_words(kind)
    if get_origin(kind.of) is dict:
        return "a mapping"
    if kind.of is bool:
        return "true or false"
    if kind.of in {int, float}:
        return " ".join(["a whole number" if kind.of is int else "a number", *_bounds(kind)])
    if isinstance(kind.of, type) and issubclass(kind.of, Part):
        return f"a mapping with {', '.join(keys(kind.of))}"
    return "text"


def _list_words(kind: Kind) -> str:
    arguments = get_args(kind.of)
    least, most = kind.find(MinLen), kind.find(MaxLen)
    if Ellipsis not in arguments:
        count = f"{len(arguments)}"
    elif least and most:
        count = f"{least.min_length} to {most.max_length}"
    elif most:
        count = f"up to {most.max_length}"
    else:
        count = f"at least {least.min_length}" if least else "any number"
    return f"a list of {count}, each {allowed(kinds(arguments[0]))}"


def _bounds(kind: Kind) -> Iterator[str]:
    least, above, most, below = kind.find(Ge), kind.find(Gt), kind.find(Le), kind.find(Lt)
    if least:
        yield f"from {least.ge:g}" if abs(least.ge) < 1e6 else f"from {least.ge}"
    if above:
        yield f"above {above.gt:g}"
    if most:
        yield f"{'to' if least else 'and at most' if above else 'at most'} {most.le:.15g}"
    if below:
        yield f"{'to ' if least else 'and ' if above else ''}below {below.lt:g}"
