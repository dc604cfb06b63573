"""What every source of images gives, and how file names are understood."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from topwork.redaction import without_secrets

TRAIN = "train"
"""The one split of every source but TFDS."""

# Control characters, separators of lines, and the marks that change the direction of a text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_IGNORED_NAMES = {"thumbs.db", "desktop.ini", "icon\r", "icon?", "__macosx", "lost+found"}


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        name: Where it comes from, unique enough for a person to find it.
        label: Its class; None where the source names none.
        read: Gives the file; raises `Rejection` where there is none to give. May be called from another thread.
    """

    name: str
    label: str | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Room:
    """What a source takes on scratch, as far as can be told before it is fetched.

    Attributes:
        fetched: Bytes that are fetched to scratch first, such as an archive.
        images: Bytes of the image files.
    """

    fetched: int
    images: int


class Source(Protocol):
    """Images with classes, in one or several splits.

    Attributes:
        name: Name of the dataset that is made of it, as a slug.
    """

    name: str

    def description(self) -> dict[str, Any]:
        """Say where the images come from, without credentials: for the manifest and for people."""

    def digest(self) -> str:
        """Stand for the content as well as can be told without reading the images."""

    def room(self) -> Room | None:
        """Tell what the source takes on scratch, before anything is fetched; None where nobody knows."""

    def class_names(self) -> tuple[str, ...]:
        """Classes, in the order of their labels."""

    def splits(self) -> Mapping[str, int | None]:
        """Splits, each with its number of images where that is known."""

    def items(self, split: str) -> Iterator[Item]:
        """Yield the images of a split, in the same order each time."""


def slug(text: str) -> str:
    """Turn any text into a name of lower-case letters, digits, `-` and `_`, at most 60 long.

    Args:
        text: Such as a file name, a folder or a TFDS name.

    Returns:
        The name; `dataset` where nothing is left.
    """
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:60].strip("-_") or "dataset"


def printable(text: str) -> str:
    """Turn what is no Unicode in a name (half of a pair, or bytes that are no UTF-8) into question marks.

    The same becomes of what would write over a terminal, break a line of `labels.txt` or turn a text around. What is
    secret, such as the signature in an address, becomes asterisks: names are stored and shown.
    """
    return _UNPRINTABLE.sub("?", without_secrets(text))


def lookalikes(class_names: tuple[str, ...]) -> list[str]:
    """Find classes that differ by case or spaces alone.

    Most often that is a slip, which halves a class; but letters have such classes (A and a), so they are no error.

    Args:
        class_names: All classes.

    Returns:
        Each such group as `Cat, cat`.
    """
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return [", ".join(group) for group in groups.values() if len(group) > 1]


def last_part(uri: str) -> str:
    """Give the last part of a path or address, without a query."""
    return uri.split("?", maxsplit=1)[0].split("#", maxsplit=1)[0].rstrip("/").rsplit("/", 1)[-1]


def is_ignored(parts: tuple[str, ...]) -> bool:
    """Say whether a path is a hidden file or the litter of a file manager, which is no image by intention."""
    return any(part.startswith(".") or part.lower() in _IGNORED_NAMES for part in parts)


def class_of(parts: tuple[str, ...]) -> str | None:
    """Give the class that a path names: its first folder; None for a file beside the class folders."""
    return parts[0] if len(parts) > 1 and not is_ignored(parts) else None
