"""Bootstrap of the metrics of classifiers: how much they vary if other images had been drawn.

Each resample draws as many images as there are, with replacement, from all images and not class by class: a class with
one image would otherwise seem to have no uncertainty. All classifiers are measured on the same resamples, so that the
difference of two of them does not vary with the difficulty of the images. The seed is fixed, so figures repeat.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from topwork.report.evaluation import EPSILON, NUM_BINS, bin_indices
from topwork.report.predictions import Predictions
from topwork.report.statistics.shares import Interval

RESAMPLES = 2000
SEED = 0
# The AUC needs a sort by each class. With more images times classes than this allows, it is resampled less often.
MAX_AUC_WORK = 2 * 10**9
# Fewer resamples do not give quantiles of 95 %.
MIN_RESAMPLES = 200

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredImages:
    """What a classifier predicted for a set of images.

    Attributes:
        labels: int64 (images,), true class of each image.
        predictions: The predictions; `kept` contains the probabilities of all images, or of none.
        classes: Number of classes.
    """

    labels: NDArray[np.int64]
    predictions: Predictions
    classes: int

    @property
    def has_probabilities(self) -> bool:
        """Whether the probabilities of all images are known, which the AUC needs."""
        return len(self.predictions.kept) == len(self.labels)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each image is classified correctly."""
        correct: NDArray[np.bool_] = self.predictions.predicted == self.labels
        return correct

    def is_right(self, metric: str) -> NDArray[np.bool_]:
        """Return which images count for a metric that is a share of images: accuracy or top5."""
        right: NDArray[np.bool_] = self.correct if metric == "accuracy" else self.predictions.rank < 5
        return right

    @cached_property
    def _negative_log(self) -> Values:
        return -np.log(np.maximum(self.predictions.own.astype(np.float64), EPSILON))

    @cached_property
    def _bins(self) -> NDArray[np.int64]:
        return bin_indices(self.predictions.confidence)

    @cached_property
    def _ranking(self) -> "_Ranking":
        return _Ranking(self)

    def measure(self, metric: str, counts: NDArray[np.int64]) -> float:
        """Compute a metric as `topwork.report.evaluation` does, with each image as often as it was drawn.

        Args:
            metric: Its name.
            counts: int64 (images,), how often each image was drawn.

        Returns:
            The value; NaN if it is undefined for these images.
        """
        match metric:
            case "loss":
                return float(counts @ self._negative_log / counts.sum())
            case "accuracy" | "top5":
                return float(counts @ self.is_right(metric) / counts.sum())
            case "calibrationError":
                gaps = np.bincount(self._bins, counts * (self.correct - self._confidence), NUM_BINS)
                return float(np.abs(gaps).sum() / counts.sum())
            case "auc":
                return self._ranking.auc(counts)
        return self._average(metric, counts)

    @cached_property
    def _confidence(self) -> Values:
        return self.predictions.confidence.astype(np.float64)

    def _average(self, metric: str, counts: NDArray[np.int64]) -> float:
        images = np.bincount(self.labels, counts, self.classes)
        occurs = images > 0
        images = images[occurs]
        predicted = np.bincount(self.predictions.predicted, counts, self.classes)[occurs]
        hits = np.bincount(self.labels, counts * self.correct, self.classes)[occurs]
        divisors = {"precision": np.maximum(predicted, 1), "recall": images, "f1": (images + predicted) / 2}
        return float(np.mean(hits / divisors[metric]))


class _Ranking:
    """The images sorted by the probability of each class that the AUC averages over."""

    def __init__(self, scored: ScoredImages) -> None:
        classes = [1] if scored.classes == 2 else range(scored.classes)
        occurring = [index for index in classes if np.any(scored.labels == index)]
        scores = np.ascontiguousarray(scored.predictions.kept.T[occurring])
        self._order = np.argsort(scores, axis=1, kind="stable")
        scores = np.take_along_axis(scores, self._order, axis=1)
        self._is_class = scored.labels[self._order] == np.array(occurring)[:, np.newaxis]
        # Images of equal score: first position, and position after the last one.
        self._start = np.stack([np.searchsorted(row, row, "left") for row in scores])
        self._end = np.stack([np.searchsorted(row, row, "right") for row in scores])

    def auc(self, counts: NDArray[np.int64]) -> float:
        drawn = counts[self._order]
        positives = drawn * self._is_class
        below = np.zeros((len(drawn), drawn.shape[1] + 1), np.int64)
        np.cumsum(drawn - positives, axis=1, out=below[:, 1:])
        halves = np.take_along_axis(below, self._start, axis=1) + np.take_along_axis(below, self._end, axis=1)
        right = (positives * halves).sum(axis=1) / 2
        total = positives.sum(axis=1)
        pairs = total * (counts.sum() - total)
        return float(np.mean(right[pairs > 0] / pairs[pairs > 0])) if pairs.any() else float("nan")


def draw_counts(images: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Draw resamples: how often each of the images occurs, int64 (images,) each."""
    random = np.random.default_rng(SEED)
    for _ in range(resamples):
        yield np.bincount(random.integers(images, size=images), minlength=images)


def resample(scored: Sequence[ScoredImages], metrics: Iterable[str]) -> dict[str, list[Values]]:
    """Measure classifiers on the same resamples of their images.

    Args:
        scored: The classifiers, on the same images.
        metrics: Names of the metrics.

    Returns:
        By metric, the values of each classifier, float64 (resamples,). Metrics that cannot be resampled are missing:
        see `resamples_of`.
    """
    wanted = {name: number for name in metrics if (number := resamples_of(name, scored))}
    values = {name: [np.full(number, np.nan) for _ in scored] for name, number in wanted.items()}
    for index, counts in enumerate(draw_counts(len(scored[0].labels), max(wanted.values(), default=0))):
        for name, number in wanted.items():
            if index < number:
                for classifier, row in zip(scored, values[name], strict=True):
                    row[index] = classifier.measure(name, counts)
    return {name: _without_undefined(rows) for name, rows in values.items()}


def resamples_of(metric: str, scored: Sequence[ScoredImages]) -> int:
    """Return how often a metric is resampled; 0 if it has too many probabilities for that."""
    if metric != "auc":
        return RESAMPLES
    if not all(classifier.has_probabilities for classifier in scored):
        return 0
    possible = MAX_AUC_WORK // (len(scored[0].labels) * scored[0].classes)
    return min(RESAMPLES, possible) if possible >= MIN_RESAMPLES else 0


def bootstrap_interval(value: float, resampled: Values, confidence: float) -> Interval | None:
    """Return the bootstrap interval of a metric or of a difference.

    The percentiles are shifted by the mean difference of the resampled values from the measured one: metrics that few
    images distort, such as the calibration error, are distorted once more in a resample.

    Args:
        value: The measured value.
        resampled: float64 (resamples,), the value on each resample.
        confidence: Confidence level in (0, 1).

    Returns:
        Lower and upper bound; None if the value is the same on every resample, such as the recall of a classifier
        without mistakes: resampling then says nothing about other images.
    """
    if not len(resampled) or np.ptp(resampled) <= 1e-12:
        return None
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2]) - resampled.mean() + value
    return float(low), float(high)


def bootstrap_p_value(gain: float, resampled: Values, images: int) -> float:
    """Return the one-sided p-value that a classifier that is not worse has so small a gain.

    Beyond all resamples, the p-value is that of a normal distribution: their finite number would limit it to a value
    that is never significant at a high confidence.

    Args:
        gain: The measured gain; negative if the classifier is worse.
        resampled: float64 (resamples,), the gain on each resample.
        images: Number of images. Even if each of them favors the other classifier, as in a sign test, the p-value is at
            least 0.5 to the power of it: resamples of very few images do not vary.

    Returns:
        The p-value in 0..1.
    """
    if gain >= 0 and np.ptp(resampled) <= 1e-12:
        return 1.0
    smaller = int(np.count_nonzero(resampled - resampled.mean() <= gain))
    p_value = (1 + smaller) / (1 + len(resampled))
    if smaller == 0:
        deviation = float(resampled.std())
        p_value = min(p_value, NormalDist().cdf(gain / deviation) if deviation > 1e-12 else 0.0)
    return max(p_value, 0.5**images)


def _without_undefined(rows: list[Values]) -> list[Values]:
    """Drop the resamples on which a classifier has no value, such as the AUC of images of one class."""
    defined = np.isfinite(np.stack(rows)).all(axis=0)
    return [row[defined] for row in rows]
