"""Stratified splits: how many images of each class each split gets."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def allocate(class_sizes: Sequence[int] | Counts, fractions: Sequence[float]) -> Counts:
    """Divide the images of each class among splits.

    The size of a split differs from the exact fraction by at most one image, and that of a class within a split by less
    than two, as long as every class has at least two images for each split by its fraction. Smaller classes get one
    image in each split first, in the order of the splits, and then divide the rest.

    Args:
        class_sizes: Number of images of each class.
        fractions: Fraction of the images in each split. Above 0; their sum is at most 1, and if it is below 1, the
            remaining images are not used.

    Returns:
        int64 (classes, splits).

    Example:
        >>> allocate([20, 7], [0.8, 0.1, 0.1])
        array([[16,  2,  2],
               [ 5,  1,  1]])
    """
    remaining = np.array(class_sizes, np.int64)
    ends = np.floor(np.round(np.cumsum([0, *fractions]) * remaining.sum(), 6) + 0.5)
    counts = np.zeros((len(remaining), len(fractions)), np.int64)
    for index, size in enumerate(np.diff(ends)):
        # The rounded running totals of all classes end at the size of the split.
        totals = np.cumsum(remaining) * size / max(1, remaining.sum())
        shares = np.diff(np.floor(np.round(totals, 6) + 0.5).astype(np.int64), prepend=0)
        lowest = np.minimum(remaining, 1)
        later_splits = len(fractions) - index - 1
        counts[:, index] = np.clip(shares, lowest, np.maximum(remaining - later_splits, lowest))
        remaining = remaining - counts[:, index]
    if sum(fractions) > 1 - 1e-9:
        # Images that a split could not take, because another split must get one of their class.
        counts[:, int(np.argmax(fractions))] += remaining
    return counts
