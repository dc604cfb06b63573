"""Computes the metrics of a classifier from its predicted probabilities on a split."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from topwork.errors import DataError

# Bins of the reliability diagram and of the expected calibration error, as in Guo et al. 2017, "On Calibration of
# Modern Neural Networks".
NUM_BINS = 15
# Probabilities are clipped to this value before taking the logarithm, as in Keras.
EPSILON = 1e-7


class MetricsSection(BaseModel):
    """Base class of the sections of `metrics.json`: frozen, with camelCase keys."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class ClassScores(MetricsSection):
    """Metrics of one class."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


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
    """Metrics of a classifier on one split. Ratios are in 0..1; precision, recall and F1 are macro averages.

    Attributes:
        split: Name of the split: test or validation.
        images: Number of images.
        class_names: Name of each class, in the order of the confusion matrix.
        loss: Mean cross-entropy in nats.
        top5: Share of images whose class is among the five most probable classes.
        auc: Area under the ROC curve: of class 1 for two classes, otherwise the one-vs-rest mean over the classes that
            occur. None if fewer than two classes occur.
        calibration_error: Expected calibration error of the most probable class, in 15 bins of equal width.
        per_class: Metrics of each class.
        confusion: Number of images by true class (rows) and predicted class (columns).
        reliability: The non-empty confidence bins.
    """

    split: str
    images: int
    class_names: tuple[str, ...]
    loss: float
    accuracy: float
    top5: float
    precision: float
    recall: float
    f1: float
    auc: float | None
    calibration_error: float
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
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


def evaluate_predictions(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: tuple[str, ...], split: str = "test"
) -> Evaluation:
    """Compute all metrics from predicted probabilities.

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
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    _check_probabilities(probabilities, split)
    classes = np.arange(len(class_names))
    predicted = probabilities.argmax(axis=1)
    scores = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    precision, recall, f1, images = (column.tolist() for column in scores)
    bins = calibration_bins(probabilities, labels)
    return Evaluation(
        split=split,
        images=len(labels),
        class_names=class_names,
        loss=_cross_entropy(probabilities, labels),
        accuracy=float(np.mean(predicted == labels)),
        top5=_top_k(probabilities, labels, min(5, len(class_names))),
        precision=float(np.mean(precision)),
        recall=float(np.mean(recall)),
        f1=float(np.mean(f1)),
        auc=_auc(probabilities, labels),
        calibration_error=sum(b.images / len(labels) * abs(b.accuracy - b.confidence) for b in bins),
        per_class=tuple(
            ClassScores(name=name, images=n, precision=p, recall=r, f1=f)
            for name, n, p, r, f in zip(class_names, images, precision, recall, f1, strict=True)
        ),
        confusion=tuple(tuple(row) for row in confusion_matrix(labels, predicted, labels=classes).tolist()),
        reliability=bins,
    )


def calibration_bins(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[CalibrationBin, ...]:
    """Group images by the confidence of their most probable class into bins of equal width.

    Args:
        probabilities: float32 (images, classes).
        labels: int64 (images,).

    Returns:
        The non-empty bins, in ascending order of confidence.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    bin_of_image = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, NUM_BINS - 1)
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


def _check_probabilities(probabilities: NDArray[np.float32], split: str) -> None:
    if not len(probabilities):
        raise DataError(
            f"The {split} split has no images, so the model cannot be evaluated. "
            f"Enlarge spec.dataset.splits.{split}, or add images."
        )
    invalid = int(np.sum(~np.isfinite(probabilities).all(axis=1)))
    if invalid:
        raise DataError(
            f"The trained model predicts NaN or infinite probabilities for {invalid} of {len(probabilities)} images: "
            "training diverged. Lower the learning rates (spec.transfer.optimizer, spec.fineTune.optimizer) by a "
            "factor of ten."
        )


def _cross_entropy(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    true_class_probabilities = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(true_class_probabilities, EPSILON)).mean())


def _top_k(probabilities: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> float:
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def _auc(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    from sklearn.metrics import roc_auc_score

    present = [index for index in range(probabilities.shape[1]) if 0 < np.sum(labels == index) < len(labels)]
    if not present:
        return None
    averaged = [1] if probabilities.shape[1] == 2 else present
    return float(np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in averaged]))
