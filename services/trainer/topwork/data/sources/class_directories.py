"""The rule of folders and archives that each top-level directory is a class, and explanations if this looks wrong.

With `splits: auto`, the top-level directories are splits, and those below them classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from topwork.data.sources.source import (
    IMAGE_SUFFIXES,
    TRAIN,
    ClassNames,
    ClassSize,
    escape_name,
    is_ignored,
    normalize_name,
    sanitize_name,
)
from topwork.data.splits.predefined import format_spellings, match_splits, split_of_name
from topwork.errors import DataError

log = structlog.get_logger(__name__)

MAX_NAMES_SHOWN = 10
MAX_DIRECTORIES = 10_000
"""Directories that are remembered to explain a wrong root."""


@dataclass
class ClassDirectories:
    """Collects the paths of a listing and assigns their classes.

    Attributes:
        origin: URI of the source for messages.
        root: Directory of the listing, for messages and suggestions.
        root_key: Spec key that selects the root.
        has_splits: Whether the top-level directories are splits.
        sizes: The images in class directories, by split and class.
    """

    origin: str
    root: str
    root_key: str
    has_splits: bool = False
    sizes: dict[str, dict[str, ClassSize]] = field(default_factory=dict)
    _names: ClassNames = field(init=False)
    _classes: set[str] = field(default_factory=set)
    _empty: set[str] = field(default_factory=set)
    _children: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    _with_images: set[tuple[str, ...]] = field(default_factory=set)
    _loose: list[str] = field(default_factory=list)
    _loose_count: int = 0
    _outside: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._names = ClassNames(self.origin)

    def class_of(self, parts: tuple[str, ...]) -> str | None:
        """Return the class of a file: its first directory, or the one below a split.

        None if the file is ignored or outside of all classes.

        Args:
            parts: Components of the path, relative to the root.

        Raises:
            DataError: If two directories would get the same class name.
        """
        parts = tuple(part for part in parts if part)
        if len(parts) <= self._class_depth or is_ignored(parts):
            return None
        return self._names.add(parts[self._class_depth - 1])

    def split_of(self, parts: tuple[str, ...]) -> str:
        """Return the split of a file: train, unless the top-level directories are splits.

        Args:
            parts: Components of the path of a file with a class.
        """
        return (split_of_name(next(filter(None, parts))) or TRAIN) if self.has_splits else TRAIN

    def add_file(self, parts: tuple[str, ...], size: int = 0) -> str | None:
        """Count a file and return its class; see `class_of`."""
        label = self.class_of(parts)
        if label is None:
            is_loose = len(parts) <= self._class_depth and not is_ignored(parts)
            if is_loose and parts[-1].lower().endswith(IMAGE_SUFFIXES):
                self._loose_count += 1
                self._loose += ["/".join(parts)] if len(self._loose) < MAX_NAMES_SHOWN else []
            return None
        self._classes.add(label)
        self.sizes.setdefault(self.split_of(parts), {}).setdefault(label, ClassSize()).add(1, size)
        directory = parts[:-1]
        if directory not in self._with_images and len(self._with_images) < MAX_DIRECTORIES:
            self._with_images.add(directory)
            for depth in range(len(directory)):
                self._children.setdefault(directory[:depth], set()).add(directory[depth])
        return label

    def add_outside(self, parts: tuple[str, ...]) -> None:
        """Record a file outside of the root, to suggest other roots."""
        if len(self._outside) < MAX_NAMES_SHOWN and not is_ignored(parts):
            self._outside.add("/".join(map(escape_name, parts[:-1])) or ".")

    def add_directory(self, parts: tuple[str, ...]) -> None:
        """Record a directory, which may turn out to be an empty class."""
        if len(parts) == self._class_depth and parts[-1] and not is_ignored(parts):
            self._empty.add(parts[-1])

    def finish(self) -> tuple[str, ...]:
        """Return the class names, sorted, and report what was ignored.

        Raises:
            DataError: If there is no image in a class directory, or the root is not the directory of the classes.
        """
        if not self.sizes:
            raise self._no_images()
        if self.has_splits:
            self._check_splits()
        else:
            self._check_level()
        if empty := sorted(name for name in self._empty if sanitize_name(normalize_name(name)) not in self._classes):
            log.warning("class directories without images are ignored", origin=self.origin, **_shorten(empty))
        if self._loose:
            log.warning(
                "images outside of class directories are ignored",
                origin=self.origin,
                **_shorten(self._loose, self._loose_count),
            )
        return tuple(sorted(self._classes))

    def _no_images(self) -> DataError:
        where = f"{self.origin} contains no image in a class directory{self._below_root}"
        if self._loose:
            return DataError(
                f"{where}, but it directly contains image files, such as {escape_name(self._loose[0])}. The address "
                f"may be one level too low: set {self.root_key} to the directory above, which contains one directory "
                "per class."
            )
        if self._outside:
            where += f". Directories with files: {', '.join(sorted(self._outside))}"
        return DataError(
            f"{where}. Expected <class>/<image>, such as cat/1.jpg; set {self.root_key} to the directory that contains "
            "the class directories."
        )

    def _check_splits(self) -> None:
        """Reject a root whose directories are not splits."""
        top = sorted(self._children.get((), set()))
        if others := [name for name in top if split_of_name(name) is None]:
            named = ", ".join(map(escape_name, others[:MAX_NAMES_SHOWN]))
            raise DataError(
                f"spec.dataset.splits is auto, which expects only directories of splits ({format_spellings()}), each "
                f"with one directory per class, but {self.origin} contains {named}{self._below_root}. Set "
                f"{self.root_key} to the directory of the splits, or divide the images with fractions: "
                "spec.dataset.splits: {train: 0.8, validation: 0.1, test: 0.1}."
            )
        match_splits(top, self.origin)

    def _check_level(self) -> None:
        """Reject a root that is one or more levels above the class directories."""
        top = self._children.get((), set())
        if len(top) > 1 and all(map(split_of_name, top)) and not any((name,) in self._with_images for name in top):
            found = ", ".join(sorted(map(escape_name, top)))
            train = next((name for name in sorted(top) if split_of_name(name) == TRAIN), min(top))
            raise DataError(
                f"{self.origin} contains directories of splits ({found}){self._below_root}, not of "
                f"classes: {self._describe_children((train,))}. Set spec.dataset.splits: auto to use these splits, or "
                f"set {self.root_key} to one of them, such as {self._join((train,))}, and divide it."
            )
        wrapper: tuple[str, ...] = ()
        while len(children := self._children.get(wrapper, set())) == 1 and wrapper not in self._with_images:
            wrapper = (*wrapper, *children)
        if wrapper and len(children) > 1 and wrapper not in self._with_images:
            raise DataError(
                f"{self.origin} contains only one class{self._below_root}, {escape_name(wrapper[0])}, "
                f"which is probably one level too high: {self._describe_children(wrapper)}. Set {self.root_key} to "
                f"{self._join(wrapper)}."
            )

    @property
    def _class_depth(self) -> int:
        """Number of components of the path of a class directory."""
        return 2 if self.has_splits else 1

    @property
    def _below_root(self) -> str:
        return f" below {self.root}" if self.root and self.root != self.origin else ""

    def _describe_children(self, directory: tuple[str, ...]) -> str:
        names = sorted(map(escape_name, self._children.get(directory, ())))
        more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        shown = f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"
        return f"{'/'.join(map(escape_name, directory))} contains the directories {shown}"

    def _join(self, directory: tuple[str, ...]) -> str:
        path = "/".join(map(escape_name, directory))
        return f"{self.root.rstrip('/')}/{path}" if self.root else path


def _shorten(names: Sequence[str], count: int | None = None) -> dict[str, object]:
    """Return a number of names and the first of them, as fields of a log entry."""
    return {"count": count or len(names), "names": ", ".join(map(escape_name, names[:MAX_NAMES_SHOWN]))}
