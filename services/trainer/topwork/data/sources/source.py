"""The interface of image sources, and how file names become class names."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from topwork.redaction import redact

TRAIN = "train"
"""The only split of every source except TFDS."""

# Control characters, line separators, and marks that change the direction of text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_IGNORED_NAMES = {"thumbs.db", "desktop.ini", "icon\r", "icon?", "__macosx", "lost+found"}


@dataclass(frozen=True)
class SourceImage:
    """One image of a source.

    Attributes:
        name: Path or number that identifies the image to the user.
        label: Class name; None if the source has none for this image.
        read: Returns the encoded image; raises `Rejection` if it is missing or not allowed. Thread-safe.
    """

    name: str
    label: str | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class SpaceEstimate:
    """Scratch space that a source needs, as far as it is known before the download.

    Attributes:
        download_bytes: Bytes that are downloaded to scratch first, such as an archive.
        image_bytes: Bytes of the image files.
    """

    download_bytes: int
    image_bytes: int


class Source(Protocol):
    """Labeled images in one or more splits.

    Attributes:
        name: Name of the dataset that is made from the source, as a slug.
    """

    name: str

    def description(self) -> dict[str, Any]:
        """Return the origin of the images, without credentials; stored in the manifest."""

    def digest(self) -> str:
        """Return a string that changes when the content changes, as far as this is visible without reading images."""

    def estimate_space(self) -> SpaceEstimate | None:
        """Return the scratch space that the source needs, or None if it is unknown. Downloads nothing."""

    def class_names(self) -> tuple[str, ...]:
        """Return the classes in the order of their labels."""

    def splits(self) -> Mapping[str, int | None]:
        """Return the number of images of each split; None where it is unknown."""

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, always in the same order."""


def slugify(text: str) -> str:
    """Convert text to a name of at most 60 lower-case letters, digits, `-` and `_`.

    Args:
        text: A file name, directory name or TFDS name.

    Returns:
        The name; `dataset` if no allowed character is left.
    """
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:60].strip("-_") or "dataset"


def sanitize_name(text: str) -> str:
    """Make a file or class name safe to store and to print.

    Characters that could overwrite a terminal, break a line of `labels.txt` or change the text direction, and invalid
    Unicode, become question marks. Secrets, such as the signature of a URL, become asterisks.
    """
    return _UNPRINTABLE.sub("?", redact(text))


def find_similar_class_names(class_names: tuple[str, ...]) -> list[str]:
    """Find class names that differ only in case or spaces.

    Usually this is a mistake that splits one class in two. It is not an error, because a dataset of letters has such
    classes (A and a).

    Args:
        class_names: All class names.

    Returns:
        One string per group, such as `Cat, cat`.
    """
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return [", ".join(group) for group in groups.values() if len(group) > 1]


def base_name(uri: str) -> str:
    """Return the last component of a path or URI, without the query."""
    return uri.split("?", maxsplit=1)[0].split("#", maxsplit=1)[0].rstrip("/").rsplit("/", 1)[-1]


def is_ignored(parts: tuple[str, ...]) -> bool:
    """Return whether a path is a hidden file or a file created by a file manager, such as `Thumbs.db`."""
    return any(part.startswith(".") or part.lower() in _IGNORED_NAMES for part in parts)


def class_from_path(parts: tuple[str, ...]) -> str | None:
    """Return the class of a path, which is its first directory; None for files outside of class directories."""
    return parts[0] if len(parts) > 1 and not is_ignored(parts) else None
