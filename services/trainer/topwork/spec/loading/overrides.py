"""`--set PATH=VALUE`: values from the command line that replace those of a document before it is validated."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from topwork.spec.job import TransferJob
from topwork.spec.loading.problems import InvalidSpecError, Problem, explain_unknown_key, format_path
from topwork.spec.loading.yaml_document import MAX_DEPTH, Path, read_documents
from topwork.spec.messages import SECRET, format_value
from topwork.spec.schema import key_types

EXAMPLE = "Use PATH=VALUE, such as spec.transfer.epochs=2."


class Override(NamedTuple):
    """One `--set` option.

    Attributes:
        text: The option's argument as written.
        path: Path of the key to set.
        value: Plain data; None removes the key.
    """

    text: str
    path: Path
    value: Any

    def problem(self, path: Path, message: str) -> Problem:
        """Create a problem that is attributed to this option."""
        return _create_problem(self.text, path, message)


class AppliedOverrides(NamedTuple):
    """A document with overrides.

    Attributes:
        data: Plain data; meaningless if there are problems.
        origins: The override that set each path, including mappings that were created for it.
        problems: Overrides that do not fit this document.
    """

    data: Any
    origins: Mapping[Path, Override]
    problems: tuple[Problem, ...]

    def origin(self, path: Path) -> Override | None:
        """Return the override that set a path or one of its parents; None if the value comes from the file."""
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((self.origins[prefix] for prefix in prefixes if prefix in self.origins), None)


class _OverrideError(Exception):
    """An override cannot be parsed or applied; `path` is where it fails."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


def parse_overrides(texts: Iterable[str]) -> tuple[Override, ...]:
    r"""Parse overrides from the command line.

    Args:
        texts: `PATH=VALUE` each. PATH is a dotted path of camelCase keys and list indices, with `\.` for a dot within
            a key. VALUE is YAML.

    Returns:
        The overrides in order.

    Raises:
        InvalidSpecError: With all problems of all overrides.

    Example:
        >>> parse_overrides(["spec.evaluate.gates.0.atLeast=0.9"])[0].path
        ('spec', 'evaluate', 'gates', 0, 'atLeast')
    """
    overrides, problems = [], []
    for text in texts:
        try:
            overrides.append(_parse(text))
        except _OverrideError as error:
            problems.append(_create_problem(text, error.path, str(error)))
    if problems:
        raise InvalidSpecError(tuple(problems))
    return tuple(overrides)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[Override], name: str) -> AppliedOverrides:
    """Apply overrides to a document in order; later ones take precedence.

    Args:
        data: Plain data of the document; not modified.
        overrides: The overrides.
        name: Name of the file in messages.

    Returns:
        A copy of the data with the overrides applied.
    """
    result = deepcopy(dict(data))
    origins: dict[Path, Override] = {}
    problems = []
    for override in overrides:
        try:
            changed = _set(result, override, name)
        except _OverrideError as error:
            problems.append(override.problem(error.path, str(error)))
            continue
        # The new value replaces everything that earlier overrides set below this path.
        origins = {path: origin for path, origin in origins.items() if path[: len(override.path)] != override.path}
        origins.update(dict.fromkeys(changed, override))
    return AppliedOverrides(result, origins, tuple(problems))


def _parse(text: str) -> Override:
    written_path, separator, value = text.partition("=")
    if not separator:
        raise _OverrideError((), f"has no =. {EXAMPLE}")
    # Accept gates[0].metric, as printed in messages, as well as gates.0.metric.
    steps = re.split(r"(?<!\\)\.", re.sub(r"\[(\d+)\]", r".\1", written_path.strip()))
    if not all(steps):
        raise _OverrideError((), f"{'has an empty key in its path' if any(steps) else 'has no path'}. {EXAMPLE}")
    if len(steps) > MAX_DEPTH:
        raise _OverrideError((), f"has a path with more than {MAX_DEPTH} levels.")
    path = _parse_path([step.replace("\\.", ".") for step in steps])
    override = Override(text, path, _parse_value(value, path))
    if override.value is None and isinstance(path[-1], int):
        raise _OverrideError(path, "null removes a key, but this is a list item. Set the whole list instead.")
    return override


def _parse_path(steps: list[str]) -> Path:
    """Convert list indices to integers, and reject paths that do not exist in the spec."""
    path: Path = ()
    for step in steps:
        # key_types.types_at would interpret <name> as the tag of a union member.
        if not step.startswith("<") and key_types.types_at(TransferJob, (*path, step)):
            path = (*path, step)
        elif step.isdecimal() and len(step) < 10 and key_types.types_at(TransferJob, (*path, int(step))):
            path = (*path, int(step))
        else:
            raise _OverrideError((*path, step), _explain_unknown_step(path, step))
    return path


def _explain_unknown_step(parent: Path, step: str) -> str:
    types = key_types.types_at(TransferJob, parent)
    if any(key_types.is_model(key_type.python_type) for key_type in types):
        return explain_unknown_key((*parent, step))
    if any(key_types.is_list(key_type.python_type) for key_type in types):
        return f"{format_path(parent)} is a list. Use the index of an item, such as {format_path((*parent, 0))}."
    return f"{format_path(parent)} is not a mapping. Allowed: {key_types.describe_types(types)}."


def _parse_value(text: str, path: Path) -> Any:
    documents = [document for document in read_documents(text) if document.values or document.issues]
    if issues := [issue for document in documents for issue in document.issues]:
        raise _OverrideError((*path, *issues[0].path), issues[0].message)
    if not documents:
        raise _OverrideError(path, "has no value after the =. Use null to remove the key, or '' for an empty string.")
    if len(documents) > 1:
        raise _OverrideError(path, f"has {len(documents)} YAML documents after the =. Use a single value.")
    return documents[0].data


def _set(data: dict[str, Any], override: Override, name: str) -> list[Path]:
    """Set or remove one value.

    Returns:
        The path of the override, and the paths of mappings that were created for it.
    """
    path, changed = override.path, [override.path]
    node: Any = data
    for depth, step in enumerate(path[:-1]):
        _check_step(node, path, depth, name)
        child = node[step] if isinstance(step, int) else node.get(step)
        if child is None:
            if override.value is None:
                return changed  # there is nothing to remove
            node[step] = child = {}
            changed.append(path[: depth + 1])
        node = child
    _check_step(node, path, len(path) - 1, name)
    if override.value is None:
        node.pop(path[-1], None)
    else:
        node[path[-1]] = deepcopy(override.value)
    return changed


def _check_step(node: Any, path: Path, depth: int, name: str) -> None:
    """Reject a path step that does not fit the document."""
    parent, step = path[:depth], path[depth]
    if isinstance(step, int) and not isinstance(node, list):
        problem = f"is {format_value(node)} in {name}" if node else f"is not set in {name}"
        raise _OverrideError(parent, f"{problem}. Set the whole list, such as {format_path(parent)}=[…].")
    if isinstance(step, int) and step >= len(node):
        last = f"the last index is {len(node) - 1}" if node else "the list is empty"
        raise _OverrideError(path[: depth + 1], f"does not exist in {name}: {last}.")
    if isinstance(step, str) and not isinstance(node, dict):
        raise _OverrideError(
            parent,
            f"is {format_value(node)} in {name}, which has no key {format_value(step)}. Set the whole mapping, such as "
            f"{format_path(parent)}={{{step}: …}}.",
        )


def _create_problem(text: str, path: Path, message: str) -> Problem:
    # The location of a problem is a single line without secrets.
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return Problem(f"--set {SECRET.sub('…', line) if '://' in line else line}", 0, 0, format_path(path), message)
