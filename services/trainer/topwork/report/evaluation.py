"""Computes the metrics of a classifier from its predicted probabilities on a split."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from topwork.model.probabilities import mean_auc
from topwork.report.predictions import Predictions, array_batches, collect_predictions

# Bins of the reliability diagram and of the expected calibration error, as in Guo et al. 2017, "On Calibration of
# Modern Neural Networks".
NUM_BINS = 15
# Probabilities are clipped to this value before taking the logarithm, as in Keras.
EPSILON = 1e-7
# With five classes or fewer, the class of every image is among the five most probable classes.
MIN_CLASSES_FOR_TOP5 = 6
# A dense confusion matrix grows with the square of the classes; 100 classes are 10,000 numbers.
MAX_DENSE_CLASSES = 100
# Most frequent confusions that are kept; with many classes most confusions occur once.
MAX_CONFUSIONS = 1000
# Class names in a sentence.
MAX_NAMED_CLASSES = 20


class MetricsSection(BaseModel):
    """Base class of the sections of `metrics.json`: frozen, with camelCase keys."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class ClassScores(MetricsSection):
    """Metrics of one class.

    Attributes:
        name: Name of the class.
        images: Number of images of the class.
        predicted: Number of images for which the class was predicted.
        precision: Share of these that are of the class, 0 if it was never predicted; None if the class has no images.
        recall: Share of its images that were recognized; None if the class has no images.
        f1: Harmonic mean of precision and recall; None if the class has no images.
    """

    name: str
    images: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


class Confusion(MetricsSection):
    """Images of one class that were classified as another one.

    Attributes:
        true_class: Their class.
        predicted_class: The predicted class.
        images: Number of images.
        share: Their share of the images of the true class.
    """

    true_class: str
    predicted_class: str
    images: int
    share: float


class CalibrationBin(MetricsSection):
    """Images whose confidence is in the interval (low, high].

    Attributes:
        low: Lower bound of the confidence.
        high: Upper bound of the confidence.
        images: Number of images.
        confidence: Mean confidence of the images.
        accuracy: Share of correctly classified images.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


class Evaluation(MetricsSection):
    """Metrics of a classifier on one split. Ratios are in 0..1.

    Precision, recall, F1 and AUC are averages over the classes that have images in the split. A class without images
    has no recall; images of other classes that were classified as it lower the recall of their own class.

    Attributes:
        split: Name of the split: test or validation.
        images: Number of images.
        class_names: Name of each class, in the order of the confusion matrix.
        loss: Mean cross-entropy in nats.
        top5: Share of images whose class is among the five most probable classes. None with fewer than six classes, for
            which it would always be 1.
        auc: Area under the ROC curve: of class 1 for two classes, otherwise the one-vs-rest mean over the classes that
            occur. None if fewer than two classes occur, or if it was not requested and the split is too large.
        calibration_error: Expected calibration error of the most probable class, in 15 bins of equal width.
        excluded_classes: Number of classes without images, which the averages exclude.
        excluded_class_names: Names of the first of them.
        per_class: Metrics of each class.
        confusion: Number of images by true class (rows) and predicted class (columns); None for more than 100 classes.
        confusions: The most frequent confusions, most frequent first; at most 1,000.
        confused_pairs: Number of pairs of a true and a different predicted class that occur.
        reliability: The non-empty confidence bins.
    """

    split: str
    images: int
    class_names: tuple[str, ...]
    loss: float
    accuracy: float
    top5: float | None
    precision: float
    recall: float
    f1: float
    auc: float | None
    calibration_error: float
    excluded_classes: int
    excluded_class_names: tuple[str, ...]
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confusions: tuple[Confusion, ...]
    confused_pairs: int
    reliability: tuple[CalibrationBin, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """The scalar metrics, by their names in the job spec; undefined ones are omitted."""
        names = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "top5": self.top5,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "auc": self.auc,
            "calibrationError": self.calibration_error,
        }
        return {name: value for name, value in names.items() if value is not None}

    @property
    def undefined(self) -> dict[str, str]:
        """The metrics without a value, and why: a clause such as "fewer than two classes occur"."""
        reasons = {}
        if self.top5 is None:
            reasons["top5"] = (
                f"the model has only {len(self.class_names)} classes: among five guesses is always the right one"
            )
        if self.auc is None:
            reasons["auc"] = "fewer than two classes occur"
        return reasons

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the metrics must know."""
        if not self.excluded_classes:
            return ()
        more = self.excluded_classes - len(self.excluded_class_names)
        names = ", ".join(self.excluded_class_names) + (f" and {more} more" if more else "")
        has, are = ("has", "is") if self.excluded_classes == 1 else ("have", "are")
        return (
            f"{self.excluded_classes} of {len(self.class_names)} classes {has} no images in the {self.split} split and "
            f"{are} excluded from precision, recall, F1 and AUC: {names}.",
        )


def evaluate_predictions(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: tuple[str, ...], split: str = "test"
) -> Evaluation:
    """Compute all metrics from predicted probabilities in memory.

    Args:
        probabilities: float32 (images, classes); each row sums to 1.
        labels: int64 (images,), true class of each image.
        class_names: Name of each class, in the order of the columns.
        split: Name of the split.

    Returns:
        All metrics.

    Raises:
        DataError: If there are no images, or a probability is not finite.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
        >>> evaluate_predictions(probabilities, np.array([0, 1]), ("cat", "dog")).accuracy
        1.0
    """
    batches = array_batches(probabilities)
    predictions = collect_predictions(batches, labels, split)
    auc = mean_auc(batches, labels, predictions.own, len(class_names))
    return evaluate(predictions, labels, class_names, split, auc)


def evaluate(
    predictions: Predictions, labels: NDArray[np.int64], class_names: tuple[str, ...], split: str, auc: float | None
) -> Evaluation:
    """Compute all metrics from the results of each image.

    Args:
        predictions: Results of all images.
        labels: int64 (images,), true class of each image.
        class_names: Name of each class, in the order of the labels.
        split: Name of the split.
        auc: Result of `mean_auc`, which needs all probabilities.

    Returns:
        All metrics.
    """
    correct = predictions.predicted == labels
    bins = calibration_bins(predictions.confidence, correct)
    scores = _score_classes(predictions.predicted, labels, class_names)
    occurring = [score for score in scores if score.images]
    excluded = [score.name for score in scores if not score.images]
    pairs, counts = _count_pairs(predictions.predicted, labels, len(class_names))
    return Evaluation(
        split=split,
        images=len(labels),
        class_names=class_names,
        loss=float(-np.log(np.maximum(predictions.own.astype(np.float64), EPSILON)).mean()),
        accuracy=float(correct.mean()),
        top5=float((predictions.rank < 5).mean()) if len(class_names) >= MIN_CLASSES_FOR_TOP5 else None,
        precision=float(np.mean([score.precision for score in occurring])),
        recall=float(np.mean([score.recall for score in occurring])),
        f1=float(np.mean([score.f1 for score in occurring])),
        auc=auc,
        calibration_error=sum(b.images / len(labels) * abs(b.accuracy - b.confidence) for b in bins),
        excluded_classes=len(excluded),
        excluded_class_names=tuple(excluded[:MAX_NAMED_CLASSES]),
        per_class=scores,
        confusion=_dense_matrix(pairs, counts, len(class_names)) if len(class_names) <= MAX_DENSE_CLASSES else None,
        confusions=_most_frequent(pairs, counts, class_names),
        confused_pairs=int(np.sum(pairs[:, 0] != pairs[:, 1])),
        reliability=bins,
    )


def calibration_bins(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> tuple[CalibrationBin, ...]:
    """Group images by the confidence of their most probable class into bins of equal width.

    Args:
        confidence: float32 (images,), probability of the predicted class.
        correct: bool (images,), whether the prediction is right.

    Returns:
        The non-empty bins, in ascending order of confidence.
    """
    bin_of_image = bin_indices(confidence)
    confidence, edges = confidence.astype(np.float64), _bin_edges()
    return tuple(
        CalibrationBin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            images=int(np.sum(bin_of_image == index)),
            confidence=float(confidence[bin_of_image == index].mean()),
            accuracy=float(correct[bin_of_image == index].mean()),
        )
        for index in np.unique(bin_of_image)
    )


def bin_indices(confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of each confidence, int64 (images,) in 0..NUM_BINS - 1."""
    return np.clip(np.digitize(confidence.astype(np.float64), _bin_edges(), right=True) - 1, 0, NUM_BINS - 1)


def _bin_edges() -> NDArray[np.float64]:
    return np.linspace(0.0, 1.0, NUM_BINS + 1)


def _score_classes(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], class_names: tuple[str, ...]
) -> tuple[ClassScores, ...]:
    classes = len(class_names)
    right = np.bincount(labels[predicted == labels], minlength=classes).tolist()
    images = np.bincount(labels, minlength=classes).tolist()
    predictions = np.bincount(predicted, minlength=classes).tolist()
    return tuple(
        ClassScores(
            name=name,
            images=n,
            predicted=p,
            precision=hits / max(p, 1) if n else None,
            recall=hits / n if n else None,
            f1=2 * hits / (n + p) if n else None,
        )
        for name, hits, n, p in zip(class_names, right, images, predictions, strict=True)
    )


def _count_pairs(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the images of each pair of true and predicted class that occurs: pairs (n, 2) and counts (n,)."""
    codes, counts = np.unique(labels * classes + predicted, return_counts=True)
    return np.stack(np.divmod(codes, classes), axis=1), counts


def _dense_matrix(pairs: NDArray[np.int64], counts: NDArray[np.int64], classes: int) -> tuple[tuple[int, ...], ...]:
    matrix = np.zeros((classes, classes), np.int64)
    matrix[pairs[:, 0], pairs[:, 1]] = counts
    return tuple(tuple(row) for row in matrix.tolist())


def _most_frequent(
    pairs: NDArray[np.int64], counts: NDArray[np.int64], class_names: tuple[str, ...]
) -> tuple[Confusion, ...]:
    class_images = np.bincount(pairs[:, 0], weights=counts, minlength=len(class_names))
    wrong = pairs[:, 0] != pairs[:, 1]
    pairs, counts = pairs[wrong], counts[wrong]
    shares = counts / class_images[pairs[:, 0]]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -shares, -counts))[:MAX_CONFUSIONS]
    return tuple(
        Confusion(
            true_class=class_names[pairs[index, 0]],
            predicted_class=class_names[pairs[index, 1]],
            images=int(counts[index]),
            share=float(shares[index]),
        )
        for index in order
    )
