"""What is wrong with a spec: each problem with its place, and pydantic's errors in our words."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from topwork.errors import SpecError
from topwork.spec.job import TransferJob
from topwork.spec.loading.partial_validation import late_refusals
from topwork.spec.loading.yaml_document import Path
from topwork.spec.messages import hint, listed, shown
from topwork.spec.schema import key_types
from topwork.spec.section import Part, Refusal

YES_AND_NO = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Problem(NamedTuple):
    """One thing that is wrong with a spec.

    Attributes:
        file: Name of the file as it was handed in, or the `--set …` that is at fault.
        line: Line, counted from 1; 0 where the file as a whole is meant.
        column: Column, counted from 1.
        path: Path of the key, such as `spec.transfer.epochs`; empty where the document is meant.
        message: What stood there, what is allowed, and the nearest known word.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


class WrongSpec(SpecError):  # noqa: N818 - an error by its base
    """All that is wrong with one or more specs."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        # An option that is wrong is so for each document.
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(map(str, self.problems)))


class Finding(NamedTuple):
    """A problem of a document by its path; `at_key` where the key and not its value is at fault."""

    path: Path
    message: str
    at_key: bool = False


def dotted(path: Path) -> str:
    """Write a path as `spec.evaluate.gates[0].metric`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def findings(error: ValidationError, data: Mapping[str, Any]) -> Iterator[Finding]:
    """Say pydantic's errors in our words, and add those of the rules that pydantic left out.

    Args:
        error: What pydantic said of `data`.
        data: What was validated.

    Yields:
        One finding for each place that is wrong, and one for each refusal of a rule.
    """
    seen: set[Path] = set()
    for details in error.errors(include_url=False):
        for finding in _findings(details):
            # A list that is too short is told of once for each entry that lacks.
            if finding.path not in seen or details["type"] == "rule":
                yield finding
            seen.add(finding.path)
    for path, refusal in late_refusals(TransferJob, data, error):
        finding = _of_rule(path, refusal)
        if finding.path not in seen:
            yield finding


def _of_rule(path: Path, refusal: Refusal) -> Finding:
    steps = tuple(int(step) if step.isdigit() else step for step in refusal.path.split(".") if step)
    return Finding((*path, *steps), refusal.reason)


def _findings(details: ErrorDetails) -> Iterator[Finding]:
    tagged = tuple(step for step in details["loc"] if step != "[key]")
    path = tuple(step for step in tagged if not _is_tag(step))
    kind, value = details["type"], details.get("input")
    if kind == "rule":
        yield from (_of_rule(path, refusal) for refusal in details["ctx"]["refusals"])
    elif kind == "extra_forbidden":
        yield Finding(path, unknown_key(tagged), at_key=True)
    elif kind == "missing" and isinstance(path[-1], int):
        found = key_types.at(TransferJob, tagged[:-1])
        yield Finding(path[:-1], f"{shown(value)} is not allowed. Allowed: {key_types.allowed(found)}.")
    elif kind == "missing":
        found = key_types.at(TransferJob, tagged)
        yield Finding(path, f"missing. {_description(tagged)} Allowed: {key_types.allowed(found)}.")
    elif kind == "refused":
        yield Finding(path, details["msg"].rstrip(".") + ".")
    elif "[key]" in details["loc"]:
        yield Finding(path, f"{shown(value)} is not allowed here. Allowed: {_key_words(tagged)}.", at_key=True)
    else:
        # A wrong value says nothing about which of several types was meant: all of them are told.
        place = tagged[:-1] if tagged and _is_tag(tagged[-1]) else tagged
        yield Finding(path, _not_allowed(value, key_types.at(TransferJob, place), details))


def _is_tag(step: str | int) -> bool:
    return isinstance(step, str) and step.startswith("<")


def unknown_key(path: Path) -> str:
    """Say that there is no such key, where there is one, or which one was probably meant.

    Args:
        path: The key with all above it, which is known; tags as in pydantic's errors are allowed.

    Returns:
        One or more sentences.
    """
    *above, key = path
    parts = [kind.of for kind in key_types.at(TransferJob, tuple(above)) if isinstance(kind.of, type)]
    known = [key for part in parts if issubclass(part, Part) for key in key_types.keys(part)]
    homes = [path or "the document" for path, part in key_types.parts(TransferJob) if key in key_types.keys(part)]
    where = f" It is a key of {listed(list(dict.fromkeys(homes))[:3], 'or')}." if homes else hint(key, known)
    return f"no such key.{where} Known: {', '.join(known)}."


def _not_allowed(value: object, found: tuple[key_types.Kind, ...], details: ErrorDetails) -> str:
    words = key_types.allowed(found) or details["msg"]
    message = f"{shown(value)} is not allowed.{_fix(value, found)} Allowed: {words}."
    return message if value is not None else f"{message} Or leave the key out."


def _fix(value: object, found: tuple[key_types.Kind, ...]) -> str:
    types = {kind.of for kind in found}
    if not isinstance(value, str):
        return ""
    if bool in types and value.lower() in YES_AND_NO:
        return f" Did you mean {YES_AND_NO[value.lower()]}?"
    if types & {int, float} and _is_number(value):
        return " Leave out the quotes."
    return hint(value, key_types.options(found))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _description(path: Path) -> str:
    *above, key = path
    for kind in key_types.at(TransferJob, tuple(above)):
        if field := key_types.keys(kind.of).get(str(key)):
            return field.description or ""
    return ""


def _key_words(path: Path) -> str:
    found = [kind for kind in key_types.at(TransferJob, path[:-1]) if get_origin(kind.of) is dict]
    return " or ".join(key_types.allowed(key_types.kinds(_first(kind.of))) for kind in found)


def _first(annotation: Any) -> Any:
    return get_args(annotation)[0]
