"""Per-image results of predicted probabilities, collected batch by batch: memory does not grow with the classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.errors import DataError
from topwork.model.probabilities import Batches, rows_per_block


@dataclass(frozen=True)
class Predictions:
    """What the metrics need to know about each image.

    Attributes:
        predicted: int64 (images,), most probable class.
        confidence: float32 (images,), probability of that class.
        own: float32 (images,), probability of the true class.
        rank: int64 (images,), position of the true class by descending probability, from 0. Of equal probabilities, the
            lower class comes first.
        kept: float32 (n, classes), probabilities of the images requested with `keep`.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    own: NDArray[np.float32]
    rank: NDArray[np.int64]
    kept: NDArray[np.float32]


def array_batches(probabilities: NDArray[np.float32]) -> Batches:
    """Iterate over probabilities in memory, float32 (images, classes)."""
    rows = rows_per_block(probabilities.shape[1])
    return lambda: (probabilities[start : start + rows] for start in range(0, len(probabilities), rows))


def collect_predictions(
    batches: Batches, labels: NDArray[np.int64], split: str = "test", keep: NDArray[np.int64] | None = None
) -> Predictions:
    """Iterate over all batches once.

    Args:
        batches: Probabilities of all images.
        labels: int64 (images,), true class of each image.
        split: Name of the split, for error messages.
        keep: int64 (n,), indices of images whose probabilities are kept, in ascending order.

    Returns:
        The results of all images.

    Raises:
        DataError: If there are no images, or a probability is not finite.
    """
    if not len(labels):
        raise DataError(
            f"The {split} split has no images, so the model cannot be evaluated. "
            f"Enlarge spec.dataset.splits.{split}, or add images."
        )
    indices = np.zeros(0, np.int64) if keep is None else keep
    parts, invalid, first = list[Predictions](), 0, 0
    for batch in batches():
        end = first + len(batch)
        invalid += int(np.sum(~np.isfinite(batch).all(axis=1)))
        inside = indices[(indices >= first) & (indices < end)]
        parts.append(_describe(batch, labels[first:end], inside - first))
        first = end
    if invalid:
        raise DataError(
            f"The trained model predicts NaN or infinite probabilities for {invalid} of {len(labels)} images: "
            "training diverged. Lower the learning rates (spec.transfer.optimizer, spec.fineTune.optimizer) by a "
            "factor of ten."
        )
    return Predictions(*(np.concatenate(columns) for columns in zip(*map(_columns, parts), strict=True)))


def _describe(batch: NDArray[np.float32], labels: NDArray[np.int64], keep: NDArray[np.int64]) -> Predictions:
    own = batch[np.arange(len(batch)), labels]
    predicted = batch.argmax(axis=1)
    # The rank of a correct prediction is 0: only the other images have to be counted.
    rank, wrong = np.zeros(len(batch), np.int64), np.flatnonzero(predicted != labels)
    probabilities, threshold = batch[wrong], own[wrong, np.newaxis]
    before = np.arange(batch.shape[1]) < labels[wrong, np.newaxis]
    rank[wrong] = ((probabilities > threshold) | ((probabilities == threshold) & before)).sum(axis=1)
    return Predictions(predicted, batch[np.arange(len(batch)), predicted], own, rank, batch[keep])


def _columns(part: Predictions) -> tuple[NDArray[np.generic], ...]:
    return part.predicted, part.confidence, part.own, part.rank, part.kept
