"""The test set of an earlier version (`pinTest`): its images in the dataset, and those that must not be trained on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topwork.data.splits.groups import Groups
from topwork.data.splits.inputs import EvaluatedImage, PinnedTest
from topwork.errors import DataError
from topwork.spec.messages import count_noun

Positions = npt.NDArray[np.int64]

MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class PinnedSelection:
    """The images of a pinned test set.

    Attributes:
        test: Positions of the test images, int64 (size,), in stored order.
        others: Positions of the images that other splits may contain, int64 (size,), in stored order.
        notes: What the test set is, and which images are not used, in sentences for the log and the report.
    """

    test: Positions
    others: Positions
    notes: tuple[str, ...]


def select_pinned_test(
    pinned: PinnedTest,
    digests: npt.NDArray[np.uint64],
    classes: Sequence[str],
    names: Sequence[str],
    groups: Groups | None,
) -> PinnedSelection:
    """Find the images of a pinned test set by their pixels, so that renamed files are the same images.

    Images with the same pixels as a test image, or of the group of one, are in no split.

    Args:
        pinned: The test set.
        digests: First 8 bytes of the pixel digest of each stored image, uint64 (images,).
        classes: Class name of each stored image.
        names: Name of each stored image.
        groups: Group of each stored image, if the spec sets `groupBy`.

    Returns:
        The test set, and the images that may be divided among the other splits.

    Raises:
        DataError: If an image of the test set is missing or has another class.
    """
    wanted = np.array([int(image.digest, 16) for image in pinned.images], np.uint64)
    has_pinned_pixels = np.isin(digests, wanted)
    available: dict[str, list[int]] = defaultdict(list)
    for position in np.flatnonzero(has_pinned_pixels).tolist():
        available[f"{digests[position]:016x}"].append(position)
    test, left = _match(pinned.images, available, classes, names)
    if left:
        raise DataError(_explain_changes(pinned, left, available, classes))
    is_test = np.zeros(len(digests), bool)
    is_test[test] = True
    in_test_group = np.zeros_like(is_test)
    if groups is not None:
        in_test_group = np.isin(groups.of_image, groups.of_image[is_test]) & ~has_pinned_pixels
    notes = [pinned.describe()]
    if copies := int((has_pinned_pixels & ~is_test).sum()):
        notes.append(f"Not used: {count_noun(copies, 'image')} with the same pixels as an image of the test set.")
    if grouped := int(in_test_group.sum()):
        notes.append(f"Not used: {count_noun(grouped, 'image')} in a group of the test set.")
    return PinnedSelection(np.flatnonzero(is_test), np.flatnonzero(~has_pinned_pixels & ~in_test_group), tuple(notes))


def _match(
    images: Sequence[EvaluatedImage], available: Mapping[str, list[int]], classes: Sequence[str], names: Sequence[str]
) -> tuple[list[int], list[EvaluatedImage]]:
    """Find a stored image of the same class for each image, of several with the same pixels that of the same name.

    Args:
        images: Images of the test set.
        available: Positions of stored images by their digest; those that are found are removed.
        classes: Class name of each stored image.
        names: Name of each stored image.

    Returns:
        The positions found, and the images without one.
    """
    found, left = [], list(images)
    for with_name in (True, False):
        unmatched = []
        for image in left:
            candidates = available.get(image.digest, [])
            for position in candidates:
                if classes[position] == image.class_name and (not with_name or names[position] == image.name):
                    candidates.remove(position)
                    found.append(position)
                    break
            else:
                unmatched.append(image)
        left = unmatched
    return found, left


def _explain_changes(
    pinned: PinnedTest, left: Sequence[EvaluatedImage], available: Mapping[str, list[int]], classes: Sequence[str]
) -> str:
    missing, relabeled = [], []
    for image in left:
        shown = f"{image.name} ({image.class_name}"
        if candidates := available.get(image.digest):
            relabeled.append(f"{shown}, now {classes[candidates.pop()]})")
        else:
            missing.append(f"{shown})")
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(pinned.images)} images are missing: {_format(missing)}")
    if relabeled:
        parts.append(f"{len(relabeled)} of {len(pinned.images)} images have another class: {_format(relabeled)}")
    return (
        f"spec.dataset.splits.pinTest is {pinned.version}, but the dataset no longer has the test set of that version. "
        f"{'; '.join(parts)}. Metrics of different images cannot be compared. Restore the images and their classes in "
        "the source and in spec.dataset.classes, or replace pinTest by a new test split, such as test: 0.1. The pull "
        "drops images with the pixels of another class, too: see onContradiction."
    )


def _format(items: Sequence[str]) -> str:
    more = f", and {len(items) - MAX_NAMES_SHOWN} more" if len(items) > MAX_NAMES_SHOWN else ""
    return ", ".join(items[:MAX_NAMES_SHOWN]) + more
