"""Problems of a spec: their location, and messages that replace those of pydantic."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from topwork.errors import SpecError
from topwork.spec.job import TransferJob
from topwork.spec.loading.partial_validation import run_skipped_rules
from topwork.spec.loading.yaml_document import Path
from topwork.spec.messages import did_you_mean, format_value, join_words
from topwork.spec.schema import key_types
from topwork.spec.spec_model import SpecModel, Violation

YAML_1_1_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Problem(NamedTuple):
    """One problem of a spec.

    Attributes:
        file: Name of the file as passed on the command line, or the `--set …` option at fault.
        line: Line, counted from 1; 0 if the problem concerns the whole file.
        column: Column, counted from 1.
        path: Path of the key, such as `spec.transfer.epochs`; empty if the problem concerns the document.
        message: The value found, the allowed values, and a suggestion for typos.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        location = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(part for part in (location, self.path, self.message) if part)


class InvalidSpecError(SpecError):
    """All problems of one or more specs."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        # An invalid --set option causes the same problem in every document.
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(map(str, self.problems)))


class Finding(NamedTuple):
    """A problem before its position is known.

    Attributes:
        path: Path of the key.
        message: As in `Problem`.
        at_key: Whether the key is at fault instead of its value.
    """

    path: Path
    message: str
    at_key: bool = False


def format_path(path: Path) -> str:
    """Format a path as in `spec.evaluate.gates[0].metric`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def explain_errors(
    error: ValidationError, data: Mapping[str, Any], root: type[SpecModel] = TransferJob
) -> Iterator[Finding]:
    """Translate errors of pydantic, and add violations of the rules that pydantic skipped.

    Args:
        error: The errors that pydantic reported for `data`.
        data: The validated data.
        root: Model that the data was validated against.

    Yields:
        One finding for each invalid value, and one for each violation of a rule.
    """
    seen: set[Path] = set()
    for details in error.errors(include_url=False):
        for finding in _translate(details, root):
            # Pydantic reports a list that is too short once for each missing item.
            if finding.path not in seen or details["type"] == "rule_violation":
                yield finding
            seen.add(finding.path)
    for path, violation in run_skipped_rules(root, data, error):
        finding = _from_violation(path, violation)
        if finding.path not in seen:
            yield finding


def explain_unknown_key(path: Path, root: type[SpecModel] = TransferJob) -> str:
    """Explain that a key is unknown, where it belongs or which key was probably meant.

    Args:
        path: Path of the unknown key; its parent must exist. May contain tags as in errors of pydantic.
        root: Model where the path starts.

    Returns:
        One or more sentences.
    """
    *parent, key = path
    models = [
        key_type.python_type
        for key_type in key_types.types_at(root, tuple(parent))
        if key_types.is_model(key_type.python_type)
    ]
    known = [name for model in models for name in key_types.fields_by_key(model)]
    locations = [
        location or "the document"
        for location, model in key_types.walk_models(root)
        if key in key_types.fields_by_key(model)
    ]
    hint = (
        f" It is a key of {join_words(list(dict.fromkeys(locations))[:3], 'or')}."
        if locations
        else did_you_mean(key, known)
    )
    return f"unknown key.{hint} Known keys: {', '.join(known)}."


def _from_violation(path: Path, violation: Violation) -> Finding:
    if isinstance(violation.path, tuple):
        return Finding((*path, *violation.path), violation.message)
    steps = tuple(int(step) if step.isdigit() else step for step in violation.path.split(".") if step)
    return Finding((*path, *steps), violation.message)


def _translate(details: ErrorDetails, root: type[SpecModel]) -> Iterator[Finding]:
    tagged = tuple(step for step in details["loc"] if step != "[key]")
    path = tuple(step for step in tagged if not _is_tag(step))
    kind, value = details["type"], details.get("input")
    if kind == "rule_violation":
        yield from (_from_violation(path, violation) for violation in details["ctx"]["violations"])
    elif kind == "extra_forbidden":
        yield Finding(path, explain_unknown_key(tagged, root), at_key=True)
    elif kind == "missing" and isinstance(path[-1], int):
        types = key_types.types_at(root, tagged[:-1])
        yield Finding(path[:-1], f"{format_value(value)} is not allowed. Allowed: {key_types.describe_types(types)}.")
    elif kind == "missing":
        types = key_types.types_at(root, tagged)
        yield Finding(path, f"is required. {_description(tagged, root)} Allowed: {key_types.describe_types(types)}.")
    elif kind == "invalid_value":
        yield Finding(path, details["msg"].rstrip(".") + ".")
    elif "[key]" in details["loc"]:
        message = f"{format_value(value)} is not allowed as a key. Allowed: {_describe_keys(tagged, root)}."
        yield Finding(path, message, at_key=True)
    else:
        # A wrong value does not show which member of a union was meant, so the message lists all of them.
        location = tagged[:-1] if tagged and _is_tag(tagged[-1]) else tagged
        yield Finding(path, _not_allowed(value, key_types.types_at(root, location), details))


def _is_tag(step: str | int) -> bool:
    return isinstance(step, str) and step.startswith("<")


def _not_allowed(value: object, types: tuple[key_types.KeyType, ...], details: ErrorDetails) -> str:
    allowed = key_types.describe_types(types) or details["msg"]
    message = f"{format_value(value)} is not allowed.{_suggest_fix(value, types)} Allowed: {allowed}."
    return message if value is not None else f"{message} Or remove the key."


def _suggest_fix(value: object, types: tuple[key_types.KeyType, ...]) -> str:
    if not isinstance(value, str):
        return ""
    python_types = {key_type.python_type for key_type in types}
    if bool in python_types and value.lower() in YAML_1_1_BOOLEANS:
        return f" Did you mean {YAML_1_1_BOOLEANS[value.lower()]}?"
    if python_types & {int, float} and _is_number(value):
        return " Remove the quotes."
    return did_you_mean(value, key_types.literal_values(types))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _description(path: Path, root: type[SpecModel]) -> str:
    *parent, key = path
    for key_type in key_types.types_at(root, tuple(parent)):
        if key_types.is_model(key_type.python_type) and (
            field := key_types.fields_by_key(key_type.python_type).get(str(key))
        ):
            return field.description or ""
    return ""


def _describe_keys(path: Path, root: type[SpecModel]) -> str:
    mappings = [
        key_type.python_type
        for key_type in key_types.types_at(root, path[:-1])
        if get_origin(key_type.python_type) is dict
    ]
    return " or ".join(key_types.describe_types(key_types.expand_types(get_args(mapping)[0])) for mapping in mappings)
