"""`spec.dataset.classes`: which classes of the source become the classes of the model, and in which order."""

import unicodedata
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Field, StringConstraints, Tag

from topwork.spec.messages import format_value
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation

MAX_CLASSES = 10_000
EXCLUDE = "exclude"

# Without control characters: topwork shows them as question marks, and a name is written here as topwork shows it.
_Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=1000)]
ClassName = Annotated[_Name, ValueDescription('the name of a class, in quotes if it is like "1", "0.5" or "true"')]
MergedNames = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=MAX_CLASSES)]


def _class_tag(value: object) -> str:
    return "<merged>" if isinstance(value, dict) else "<name>"


ListedClass = Annotated[
    Annotated[_Name, Tag("<name>")]
    | Annotated[dict[ClassName, MergedNames], Field(min_length=1, max_length=1), Tag("<merged>")],
    Discriminator(_class_tag),
    ValueDescription('the name of a class, in quotes if it is like "1", "0.5" or "true"; or {name: [class, …]}'),
]


class ExcludedClasses(SpecModel):
    """All classes of the source except some."""

    exclude: MergedNames = Field(description="Classes of the source to leave out.")


def _classes_tag(value: object) -> str | None:
    if isinstance(value, list | tuple):
        return "<list>"
    return "<exclude>" if isinstance(value, dict | ExcludedClasses) else None


ClassesSetting = Annotated[
    Annotated[tuple[ListedClass, ...], Field(min_length=1, max_length=MAX_CLASSES), Tag("<list>")]
    | Annotated[ExcludedClasses, Tag("<exclude>")],
    Discriminator(_classes_tag),
    ValueDescription("a list of classes, each a name or {name: [class, …]}, or {exclude: [class, …]}"),
]


def normalize_class_name(name: str) -> str:
    """Return a class name in Unicode normalization form C, in which names are compared."""
    return unicodedata.normalize("NFC", name)


def list_classes(classes: tuple[ListedClass, ...]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield the index, name and source classes of each class of a list, in normalized form.

    Example:
        >>> list(list_classes(({"vehicle": ("car", "truck")}, "person")))
        [(0, 'vehicle', ('car', 'truck')), (1, 'person', ('person',))]
    """
    for index, listed in enumerate(classes):
        merges = listed if isinstance(listed, dict) else {listed: (listed,)}
        for name, sources in merges.items():
            yield index, normalize_class_name(name), tuple(map(normalize_class_name, sources))


def classes_content(classes: ClassesSetting) -> Any:
    """Return the setting as JSON values in a canonical form: equal for settings that select the same classes.

    Example:
        >>> classes_content(({"vehicle": ("truck", "car")}, {"person": ("person",)}))
        [{'vehicle': ['car', 'truck']}, 'person']
    """
    if isinstance(classes, ExcludedClasses):
        return {EXCLUDE: sorted(map(normalize_class_name, classes.exclude))}
    return [name if sources == (name,) else {name: sorted(sources)} for _, name, sources in list_classes(classes)]


def check_classes(classes: ClassesSetting) -> Iterator[Violation]:
    """Reject settings that are ambiguous, or leave too few classes, whatever the source contains.

    Args:
        classes: `spec.dataset.classes`.

    Yields:
        Violations with a path below `classes`.
    """
    if isinstance(classes, ExcludedClasses):
        seen: set[str] = set()
        for index, name in enumerate(map(normalize_class_name, classes.exclude)):
            if name in seen:
                yield Violation(f"exclude.{index}", f"{format_value(name)} is listed twice. Remove one of them.")
            seen.add(name)
        return
    yield from _check_unique(classes)
    for index, listed in enumerate(classes):
        if isinstance(listed, dict) and EXCLUDE in listed:
            yield Violation(
                str(index),
                "would merge classes to one that is named exclude. To leave out classes, set classes: {exclude: […]} "
                "without a list.",
            )
    if len(classes) == 1:
        yield Violation("", "has only one class, but a classifier needs at least two.")


def _check_unique(classes: tuple[ListedClass, ...]) -> Iterator[Violation]:
    """Each class of the source has one place, and each name one meaning."""
    owners: dict[str, str] = {}
    names: set[str] = set()
    for index, name, sources in list_classes(classes):
        repeated = None
        for source in sources:
            repeated = source if source in owners else repeated
            owners.setdefault(source, name)
        if repeated:
            yield Violation(
                str(index), f"contains {format_value(repeated)}, which is listed twice. Remove one of them."
            )
        elif name in names:
            yield Violation(str(index), f"is the second class that is named {format_value(name)}. Use another name.")
        names.add(name)
    for index, name, _ in list_classes(classes):
        if (owner := owners.get(name, name)) != name:
            yield Violation(
                str(index),
                f"is named {format_value(name)}, but the class {format_value(name)} of the source is part of "
                f"{format_value(owner)}. Use another name.",
            )
