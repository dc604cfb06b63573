"""YAML documents as plain data, with the line and column of every key and value.

ruamel.yaml parses the text and composes nodes with positions; this module converts the nodes. The round-trip loader of
ruamel.yaml offers the same positions as `.lc`, but cannot replace this conversion: it raises an error without a path at
the first duplicate key, merge key or malformed number, turns a recursive alias into null, parses numbers of any length,
drops the source text of dates and the difference between an empty value and `null`, and has no position for a scalar
document.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from topwork.spec.messages import format_value

# A typical spec has about 100 values. These limits stop malicious input, such as nested aliases, within seconds.
MAX_CHARACTERS = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 64
MAX_NUMBER_LENGTH = 100
TAG_PREFIX = "tag:yaml.org,2002:"
NUMBER_BASES = {"0x": 16, "0o": 8, "0b": 2}

Path = tuple[str | int, ...]


class Position(NamedTuple):
    """A position in a text; line and column count characters from 1."""

    line: int
    column: int


class Issue(NamedTuple):
    """A part of the text that is not valid YAML, or not allowed in a spec."""

    position: Position
    path: Path
    message: str


@dataclass
class Document:
    """One document of a YAML text.

    Attributes:
        data: Plain data; None if the document is empty.
        values: Position of the value at each path. For a block collection, this is the position of its key.
        keys: Position of the key, or list item, at each path.
        issues: Problems of the text; `data` lacks the affected parts.
    """

    data: Any = None
    values: dict[Path, Position] = field(default_factory=dict)
    keys: dict[Path, Position] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)

    def position(self, path: Path, *, key: bool = False) -> Position:
        """Return the position of a path, or of its nearest parent in the text.

        Args:
            path: Keys and list indices.
            key: Whether to return the position of the key instead of the value.
        """
        positions = self.keys if key else self.values
        while path and path not in positions:
            path, positions = path[:-1], self.values
        return positions.get(path, Position(1, 1))


class _LimitError(Exception):
    """The document exceeds a limit at `path`."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def read_documents(text: str) -> Iterator[Document]:
    r"""Read all documents of a YAML 1.2 text.

    Args:
        text: Any text.

    Yields:
        Each document, including empty ones. A document with a syntax error is the last one.

    Example:
        >>> document = next(read_documents("spec:\n  seed: 42"))
        >>> document.data, document.position(("spec", "seed"))
        ({'spec': {'seed': 42}}, Position(line=2, column=9))
    """
    if len(text) > MAX_CHARACTERS:
        message = f"the file has {len(text)} characters, more than the maximum of {MAX_CHARACTERS}."
        yield Document(issues=[Issue(Position(1, 1), (), message)])
        return
    nodes = YAML(typ="safe", pure=True).compose_all(text)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as the warning about a redefined anchor
                node = next(nodes)
        except StopIteration:
            return
        except Exception as error:
            # For some invalid texts, the parser raises errors of other types, such as IndexError.
            yield Document(issues=[_explain_syntax_error(error, text)])
            return
        yield _Converter().convert(node)


class _Converter:
    """Converts the nodes of one document to plain data."""

    def __init__(self) -> None:
        self._document = Document()
        self._remaining_values = MAX_VALUES
        self._ancestors: set[int] = set()

    def convert(self, node: Node | None) -> Document:
        if node is not None:
            self._document.values[()] = self._document.keys[()] = _position(node)
            try:
                self._document.data = self._convert(node, (), _position(node))
            except _LimitError as error:
                self._document.data = None
                self._document.issues = [Issue(self._document.position(error.path), error.path, str(error))]
        return self._document

    def _convert(self, node: Node, path: Path, key: Position) -> Any:
        self._check_limits(node, path)
        # A block collection starts on the line below its key, but users expect the position of the key.
        is_block = isinstance(node, CollectionNode) and not node.flow_style
        is_empty = isinstance(node, ScalarNode) and node.value == "" and node.style is None
        self._document.values[path] = key if is_block or is_empty else _position(node)
        self._document.keys.setdefault(path, key)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        is_mapping = isinstance(node, MappingNode)
        if _tag(node) != ("map" if is_mapping else "seq"):
            self._reject_tag(node, path)
        self._ancestors.add(id(node))
        data = self._mapping(node, path) if is_mapping else self._sequence(node, path)
        self._ancestors.discard(id(node))
        return data

    def _check_limits(self, node: Node, path: Path) -> None:
        self._remaining_values -= 1
        if self._remaining_values < 0:
            raise _LimitError(f"the document has more than {MAX_VALUES} values, counting each use of an alias.", path)
        if len(path) > MAX_DEPTH:
            raise _LimitError(f"the document has more than {MAX_DEPTH} levels of nesting.", path)
        if id(node) in self._ancestors:
            raise _LimitError("the alias refers to a value that contains it.", path)

    def _sequence(self, node: Node, path: Path) -> list[Any]:
        return [self._convert(item, (*path, index), _position(item)) for index, item in enumerate(node.value)]

    def _mapping(self, node: Node, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, position = self._key(key_node, path), _position(key_node)
            if key is None:
                continue
            if key in data:
                first = self._document.keys[*path, key].line
                self._add_issue(
                    key_node, (*path, key), f"duplicate key, already set on line {first}. Remove one of them."
                )
                continue
            self._document.keys[*path, key] = position
            data[key] = self._convert(value_node, (*path, key), position)
        return data

    def _key(self, node: Node, path: Path) -> str | None:
        tag = _tag(node)
        if isinstance(node, ScalarNode) and tag in {"str", "timestamp"}:
            return self._string(node, path)
        if tag == "merge":
            self._add_issue(node, (*path, "<<"), "merge keys (<<) are not supported. Write out the keys.")
        else:
            name, content = (
                (node.value, node.value or "nothing") if isinstance(node, ScalarNode) else ("?", "a collection")
            )
            self._add_issue(node, (*path, name), f"a key must be a string, but found {content}. Add quotes.")
        return None

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        tag = _tag(node)
        if tag in {"str", "timestamp"}:
            return self._string(node, path)
        if tag == "null":
            return None
        if tag == "bool" and node.value.lower() in {"true", "false"}:
            return node.value.lower() == "true"
        if tag in {"int", "float"}:
            return self._number(node, path, tag)
        self._reject_tag(node, path)
        return None

    def _string(self, node: ScalarNode, path: Path) -> str:
        text: str = node.value
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self._add_issue(node, path, "contains an unpaired surrogate, which is not a valid character.")
            return ""
        return text

    def _number(self, node: ScalarNode, path: Path, tag: str) -> int | float | None:
        digits = node.value.replace("_", "").lower()
        if len(digits) > MAX_NUMBER_LENGTH:
            message = f"a number of {len(digits)} characters is too long. The maximum is {MAX_NUMBER_LENGTH}."
            self._add_issue(node, path, message)
            return None
        try:
            if tag == "float":
                return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", digits))
            sign, number = (-1, digits[1:]) if digits.startswith("-") else (1, digits.removeprefix("+"))
            return sign * (int(number[2:], NUMBER_BASES[number[:2]]) if number[:2] in NUMBER_BASES else int(number))
        except ValueError:
            self._add_issue(node, path, f"{format_value(node.value)} is not a number.")
            return None

    def _reject_tag(self, node: Node, path: Path) -> None:
        self._add_issue(node, path, f"the tag {format_value(str(node.tag))} is not allowed. Remove it.")

    def _add_issue(self, node: Node, path: Path, message: str) -> None:
        self._document.issues.append(Issue(_position(node), path, message))


def _position(node: Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)


def _tag(node: Node) -> str:
    return str(node.tag).removeprefix(TAG_PREFIX)


def _explain_syntax_error(error: Exception, text: str) -> Issue:
    if isinstance(error, RecursionError):
        return Issue(Position(1, 1), (), f"the document has more than {MAX_DEPTH} levels of nesting.")
    if isinstance(error, ReaderError):
        before = text[: error.position]
        position = Position(before.count("\n") + 1, len(before) - before.rfind("\n"))
        return Issue(position, (), f"the character {format_value(text[error.position])} is not allowed in YAML.")
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    position = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
    line = (text.splitlines() or [""])[min(position.line, len(text.splitlines())) - 1]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Issue(position, (), "YAML does not allow tabs for indentation. Replace them with spaces.")
    reasons = [part for part in (error.context, error.problem) if part] if isinstance(error, MarkedYAMLError) else []
    return Issue(position, (), f"is not valid YAML: {'; '.join(reasons) or 'the parser failed'}.")
