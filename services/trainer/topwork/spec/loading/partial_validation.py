"""What the rules say of a job that has other errors: pydantic stops below a rule, and users want all errors at once."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError

from topwork.spec.schema import key_types
from topwork.spec.section import Part, Refusal, refusals

Path = tuple[str | int, ...]


class LateRefusal(NamedTuple):
    """A refusal of a rule by the path of its part."""

    path: Path
    refusal: Refusal


def late_refusals(root: type[Part], data: Mapping[str, Any], error: ValidationError) -> list[LateRefusal]:
    """Run those rules that pydantic left out, because something else in the part was wrong.

    Args:
        root: Part that `data` failed to become.
        data: What was validated, keys by alias.
        error: What pydantic said.

    Returns:
        Refusals of the rules that read none of the wrong values.
    """
    sketch = _Sketch(error)
    sketch.part(root, data, ())
    return sketch.found


class _Sketch:
    """Builds parts without the values that are wrong. A rule that reads one of those ends with AttributeError."""

    def __init__(self, error: ValidationError) -> None:
        details = error.errors(include_url=False, include_input=False)
        self._wrong = {_untagged(one["loc"]) for one in details if one["type"] != "rule"}
        self._ruled = {_untagged(one["loc"]) for one in details if one["type"] == "rule"}
        self.found: list[LateRefusal] = []

    def part(self, kind: type[Part], data: Mapping[str, Any], path: Path) -> Part:
        names = {field.alias or name: name for name, field in kind.model_fields.items()}
        values = dict(self._values(kind, data, path))
        part = kind.model_construct(**{names[key]: value for key, value in values.items()})
        for key in data.keys() & names.keys() - values.keys():
            part.__dict__.pop(names[key], None)
        if path not in self._ruled:
            self.found += [LateRefusal(path, refusal) for refusal in self._refusals(part)]
        return part

    def _values(self, kind: type[Part], data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
        for key, field in key_types.keys(kind).items():
            below = (*path, key)
            if key not in data or below in self._wrong:
                continue
            if not any(place[: len(below)] == below for place in self._wrong | self._ruled):
                # Only to turn lists into tuples and mappings into parts: the value has been checked.
                adapter: TypeAdapter[Any] = TypeAdapter(cast("Any", field.annotation))
                yield key, adapter.validate_python(data[key], by_alias=True, by_name=False)
                continue
            parts = [one.of for one in key_types.kinds(field.annotation) if _is_part(one.of)]
            if len(parts) == 1 and isinstance(data[key], Mapping):
                yield key, self.part(parts[0], data[key], below)

    def _refusals(self, part: Part) -> Iterator[Refusal]:
        for check in refusals(part):
            try:
                yield from check
            except AttributeError:
                # It read a value that is wrong, which has been told already.
                continue


def _untagged(path: Path) -> Path:
    return tuple(step for step in path if not (isinstance(step, str) and step.startswith("<")))


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)
