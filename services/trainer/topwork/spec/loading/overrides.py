"""`--set PATH=VALUE`: values of a command line, put into the plain data of a document before it is validated."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from topwork.spec.job import TransferJob
from topwork.spec.loading.problems import Problem, WrongSpec, dotted, unknown_key
from topwork.spec.loading.yaml_document import MOST_DEPTH, Path, read_documents
from topwork.spec.messages import SECRET, shown
from topwork.spec.schema import key_types

EXAMPLE = "Write PATH=VALUE, such as spec.transfer.epochs=2."


class Override(NamedTuple):
    """One `--set`.

    Attributes:
        text: What was written behind `--set`.
        path: Where the value belongs.
        value: Plain data; None takes the key out.
    """

    text: str
    path: Path
    value: Any

    def problem(self, path: Path, message: str) -> Problem:
        """Say what is wrong with what this option set."""
        return _problem(self.text, path, message)


class Applied(NamedTuple):
    """A document with the overrides in it.

    Attributes:
        data: Plain data; of no use where there are problems.
        origins: What each override made: its own path, and mappings above it that were not there.
        problems: Why an override does not fit this document.
    """

    data: Any
    origins: Mapping[Path, Override]
    problems: tuple[Problem, ...]

    def origin(self, path: Path) -> Override | None:
        """Find the override that a path, or what it lies in, comes from; None if it is that of the file."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((self.origins[place] for place in above if place in self.origins), None)


class _RefusedError(Exception):
    """An override can't be made; `path` is where it goes wrong."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


def parse_overrides(texts: Iterable[str]) -> tuple[Override, ...]:
    r"""Read overrides as a command line holds them.

    Args:
        texts: Each `PATH=VALUE`: a dotted path of camelCase keys, list items by their number, `\.` for a dot within a
            key; then YAML.

    Returns:
        The overrides in the order in which they stand.

    Raises:
        WrongSpec: With all that is wrong with all of them.
    """
    overrides, problems = [], []
    for text in texts:
        try:
            overrides.append(_parsed(text))
        except _RefusedError as error:
            problems.append(_problem(text, error.path, str(error)))
    if problems:
        raise WrongSpec(tuple(problems))
    return tuple(overrides)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[Override], name: str) -> Applied:
    """Put overrides into a document, in order: the last one counts.

    Args:
        data: Plain data of the document; left as it is.
        overrides: What is to be set.
        name: Name of the file in messages.

    Returns:
        A copy of the data with the overrides in it.
    """
    result = deepcopy(dict(data))
    origins: dict[Path, Override] = {}
    problems = []
    for override in overrides:
        try:
            made = _put(result, override, name)
        except _RefusedError as error:
            problems.append(override.problem(error.path, str(error)))
            continue
        # What earlier ones had set below is gone.
        origins = {path: one for path, one in origins.items() if path[: len(override.path)] != override.path}
        origins.update(dict.fromkeys(made, override))
    return Applied(result, origins, tuple(problems))


def _parsed(text: str) -> Override:
    written, separator, value = text.partition("=")
    if not separator:
        raise _RefusedError((), f"has no =. {EXAMPLE}")
    # As messages print it, gates[0].metric is the same as gates.0.metric.
    steps = re.split(r"(?<!\\)\.", re.sub(r"\[(\d+)\]", r".\1", written.strip()))
    if not all(steps):
        raise _RefusedError((), f"{'has an empty key in its path' if any(steps) else 'has no path'}. {EXAMPLE}")
    if len(steps) > MOST_DEPTH:
        raise _RefusedError((), f"goes more than {MOST_DEPTH} levels deep.")
    path = _known_path([step.replace("\\.", ".") for step in steps])
    override = Override(text, path, _value(value, path))
    if override.value is None and isinstance(path[-1], int):
        raise _RefusedError(path, "null takes a key out, and this is an item of a list. Give the whole list instead.")
    return override


def _known_path(steps: list[str]) -> Path:
    """Tell the numbers of list items from keys, and refuse what no spec has."""
    path: Path = ()
    for step in steps:
        # To shape.at, <name> is one of several types.
        if not step.startswith("<") and key_types.at(TransferJob, (*path, step)):
            path = (*path, step)
        elif step.isdecimal() and len(step) < 10 and key_types.at(TransferJob, (*path, int(step))):
            path = (*path, int(step))
        else:
            raise _RefusedError((*path, step), _no_such(path, step))
    return path


def _no_such(above: Path, step: str) -> str:
    found = key_types.at(TransferJob, above)
    if any(key_types.is_part(kind.of) for kind in found):
        return unknown_key((*above, step))
    if any(key_types.is_list(kind.of) for kind in found):
        return f"{dotted(above)} is a list: name an item by its number, such as {dotted((*above, 0))}."
    return f"{dotted(above)} is no mapping: it is {key_types.allowed(found)}."


def _value(text: str, path: Path) -> Any:
    documents = [document for document in read_documents(text) if document.values or document.faults]
    if faults := [fault for document in documents for fault in document.faults]:
        raise _RefusedError((*path, *faults[0].path), faults[0].message)
    if not documents:
        raise _RefusedError(path, "has no value behind the =. null takes the key out, and '' is an empty text.")
    if len(documents) > 1:
        raise _RefusedError(path, f"{len(documents)} YAML documents stand behind the =, and a value is one.")
    return documents[0].data


def _put(data: dict[str, Any], override: Override, name: str) -> list[Path]:
    """Set or take out one value.

    Returns:
        The path, and those of the mappings that were made on the way.
    """
    path, made = override.path, [override.path]
    here: Any = data
    for depth, step in enumerate(path[:-1]):
        _check(here, path, depth, name)
        there = here[step] if isinstance(step, int) else here.get(step)
        if there is None:
            if override.value is None:
                return made  # nothing is there to be taken out
            here[step] = there = {}
            made.append(path[: depth + 1])
        here = there
    _check(here, path, len(path) - 1, name)
    if override.value is None:
        here.pop(path[-1], None)
    else:
        here[path[-1]] = deepcopy(override.value)
    return made


def _check(here: Any, path: Path, depth: int, name: str) -> None:
    """Refuse to go where the document has no such place."""
    above, step = path[:depth], path[depth]
    if isinstance(step, int) and not isinstance(here, list):
        stands = f"is {shown(here)} in {name}" if here else f"is not in {name}"
        raise _RefusedError(above, f"{stands}. Set the whole list, such as {dotted(above)}=[…].")
    if isinstance(step, int) and step >= len(here):
        last = f"the last is {len(here) - 1}" if here else "none"
        raise _RefusedError(path[: depth + 1], f"{name} has no item {step} there; counted from 0, {last}.")
    if isinstance(step, str) and not isinstance(here, dict):
        raise _RefusedError(
            above,
            f"is {shown(here)} in {name}, which holds no key {shown(step)}. Set the whole, such as "
            f"{dotted(above)}={{{step}: …}}.",
        )


def _problem(text: str, path: Path, message: str) -> Problem:
    # A place is one line, and shows no secret.
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return Problem(f"--set {SECRET.sub('…', line) if '://' in line else line}", 0, 0, dotted(path), message)
