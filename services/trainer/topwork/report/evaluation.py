"""How good a classifier is on a split, from its probabilities: the numbers that gates, card and report show."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from topwork.errors import DataError

# Bins of the reliability diagram and of the calibration error, as in Guo et al. 2017, "On Calibration of Modern
# Neural Networks".
BINS = 15
# A probability of exactly 0 has no logarithm; the smallest step of float32 below 1 stands in for it, as in Keras.
SMALLEST = 1e-7


class Figures(BaseModel):
    """A part of `metrics.json`: frozen, camelCase outside."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class ClassScores(Figures):
    """How well one class is told from the others."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


class Bin(Figures):
    """The images whose confidence lies above `low` and up to `high`."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


class Evaluation(Figures):
    """A classifier on one split. Shares lie in 0..1; precision, recall and F1 are macro averages over the classes.

    Attributes:
        split: Name of the split, test or validation.
        images: Number of images; each counts once.
        loss: Mean cross-entropy in nats.
        top5: Share of images whose class is among the five (or all, if there are fewer) most probable.
        auc: Area under the ROC curve of class 1 for two classes, else the mean of one-versus-rest over the classes
            that occur; None where no two classes occur.
        calibration_error: Expected calibration error of the most probable class, in 15 bins of equal width.
        confusion: Images by true class (rows) and predicted class (columns).
        reliability: The bins that hold images.
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
    reliability: tuple[Bin, ...]

    @property
    def values(self) -> dict[str, float]:
        """The single numbers by their names in the job spec; one that is not defined is left out."""
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


def evaluation(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: tuple[str, ...], split: str = "test"
) -> Evaluation:
    """Measure a classifier by its answers.

    Args:
        probabilities: float32 (images, classes), each row adding up to 1.
        labels: int64 (images,), the true class of each image.
        class_names: Name of each class, in the order of the columns.
        split: Name of the split that the images are from.

    Returns:
        All measures.

    Raises:
        DataError: If there is no image, or a probability is not a number.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    _check(probabilities, split)
    classes = np.arange(len(class_names))
    predicted = probabilities.argmax(axis=1)
    scores = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    precision, recall, f1, images = (column.tolist() for column in scores)
    bins = reliability(probabilities, labels)
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


def reliability(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[Bin, ...]:
    """Sort images by the confidence of their most probable class into 15 bins of equal width.

    Args:
        probabilities: float32 (images, classes).
        labels: int64 (images,).

    Returns:
        The bins that hold images, from the least confident to the most.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, BINS + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, BINS - 1)
    return tuple(
        Bin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            images=int(np.sum(place == index)),
            confidence=float(confidence[place == index].mean()),
            accuracy=float(right[place == index].mean()),
        )
        for index in np.unique(place)
    )


def _check(probabilities: NDArray[np.float32], split: str) -> None:
    if not len(probabilities):
        raise DataError(
            f"The {split} split holds no image, so the model can't be evaluated. "
            f"Widen spec.dataset.splits.{split}, or add images."
        )
    wrong = int(np.sum(~np.isfinite(probabilities).all(axis=1)))
    if wrong:
        raise DataError(
            f"The trained model's probabilities are not numbers for {wrong} of {len(probabilities)} images: training "
            "diverged. Lower the learning rates (spec.transfer.optimizer, spec.fineTune.optimizer) by a factor of ten."
        )


def _cross_entropy(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    of_the_true_class = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_the_true_class, SMALLEST)).mean())


def _top_k(probabilities: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> float:
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def _auc(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    from sklearn.metrics import roc_auc_score

    present = [index for index in range(probabilities.shape[1]) if 0 < np.sum(labels == index) < len(labels)]
    if not present:
        return None
    counted = [1] if probabilities.shape[1] == 2 else present
    return float(np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in counted]))
