"""Paths of keys as text, such as `spec.evaluate.gates.0.metric`, and setting the value at a path of plain data."""

import re
from copy import deepcopy
from functools import cache
from typing import Any

from topwork.spec.loading.problems import explain_unknown_key, format_path
from topwork.spec.loading.yaml_document import MAX_DEPTH, Path
from topwork.spec.messages import format_value
from topwork.spec.schema import key_types
from topwork.spec.spec_model import SpecModel


class PathError(Exception):
    """A path does not exist in the spec, or a value cannot be set there; `path` is where it fails."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


@cache
def parse_path(text: str, root: type[SpecModel]) -> Path:
    r"""Parse the path of a key.

    Args:
        text: A dotted path of camelCase keys and list indices, with `\.` for a dot within a key.
        root: Model where the path starts.

    Returns:
        The path.

    Raises:
        PathError: If the path is empty, too long, or does not exist in the model.

    Example:
        >>> parse_path("evaluate.gates[0].atLeast", JobSpec)
        ('evaluate', 'gates', 0, 'atLeast')
    """
    # Accept gates[0].metric, as printed in messages, as well as gates.0.metric.
    steps = re.split(r"(?<!\\)\.", re.sub(r"\[(\d+)\]", r".\1", text.strip()))
    if not all(steps):
        raise PathError((), "has an empty key in its path." if any(steps) else "has no path.")
    if len(steps) > MAX_DEPTH:
        raise PathError((), f"has a path with more than {MAX_DEPTH} levels.")
    path: Path = ()
    for step in (step.replace("\\.", ".") for step in steps):
        # key_types.types_at would interpret <name> as the tag of a union member.
        if not step.startswith("<") and key_types.types_at(root, (*path, step)):
            path = (*path, step)
        elif step.isdecimal() and len(step) < 10 and key_types.types_at(root, (*path, int(step))):
            path = (*path, int(step))
        else:
            raise PathError((*path, step), _explain_unknown_step(path, step, root))
    return path


def _explain_unknown_step(parent: Path, step: str, root: type[SpecModel]) -> str:
    types = key_types.types_at(root, parent)
    if any(key_types.is_model(key_type.python_type) for key_type in types):
        return explain_unknown_key((*parent, step), root)
    if any(key_types.is_list(key_type.python_type) for key_type in types):
        return f"{format_path(parent)} is a list. Use the index of an item, such as {format_path((*parent, 0))}."
    return f"{format_path(parent)} is not a mapping. Allowed: {key_types.describe_types(types)}."


def set_value(data: dict[str, Any], path: Path, value: Any, name: str) -> list[Path]:
    """Set or remove the value at a path.

    Args:
        data: Plain data; modified in place.
        path: Path of the key.
        value: Plain data; None removes the key.
        name: Where the data comes from, for messages.

    Returns:
        The path, and the paths of mappings that were created for it.

    Raises:
        PathError: If a value on the way is not a mapping, a list has no such item, or an item would be removed.
    """
    if value is None and isinstance(path[-1], int):
        raise PathError(path, "null removes a key, but this is a list item. Set the whole list instead.")
    changed = [path]
    node: Any = data
    for depth, step in enumerate(path[:-1]):
        _check_step(node, path, depth, name)
        child = node[step] if isinstance(step, int) else node.get(step)
        if child is None:
            if value is None:
                return changed  # there is nothing to remove
            node[step] = child = {}
            changed.append(path[: depth + 1])
        node = child
    _check_step(node, path, len(path) - 1, name)
    if value is None:
        node.pop(path[-1], None)
    else:
        node[path[-1]] = deepcopy(value)
    return changed


def _check_step(node: Any, path: Path, depth: int, name: str) -> None:
    """Reject a path step that does not fit the data."""
    parent, step = path[:depth], path[depth]
    if isinstance(step, int) and not isinstance(node, list):
        problem = f"is {format_value(node)} in {name}" if node else f"is not set in {name}"
        raise PathError(parent, f"{problem}. Set the whole list, such as {format_path(parent)}=[…].")
    if isinstance(step, int) and step >= len(node):
        last = f"the last index is {len(node) - 1}" if node else "the list is empty"
        raise PathError(path[: depth + 1], f"does not exist in {name}: {last}.")
    if isinstance(step, str) and not isinstance(node, dict):
        raise PathError(
            parent,
            f"is {format_value(node)} in {name}, which has no key {format_value(step)}. Set the whole mapping, such as "
            f"{format_path(parent)}={{{step}: …}}.",
        )
