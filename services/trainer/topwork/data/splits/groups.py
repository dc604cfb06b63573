"""Groups of images that belong together, such as those of a patient, and splits that never divide a group."""

import csv
import gzip
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from topwork.data.sources.source import sanitize_name
from topwork.errors import DataError
from topwork.spec.messages import count_noun
from topwork.spec.splits import GroupBy, GroupColumn, GroupRegex

Int64Array = npt.NDArray[np.int64]

MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Groups:
    """The group of each image.

    Attributes:
        names: Names of the groups.
        of_image: int64 (images,), index into `names`.
    """

    names: Sequence[str]
    of_image: Int64Array

    @classmethod
    def of(cls, groups: Sequence[str]) -> "Groups":
        """Number the groups of images by their names."""
        names, of_image = np.unique(np.array(groups, dtype=object), return_inverse=True)
        return cls(names.tolist(), of_image.astype(np.int64))

    def subset(self, positions: Int64Array) -> "Groups":
        """Return the groups of some of the images, without those that have none of them.

        Args:
            positions: Positions of the images, int64 (n,).
        """
        used, of_image = np.unique(self.of_image[positions], return_inverse=True)
        return Groups([self.names[group] for group in used], of_image.astype(np.int64))


def find_groups(group_by: GroupBy, names: Sequence[str], class_names: Iterable[str], listing: Path) -> Groups:
    """Find the groups of images.

    Args:
        group_by: `spec.dataset.splits.groupBy`.
        names: Names of the images.
        class_names: Class names in the source, where several may be one class of the dataset.
        listing: Listing of the source (`topwork.data.dataset_manifest.ENTRIES_FILE`), with the groups of a table.

    Returns:
        The group of each image.

    Raises:
        DataError: If an image has no group, or the directories of the images are those of the classes.
    """
    if isinstance(group_by, GroupRegex):
        groups = _match_regex(re.compile(group_by.regex), names)
    elif isinstance(group_by, GroupColumn):
        groups = _read_column(group_by.column, names, listing)
    else:
        groups = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
        if set(groups) <= {"", *class_names}:
            raise DataError(
                "spec.dataset.splits.groupBy is folder, but the images are directly in the directories of their "
                "classes. Move the images of each group to a directory of their own, or use groupBy: {regex: …}."
            )
    return Groups.of(groups)


def _match_regex(pattern: "re.Pattern[str]", names: Sequence[str]) -> list[str]:
    capture = 1 if pattern.groups else 0
    groups = [match[capture] or "" if (match := pattern.search(name)) else "" for name in names]
    if missing := [name for name, group in zip(names, groups, strict=True) if not group]:
        raise DataError(
            f"spec.dataset.splits.groupBy.regex {pattern.pattern} finds no group in {len(missing)} of {len(names)} "
            f"image names, such as {', '.join(missing[:MAX_NAMES_SHOWN])}."
        )
    return groups


def _read_column(column: str, names: Sequence[str], listing: Path) -> list[str]:
    with gzip.open(listing, "rt", encoding="utf-8", newline="") as file:
        groups = {sanitize_name(row[0]): row[5] for row in csv.reader(file) if len(row) > 5}
    if missing := [name for name in names if not groups.get(name)]:
        raise DataError(
            f"The column {column} of spec.dataset.splits.groupBy is empty for {len(missing)} images, such as "
            f"{', '.join(missing[:MAX_NAMES_SHOWN])}. Fill it: an image without a group could be in several splits."
        )
    return [groups[name] for name in names]


def assign_groups(strata: Int64Array, groups: Int64Array, fractions: Sequence[float], seed: int) -> Int64Array:
    """Assign whole groups to splits, so that the classes are divided by the fractions as far as possible.

    Groups are assigned from the largest to the smallest, each to the split that then lacks least of its classes: the
    sum of squared differences from the fractions, relative to the size of the class, grows least.

    Args:
        strata: Class of each image, int64 (images,).
        groups: Group of each image, int64 (images,), 0 to groups - 1.
        fractions: Fraction of the images in each split; their sum is at most 1.
        seed: Order of groups of the same size.

    Returns:
        Split of each image, int64 (images,); the number of splits for images that are not used.
    """
    shares = np.array([*fractions, max(0.0, 1.0 - sum(fractions))])
    class_sizes = np.bincount(strata)
    targets = np.outer(shares, class_sizes)
    assigned = np.zeros_like(targets)
    splits = len(shares) if shares[-1] > 1e-9 else len(fractions)
    pairs, counts = np.unique(np.stack([groups, strata]), axis=1, return_counts=True)
    ends = np.searchsorted(pairs[0], np.arange(groups.max() + 1), side="right")
    group_sizes = np.bincount(groups)
    ties = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).permutation(len(group_sizes))
    split_of_group = np.zeros(len(group_sizes), np.int64)
    for group in ties[np.argsort(-group_sizes[ties], kind="stable")]:
        rows = slice(ends[group - 1] if group else 0, ends[group])
        labels, sizes = pairs[1, rows], counts[rows]
        lacking = assigned[:splits, labels] - targets[:splits, labels]
        growth = (sizes * (2 * lacking + sizes) / class_sizes[labels]).sum(axis=1)
        split_of_group[group] = split = int(np.argmin(growth))
        assigned[split, labels] += sizes
    result: Int64Array = split_of_group[groups]
    return result


def check_group_splits(selected: Mapping[str, Int64Array], groups: Groups) -> None:
    """Check that each split has a group.

    Raises:
        DataError: If a split has none.
    """
    if empty := [name for name, positions in selected.items() if not len(positions)]:
        raise DataError(
            f"The {empty[0]} split has no images: spec.dataset.splits.groupBy finds only {len(groups.names)} groups. "
            "Use groups that are smaller, other fractions, or fewer folds."
        )


def check_whole_groups(selected: Mapping[str, Int64Array], groups: Groups, where: str, fix: str) -> None:
    """Check that splits that were not selected by groups do not divide a group.

    Args:
        selected: Positions of the images of each split.
        groups: Group of each stored image.
        where: What contains the images of a divided group, for the message.
        fix: How to fix a divided group, for the message.

    Raises:
        DataError: If a group has images in several splits.
    """
    counts = np.stack(
        [np.bincount(groups.of_image[positions], minlength=len(groups.names)) for positions in selected.values()]
    )
    divided = np.flatnonzero((counts > 0).sum(axis=0) > 1)
    if not len(divided):
        return
    shown = []
    for group in divided[:MAX_NAMES_SHOWN]:
        images = [f"{count} {name}" for name, count in zip(selected, counts[:, group].tolist(), strict=True) if count]
        shown.append(f"{groups.names[group]} ({', '.join(images)})")
    more = f", and {len(divided) - len(shown)} more" if len(divided) > len(shown) else ""
    raise DataError(
        f"spec.dataset.splits.groupBy: images of the same group are in {where}, for {len(divided)} of "
        f"{count_noun(len(groups.names), 'group')}: {', '.join(shown)}{more}. The published metrics would be too high. "
        f"{fix}"
    )
