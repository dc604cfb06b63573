"""Probabilities of a classifier, and the area under the ROC curve that validation and evaluation both report."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Returns an iterator over all images in order, each time it is called: float32 (batch, classes), rows sum to 1.
Batches = Callable[[], Iterable[NDArray[np.float32]]]
# Size of the blocks of probabilities that are processed at once, in bytes.
BLOCK_BYTES = 64 * 2**20
# Up to this many thresholds, comparing each with all scores is faster than a binary search for each score.
MAX_COMPARED = 16


def to_probabilities(logits: Any) -> NDArray[np.float32]:
    """Convert logits to probabilities, with the same functions as `add_probabilities`.

    Args:
        logits: float32 (images, 1) for two classes, otherwise (images, classes).

    Returns:
        float32 (images, classes); each row sums to 1.
    """
    import keras  # commands without TensorFlow import the metrics of published versions

    if logits.shape[-1] == 1:
        second = keras.ops.convert_to_numpy(keras.activations.sigmoid(logits))
        return np.concatenate([1 - second, second], axis=-1)
    probabilities: NDArray[np.float32] = keras.ops.convert_to_numpy(keras.activations.softmax(logits))
    return probabilities


def rows_per_block(classes: int) -> int:
    """Return the number of images whose probabilities fit into a block."""
    return max(1, BLOCK_BYTES // (4 * classes))


def group_batches(batches: Iterable[NDArray[np.float32]], rows: int) -> Iterator[NDArray[np.float32]]:
    """Join small batches to blocks of at least `rows` images; only the last block may be smaller."""
    waiting: list[NDArray[np.float32]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= rows:
            yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def roc_auc(blocks: list[NDArray[np.float32]], labels: NDArray[np.int64]) -> float | None:
    """Compute the area under the ROC curve as in `mean_auc`, from probabilities in memory.

    Args:
        blocks: Probabilities of all images, float32 (n, classes) each.
        labels: int64 (images,), true class of each image.

    Example:
        >>> roc_auc([np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)], np.array([0, 1]))
        1.0
    """
    ends = np.cumsum([len(block) for block in blocks])
    own = [
        block[np.arange(len(block)), labels[end - len(block) : end]] for block, end in zip(blocks, ends, strict=True)
    ]
    return mean_auc(lambda: blocks, labels, np.concatenate(own), blocks[0].shape[1])


def mean_auc(batches: Batches, labels: NDArray[np.int64], own: NDArray[np.float32], classes: int) -> float | None:
    """Compute the area under the ROC curve: of class 1 for two classes, otherwise the one-vs-rest mean.

    The area is the share of pairs of an image of the class and an image of another class that are ranked correctly;
    ties count one half. `own` contains the scores of all images of their class, so one more iteration over the
    probabilities counts the pairs.

    Args:
        batches: Probabilities of all images.
        labels: int64 (images,), true class of each image.
        own: float32 (images,), probability of the true class of each image.
        classes: Number of classes.

    Returns:
        The mean over the classes that occur; None if fewer than two classes occur.
    """
    counts = np.bincount(labels, minlength=classes)
    averaged = np.flatnonzero((counts > 0) & (counts < len(labels)))
    if not len(averaged):
        return None
    if classes == 2:
        averaged = np.array([1])
    thresholds = _thresholds(labels, own, counts, averaged)
    lowest = np.array([values[0] for values in thresholds])
    pairs = np.zeros(len(averaged), np.int64)
    for block in group_batches(batches(), rows_per_block(classes)):
        scores = np.ascontiguousarray(block.T[averaged])
        # Most classes are improbable for all images of a block.
        for index in np.flatnonzero(scores.max(axis=1) > lowest):
            above = scores[index][scores[index] > lowest[index]]
            pairs[index] += _sum_of_ranks(thresholds[index], above)
    positives = counts[averaged]
    # Each pair of two images of the class, and each image with itself, was counted as two.
    wrong_halves = pairs - positives**2
    return float(np.mean(1 - wrong_halves / (2 * positives * (len(labels) - positives))))


def _sum_of_ranks(thresholds: NDArray[np.float32], scores: NDArray[np.float32]) -> int:
    """Add up, over all scores, the number of thresholds below the score."""
    if len(thresholds) <= MAX_COMPARED:
        return int(np.count_nonzero(thresholds[:, np.newaxis] < scores))
    return int(np.searchsorted(thresholds, scores).sum())


def _thresholds(
    labels: NDArray[np.int64], own: NDArray[np.float32], counts: NDArray[np.int64], averaged: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """Return, for each class, the sorted scores of its images, and the next smaller float32 of each.

    The position of a score in this list is the number of images of the class below it plus the number of those below
    or equal: twice the number of wrong pairs, in which ties count one half.
    """
    ends = np.cumsum(counts)
    grouped = own[np.argsort(labels, kind="stable")]
    positives = (grouped[ends[label] - counts[label] : ends[label]] for label in averaged)
    return [np.sort(np.concatenate([scores, np.nextafter(scores, np.float32(-1))])) for scores in positives]
