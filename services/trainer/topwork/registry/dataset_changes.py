"""What changed between two listings of a source: images added, removed, relabeled, changed or moved."""

from collections.abc import Iterable
from dataclasses import dataclass

from topwork.data.sources.source import SourceEntry

Pair = tuple[SourceEntry, SourceEntry]


@dataclass(frozen=True)
class DatasetChanges:
    """Differences between two listings, ordered by path.

    Attributes:
        added: Images that only the later listing has.
        removed: Images that only the earlier listing has.
        relabeled: Images with another class, before and after.
        changed: Images with the same class and other content, before and after.
        moved: Images in another split or group, before and after.
        new_classes: Classes that only the later listing has.
        removed_classes: Classes that only the earlier listing has.
    """

    added: tuple[SourceEntry, ...]
    removed: tuple[SourceEntry, ...]
    relabeled: tuple[Pair, ...]
    changed: tuple[Pair, ...]
    moved: tuple[Pair, ...]
    new_classes: tuple[str, ...]
    removed_classes: tuple[str, ...]

    def describe(self) -> str:
        """Return the counts, such as `3 images added, 1 removed, 1 new class`; empty without differences."""
        counts = {
            "added": len(self.added),
            "removed": len(self.removed),
            "relabeled": len(self.relabeled),
            "changed": len(self.changed),
            "moved to another split or group": len(self.moved),
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        if parts:
            count, _, what = parts[0].partition(" ")
            parts[0] = f"{count} {'image' if count == '1' else 'images'} {what}"
        for what, classes in (("new", self.new_classes), ("removed", self.removed_classes)):
            if classes:
                parts.append(f"{len(classes)} {what} {'class' if len(classes) == 1 else 'classes'}")
        return ", ".join(parts)


def compare_entries(before: Iterable[SourceEntry], after: Iterable[SourceEntry]) -> DatasetChanges:
    """Compare two listings of a source. Images are identified by their path.

    Args:
        before: The earlier listing.
        after: The later listing.

    Returns:
        The differences.
    """
    old, new = {entry.path: entry for entry in before}, {entry.path: entry for entry in after}
    pairs = [(old[path], new[path]) for path in sorted(old.keys() & new.keys())]
    old_classes, new_classes = ({entry.label for entry in entries.values() if entry.label} for entries in (old, new))
    return DatasetChanges(
        added=tuple(new[path] for path in sorted(new.keys() - old.keys())),
        removed=tuple(old[path] for path in sorted(old.keys() - new.keys())),
        relabeled=tuple(pair for pair in pairs if pair[0].label != pair[1].label),
        changed=tuple(
            (one, other)
            for one, other in pairs
            if one.label == other.label and (one.size, one.version) != (other.size, other.version)
        ),
        moved=tuple((one, other) for one, other in pairs if (one.split, one.group) != (other.split, other.group)),
        new_classes=tuple(sorted(new_classes - old_classes)),
        removed_classes=tuple(sorted(old_classes - new_classes)),
    )


def describe_changes(before: Iterable[SourceEntry] | None, after: Iterable[SourceEntry] | None) -> str:
    """Describe how the listing of a source has changed.

    Args:
        before: The earlier listing; None if it is unknown.
        after: The current listing; None if it is unknown.

    Returns:
        See `DatasetChanges.describe`.
    """
    if before is None or after is None:
        return "content changed"
    return compare_entries(before, after).describe()
