"""YAML text to plain data that remembers where each key and value stood, whatever text is handed in."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from topwork.spec.messages import shown

# A spec has some 100 values. These bounds end within seconds what is none, such as an alias that multiplies itself.
MOST_CHARACTERS = 256 * 1024
MOST_VALUES = 20_000
MOST_DEPTH = 64
LONGEST_NUMBER = 100
TAG = "tag:yaml.org,2002:"
BASES = {"0x": 16, "0o": 8, "0b": 2}

Path = tuple[str | int, ...]


class Place(NamedTuple):
    """A place in a text; line and column count from 1, in characters."""

    line: int
    column: int


class Fault(NamedTuple):
    """What is wrong with the text itself."""

    place: Place
    path: Path
    message: str


@dataclass
class Document:
    """One document of a YAML text.

    Attributes:
        data: Plain data; None where the document holds nothing.
        values: Where the value of each path stands; that of a block is its key.
        keys: Where the key (or the dash) of each path stands.
        faults: What is wrong with the text itself; `data` then lacks those parts.
    """

    data: Any = None
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Find a path, or the nearest one above it that stands in the text."""
        places = self.keys if key else self.values
        while path and path not in places:
            path, places = path[:-1], self.values
        return places.get(path, Place(1, 1))


class _TooMuchError(Exception):
    """The document is larger than any spec; `path` is where it became so."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def read_documents(text: str) -> Iterator[Document]:
    """Read all documents of a YAML 1.2 text.

    Args:
        text: Any text.

    Yields:
        Each document, those without anything in them too. One whose syntax is broken is the last.
    """
    if len(text) > MOST_CHARACTERS:
        message = f"the file holds {len(text)} characters, more than the {MOST_CHARACTERS} that a spec may have."
        yield Document(faults=[Fault(Place(1, 1), (), message)])
        return
    nodes = YAML(typ="safe", pure=True).compose_all(text)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as that of an anchor that is used again
                node = next(nodes)
        except StopIteration:
            return
        except Exception as error:
            # The parser answers some broken texts with whatever it stumbled over, such as an IndexError.
            yield Document(faults=[_syntax_fault(error, text)])
            return
        yield _Reading().document(node)


class _Reading:
    """Turns the nodes of one document into data."""

    def __init__(self) -> None:
        self._document = Document()
        self._left = MOST_VALUES
        self._open: set[int] = set()

    def document(self, node: Node | None) -> Document:
        if node is not None:
            self._document.values[()] = self._document.keys[()] = _place(node)
            try:
                self._document.data = self._value(node, (), _place(node))
            except _TooMuchError as error:
                self._document.data = None
                self._document.faults = [Fault(self._document.place(error.path), error.path, str(error))]
        return self._document

    def _value(self, node: Node, path: Path, key: Place) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _TooMuchError(
                f"the document holds more than {MOST_VALUES} values, repeated aliases counted each time.", path
            )
        if len(path) > MOST_DEPTH:
            raise _TooMuchError(f"the document is nested more than {MOST_DEPTH} levels deep.", path)
        if id(node) in self._open:
            raise _TooMuchError("the alias stands inside of what it repeats.", path)
        # A block begins a line below its key, and people look for it at the key.
        is_block = isinstance(node, CollectionNode) and not node.flow_style
        is_empty = isinstance(node, ScalarNode) and node.value == "" and node.style is None
        self._document.values[path] = key if is_block or is_empty else _place(node)
        self._document.keys.setdefault(path, key)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        data = self._mapping(node, path) if isinstance(node, MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        return data

    def _sequence(self, node: Node, path: Path) -> list[Any]:
        self._check_tag(node, "seq", path)
        return [self._value(item, (*path, index), _place(item)) for index, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        self._check_tag(node, "map", path)
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in data:
                first = self._document.keys[*path, key].line
                self._fault(_place(key_node), (*path, key), f"stands twice; it is in line {first} already. Keep one.")
                continue
            self._document.keys[*path, key] = _place(key_node)
            data[key] = self._value(value_node, (*path, key), _place(key_node))
        return data

    def _key(self, node: Node, path: Path) -> str | None:
        tag = _tag(node)
        if tag == "merge":
            self._fault(_place(node), (*path, "<<"), "the merge key << is no part of YAML 1.2. Write the keys out.")
        elif not isinstance(node, ScalarNode) or tag not in {"str", "timestamp"}:
            key = node.value or "nothing" if isinstance(node, ScalarNode) else "a list or mapping"
            path = (*path, node.value if isinstance(node, ScalarNode) else "?")
            self._fault(_place(node), path, f"a key is text, and here stands {key}. Put quotes around it.")
        else:
            return self._text(node, path)
        return None

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        tag = _tag(node)
        if tag in {"str", "timestamp"}:
            return self._text(node, path)
        if tag == "null":
            return None
        if tag == "bool" and node.value.lower() in {"true", "false"}:
            return node.value.lower() == "true"
        if tag in {"int", "float"}:
            return self._number(node, path, tag)
        self._fault(_place(node), path, f"the tag {shown(str(node.tag))} is not allowed. Leave it out.")
        return None

    def _text(self, node: ScalarNode, path: Path) -> str:
        text: str = node.value
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self._fault(_place(node), path, "holds half of a surrogate pair, which is no character.")
            return ""
        return text

    def _number(self, node: ScalarNode, path: Path, tag: str) -> int | float | None:
        digits = node.value.replace("_", "").lower()
        if len(digits) > LONGEST_NUMBER:
            self._fault(_place(node), path, f"a number of {len(digits)} characters is more than anything here takes.")
            return None
        try:
            if tag == "float":
                return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", digits))
            sign, number = (-1, digits[1:]) if digits.startswith("-") else (1, digits.removeprefix("+"))
            return sign * (int(number[2:], BASES[number[:2]]) if number[:2] in BASES else int(number))
        except ValueError:
            self._fault(_place(node), path, f"{shown(node.value)} is no number.")
            return None

    def _check_tag(self, node: Node, expected: str, path: Path) -> None:
        if _tag(node) != expected:
            self._fault(_place(node), path, f"the tag {shown(str(node.tag))} is not allowed. Leave it out.")

    def _fault(self, place: Place, path: Path, message: str) -> None:
        self._document.faults.append(Fault(place, path, message))


def _place(node: Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _tag(node: Node) -> str:
    return str(node.tag).removeprefix(TAG)


def _syntax_fault(error: Exception, text: str) -> Fault:
    if isinstance(error, RecursionError):
        return Fault(Place(1, 1), (), f"the document is nested more than {MOST_DEPTH} levels deep.")
    if isinstance(error, ReaderError):
        before = text[: error.position]
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
        return Fault(place, (), f"the character {shown(text[error.position])} is not allowed in YAML.")
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
    line = (text.splitlines() or [""])[min(place.line, len(text.splitlines())) - 1]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Fault(place, (), "a tab stands where YAML wants spaces to indent. Replace it by spaces.")
    words = [part for part in (error.context, error.problem) if part] if isinstance(error, MarkedYAMLError) else []
    return Fault(place, (), f"is no YAML: {'; '.join(words) or 'the parser gave up'}.")
