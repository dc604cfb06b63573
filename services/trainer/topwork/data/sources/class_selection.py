"""Selects, orders and merges the classes of a source, by `spec.dataset.classes`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from topwork.data.dataset_manifest import ClassSelectionSummary, origin_of
from topwork.data.sources.source import (
    ClassSize,
    Source,
    SourceEntry,
    SourceImage,
    SpaceEstimate,
    digest_entries,
    normalize_name,
    sanitize_name,
    split_sizes,
)
from topwork.errors import DataError
from topwork.spec.classes import ClassesSetting, ExcludedClasses, classes_content, list_classes
from topwork.spec.messages import did_you_mean, format_value

MAX_NAMES_SHOWN = 20


class ClassSelection:
    """Which class of the model each class of the source belongs to.

    Names of the spec are compared in the form that class names of sources have: `normalize_name`, `sanitize_name`.

    Example:
        >>> selection = ClassSelection(({"vehicle": ("car", "truck")}, "person"))
        >>> selection.class_of("truck"), selection.class_of("dog")
        ('vehicle', None)
        >>> selection.select(("car", "dog", "person", "truck"), "s3://photos")
        ('vehicle', 'person')
    """

    def __init__(self, classes: ClassesSetting | None = None) -> None:
        """Interpret a setting.

        Args:
            classes: `spec.dataset.classes`; None selects all classes.

        Raises:
            DataError: If two names are the same without unprintable characters and secrets.
        """
        self.content = None if classes is None else classes_content(classes)
        self._excluded: frozenset[str] = frozenset()
        self._classes: dict[str, tuple[str, ...]] | None = None
        if isinstance(classes, ExcludedClasses):
            self._excluded = frozenset(map(_class_name, classes.exclude))
        elif classes is not None:
            listed = [
                (_class_name(name), tuple(sorted(map(_class_name, names)))) for _, name, names in list_classes(classes)
            ]
            self._classes = dict(listed)
            _check_distinct(listed)
        self._class_of = {source: name for name, sources in (self._classes or {}).items() for source in sources}

    def class_of(self, name: str) -> str | None:
        """Return the class of the model that a class of the source belongs to; None if it is left out."""
        if self._classes is None:
            return None if name in self._excluded else name
        return self._class_of.get(name)

    def select(self, source_classes: tuple[str, ...], origin: str) -> tuple[str, ...]:
        """Return the classes of the model, in the order of their labels.

        Args:
            source_classes: All classes of the source, in its order.
            origin: URI or name of the source for messages.

        Raises:
            DataError: If the source lacks a class, a name would be ambiguous, or only one class remains.
        """
        known = set(source_classes)
        if unknown := [name for name in self._class_of or sorted(self._excluded) if name not in known]:
            raise _unknown_classes(unknown, source_classes, origin)
        if self._classes is None:
            names = tuple(name for name in source_classes if name not in self._excluded)
        else:
            names = tuple(self._classes)
        for name, sources in self.merged.items():
            if name in known and name not in sources:
                raise DataError(
                    f"spec.dataset.classes names {_join(sources)} {format_value(name)}, but {origin} has a class of "
                    f"this name, which is left out. Add {format_value(name)} to the merged classes, or use another "
                    "name."
                )
        if len(names) < 2:
            raise DataError(
                f"spec.dataset.classes leaves only {_join(names) or 'no class'} of {origin}, but a classifier needs at "
                f"least two classes. Classes of the source: {_join(source_classes)}."
            )
        return names

    @property
    def merged(self) -> dict[str, tuple[str, ...]]:
        """The classes of the source that each merged or renamed class consists of."""
        return {name: sources for name, sources in (self._classes or {}).items() if sources != (name,)}


class SelectedClasses:
    """A source with the classes of a selection. Images of other classes are neither listed nor read.

    Images without a class are kept: they are rejected with this reason.
    """

    def __init__(self, source: Source, selection: ClassSelection) -> None:
        self.name = source.name
        self.is_listed = source.is_listed
        self._source = source
        self._selection = selection
        self._class_names: tuple[str, ...] | None = None
        self._digest: str | None = None
        self._left_out: dict[str, Counter[str]] = {}

    @property
    def is_versioned(self) -> bool:
        """As of the source."""
        return self._source.is_versioned

    def description(self) -> dict[str, Any]:
        """Return the origin of the images; the selection is not part of it."""
        return self._source.description()

    def digest(self) -> str:
        """Return the digest of the selected images if that of the source is one of a listing, or else that of it."""
        if not self.is_listed:
            return self._source.digest()
        if self._digest is None:
            self._digest = digest_entries(self.entries() or ())
            self.class_names()
        return self._digest

    def entries(self) -> Iterator[SourceEntry] | None:
        """Return the entries of the selected images, with their classes of the model."""
        entries = self._source.entries()
        return None if entries is None else self._select_entries(iter(entries))

    def _select_entries(self, entries: Iterator[SourceEntry]) -> Iterator[SourceEntry]:
        for entry in entries:
            label = entry.label and self._selection.class_of(entry.label)
            if label or not entry.label:
                yield replace(entry, label=label)

    def estimate_space(self) -> SpaceEstimate | None:
        """Return the space for the selected images.

        Without a listing, it is known only after `class_names`: that of the images in an archive, and for TFDS the
        share of the selected classes, as if all were of the same size.
        """
        estimate = self._source.estimate_space()
        return estimate and replace(estimate, image_bytes=self._estimate_images(estimate.image_bytes))

    def _estimate_images(self, source_bytes: int) -> int:
        if not self.is_listed and self._class_names is None:
            return 0
        if (sizes := self.class_sizes()) is not None:
            return sum(size.bytes for classes in sizes.values() for size in classes.values())
        names = self._source.class_names()
        return round(source_bytes * sum(self._selection.class_of(name) is not None for name in names) / len(names))

    def class_names(self) -> tuple[str, ...]:
        """Return the classes of the model in the order of their labels; see `ClassSelection.select`."""
        if self._class_names is None:
            self._class_names = self._selection.select(self._source.class_names(), self._origin)
        return self._class_names

    def class_sizes(self) -> Mapping[str, Mapping[str, ClassSize]] | None:
        """Return the images of each selected class and split, and those without a class."""
        sizes = self._source.class_sizes()
        return None if sizes is None else {split: self._select_sizes(classes) for split, classes in sizes.items()}

    def _select_sizes(self, classes: Mapping[str, ClassSize]) -> dict[str, ClassSize]:
        selected: dict[str, ClassSize] = {}
        for source_class, size in classes.items():
            label = source_class and self._selection.class_of(source_class)
            if label is not None:
                selected.setdefault(label, ClassSize()).add(size.images, size.bytes)
        return selected

    def splits(self) -> Mapping[str, int | None]:
        """Return the number of selected images of each split; None for TFDS.

        Raises:
            DataError: If a split has none.
        """
        sizes = self.class_sizes()
        if sizes is None:
            return dict.fromkeys(self._source.splits())
        for split, classes in sizes.items():
            if not classes:
                raise self._empty_split(split)
        return split_sizes(sizes)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the selected images of a split, with their classes of the model, and those without a class.

        Raises:
            DataError: At the end, if there are none.
        """
        left_out = self._left_out[split] = Counter()
        is_empty = True
        for image in self._source.images(split):
            label = image.label and self._selection.class_of(image.label)
            if image.label and label is None:
                left_out[image.label] += 1
            else:
                is_empty = False
                yield replace(image, label=label)
        if left_out and is_empty:
            raise self._empty_split(split)

    def summary(self) -> ClassSelectionSummary:
        """Return what was merged and left out. The images that were left out are those that `images` skipped so far."""
        names = [name for name in self._source.class_names() if self._selection.class_of(name) is None]
        counts = sum(self._left_out.values(), Counter())
        return ClassSelectionSummary(
            setting=self._selection.content,
            merged=self._selection.merged,
            left_out={name: counts[name] for name in names},
        )

    def _empty_split(self, split: str) -> DataError:
        return DataError(
            f"The split {split} of {self._origin} has no image of the classes that spec.dataset.classes selects: "
            f"{_join(self.class_names())}. Select at least one class that it has."
        )

    @property
    def _origin(self) -> str:
        return origin_of(self.description())


def _class_name(name: str) -> str:
    return sanitize_name(normalize_name(name))


def _check_distinct(listed: list[tuple[str, tuple[str, ...]]]) -> None:
    """Check names again in the form of class names; the spec has checked them as they are written."""
    for names in ([name for name, _ in listed], [source for _, sources in listed for source in sources]):
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"spec.dataset.classes has several names that are all {format_value(repeated[0])} without unprintable "
                "characters and text that looks like a secret. Rename or remove all but one of them."
            )


def _unknown_classes(unknown: list[str], source_classes: tuple[str, ...], origin: str) -> DataError:
    named = " ".join(
        f"{format_value(name)} is not a class of {origin}.{did_you_mean(name, source_classes)}"
        for name in unknown[:MAX_NAMES_SHOWN]
    )
    more = f" And {len(unknown) - MAX_NAMES_SHOWN} more." if len(unknown) > MAX_NAMES_SHOWN else ""
    return DataError(f"spec.dataset.classes: {named}{more} Classes of the source: {_join(source_classes)}.")


def _join(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(format_value, names[:MAX_NAMES_SHOWN])) + more
