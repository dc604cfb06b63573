"""The interface of image sources, and how file names become class names."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from topwork.errors import DataError
from topwork.redaction import redact

TRAIN = "train"
"""The only split of a source that defines none."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
"""Usual suffixes of images, for messages only: the content decides whether a file is an image."""

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
class SourceEntry:
    """One image in the listing of a source, known without reading the image.

    Attributes:
        path: Identifies the image in its source: unique, stable and valid Unicode, but not safe to print; see
            `sanitize_name`.
        label: Class name; None if the source has none for this image.
        size: Size of the image file in bytes; None if it is unknown.
        version: ETag, checksum or modification time, which changes when the content changes; None if it is unknown.
        split: Split of a table's image; empty if the path says it, or there is only one.
        group: Group of a table's image; empty without groups.
    """

    path: str
    label: str | None
    size: int | None
    version: str | None
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class SpaceEstimate:
    """Scratch space that a source needs, as far as it is known before the download.

    Attributes:
        download_bytes: Bytes that are downloaded to scratch first, such as an archive.
        image_bytes: Bytes of the image files.
    """

    download_bytes: int
    image_bytes: int


@dataclass
class ClassSize:
    """Images of one class in one split of a source.

    Attributes:
        images: Number of images.
        bytes: Size of their files; 0 for a table.
    """

    images: int = 0
    bytes: int = 0

    def add(self, images: int, size: int) -> None:
        """Count more images and bytes."""
        self.images += images
        self.bytes += size


class Source(Protocol):
    """Labeled images in one or more splits.

    Attributes:
        name: Name of the dataset that is made from the source, as a slug.
        is_listed: Whether `digest` is that of a listing (`entries`): folders and tables.
    """

    name: str
    is_listed: bool

    @property
    def is_versioned(self) -> bool:
        """Whether `digest` is known without downloading an archive."""

    def description(self) -> dict[str, Any]:
        """Return the origin of the images, without credentials; stored in the manifest."""

    def digest(self) -> str:
        """Return a string that changes when the content changes, as far as this is visible without reading images.

        The digest of a listing (`entries`), or of whatever identifies the content as a whole:

        - folder, table: SHA-256 of all entries. S3: paths, classes, sizes and ETags; local: modification times
          instead of ETags. A table also counts the order of its rows.
        - archive: `archive.sha256` if the spec sets it. Otherwise HTTP(S): ETag (or else Last-Modified) and size, which
          are the same on every machine; S3: ETag and size; local: modification time and size. Only for a web server
          that sends neither ETag nor Last-Modified, the archive is downloaded, and its SHA-256 is the digest.
        - TFDS: the full name with the version.
        """

    def entries(self) -> Iterable[SourceEntry] | None:
        """Return one entry per image, in the order of `images`, without reading images.

        Returns:
            The entries, listed again on each call; None if the source cannot be listed without a download: archives
            that are not local zip files, and TFDS.

        Raises:
            DataError: If the source does not exist, contains no images, or its class names are ambiguous.
            UnavailableError: If the source cannot be reached.
        """

    def estimate_space(self) -> SpaceEstimate | None:
        """Return the scratch space that the source needs, or None if it is unknown. Downloads nothing."""

    def class_names(self) -> tuple[str, ...]:
        """Return the classes in the order of their labels."""

    def class_sizes(self) -> Mapping[str, Mapping[str, ClassSize]] | None:
        """Return the images of each class of each split, without reading them.

        Returns:
            Sizes by split and class, with the class "" for rows of a table without one; None for TFDS.
        """

    def splits(self) -> Mapping[str, int | None]:
        """Return the number of images of each split; None where it is unknown."""

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, always in the same order."""


def split_sizes(sizes: Mapping[str, Mapping[str, ClassSize]]) -> dict[str, int]:
    """Return the number of images of each split."""
    return {split: sum(size.images for size in classes.values()) for split, classes in sizes.items()}


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


def normalize_name(text: str) -> str:
    """Return a name in Unicode normalization form C, so that "é" is the same as "e" with a combining accent.

    macOS decomposes file names, Linux and Windows keep them as they were typed.
    """
    return unicodedata.normalize("NFC", text)


def escape_name(text: str) -> str:
    """Make a name printable like `sanitize_name`, but show what it replaces in hexadecimal, as Python would."""
    valid = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return redact(_UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], valid))


class ClassNames:
    """Derives class names from the names of directories or from labels.

    Different spellings of the same Unicode text are one class. Names that only become equal because `sanitize_name`
    replaces some of their characters are different classes, and are rejected.
    """

    def __init__(self, origin: str) -> None:
        """Start without names.

        Args:
            origin: URI of the source for error messages.
        """
        self._origin = origin
        self._class_names: dict[str, str] = {}
        self._originals: dict[str, str] = {}

    def add(self, name: str) -> str:
        """Return the class name of a directory name or label.

        Raises:
            DataError: If a different name has the same class name.
        """
        normalized = normalize_name(name)
        class_name = self._class_names.get(normalized)
        if class_name is None:
            class_name = sanitize_name(normalized)
            other = self._originals.setdefault(class_name, normalized)
            if other != normalized:
                raise DataError(
                    f"{self._origin}: the classes {escape_name(other)} and {escape_name(normalized)} would both be "
                    f"named {class_name}, because they contain invalid UTF-8, unprintable characters, or text that "
                    "looks like a secret. Rename one of them."
                )
            self._class_names[normalized] = class_name
        return class_name


def digest_entries(entries: Iterable[SourceEntry]) -> str:
    """Return the SHA-256 of a listing in hex. It depends on the order of the entries."""
    digest = hashlib.sha256()
    for entry in entries:
        fields = [entry.path, entry.label, entry.size, entry.version, entry.split, entry.group]
        # Earlier versions of topwork had neither splits nor groups.
        digest.update(json.dumps(fields if entry.split or entry.group else fields[:4]).encode())
    return digest.hexdigest()


def find_similar_class_names(class_names: tuple[str, ...]) -> list[str]:
    """Find class names that differ only in case, spaces, width or invisible characters.

    Usually this is a mistake that splits one class in two. It is not an error, because a dataset of letters has such
    classes (A and a).

    Args:
        class_names: All class names.

    Returns:
        One string per group, such as `Cat, cat`.
    """
    groups: dict[str, list[str]] = {}
    for name in class_names:
        visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
        key = "".join(unicodedata.normalize("NFKC", visible).casefold().split())
        groups.setdefault(key, []).append(name)
    return [", ".join(group) for group in groups.values() if len(group) > 1]


def base_name(uri: str) -> str:
    """Return the last component of a path or URI, without the query."""
    return uri.split("?", maxsplit=1)[0].split("#", maxsplit=1)[0].rstrip("/").rsplit("/", 1)[-1]


def is_ignored(parts: tuple[str, ...]) -> bool:
    """Return whether a path is a hidden file or a file created by a file manager, such as `Thumbs.db`."""
    return any(part.startswith(".") or part.lower() in _IGNORED_NAMES for part in parts)
