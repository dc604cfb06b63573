"""Calibrated probabilities: the temperature of a classifier, and what it changed on the evaluated images."""

from collections.abc import Iterable

import numpy as np
import structlog
from numpy.typing import NDArray

from topwork.model.calibration import NotCalibratableError, fit_temperature
from topwork.report.evaluation import CalibrationBin, Evaluation, MetricsSection
from topwork.report.export_check import spread_indices
from topwork.report.predictions import Predictions

log = structlog.get_logger(__name__)

# Logits of the validation split that the temperature is fitted on. 256 MiB are 3,355 images with 20,000 classes: many
# for a single number.
MAX_LOGIT_BYTES = 256 * 2**20


class Uncalibrated(MetricsSection):
    """What calibration changes, on the evaluated images and before calibration.

    Attributes:
        loss: Mean cross-entropy in nats.
        calibration_error: Expected calibration error.
        reliability: The non-empty confidence bins.
    """

    loss: float
    calibration_error: float
    reliability: tuple[CalibrationBin, ...]


class Calibration(MetricsSection):
    """The calibration of a classifier.

    Attributes:
        temperature: Number that the logits are divided by; None if it could not be fitted.
        images: Number of images of the validation split that it was fitted on.
        reason: Why it could not be fitted, as a clause; empty if it was.
        before: Metrics of the uncalibrated classifier; None if it was not evaluated or is not calibrated.
    """

    temperature: float | None
    images: int
    reason: str = ""
    before: Uncalibrated | None = None

    def with_uncalibrated(self, evaluation: Evaluation) -> "Calibration":
        """Add the metrics of the uncalibrated classifier."""
        before = Uncalibrated(
            loss=evaluation.loss,
            calibration_error=evaluation.calibration_error,
            reliability=evaluation.reliability,
        )
        return self.model_copy(update={"before": before})

    def describe(self, evaluation: Evaluation) -> str:
        """Describe the calibration and what it changed in one or two sentences.

        Args:
            evaluation: Metrics of the calibrated classifier.
        """
        if self.temperature is None:
            return (
                f"The probabilities are not calibrated, because no temperature could be fitted on {self.images} images "
                f"of the validation split: {self.reason}. Use more validation images, or set "
                "spec.evaluate.calibration to none."
            )
        fitted = (
            f"The probabilities are calibrated: the logits are divided by {self.temperature:.4g}, a temperature that "
            f"was fitted on {self.images} images of the validation split."
        )
        if self.before is None:
            return fitted
        return (
            f"{fitted} On the {evaluation.split} split, this changed the loss from {self.before.loss:.4f} to "
            f"{evaluation.loss:.4f} and the calibration error from {self.before.calibration_error:.4f} to "
            f"{evaluation.calibration_error:.4f}."
        )

    def caveats(self, evaluation: Evaluation) -> tuple[str, ...]:
        """Return sentences that a reader of the calibrated metrics must know.

        Args:
            evaluation: Metrics of the calibrated classifier.
        """
        if self.temperature is None:
            return (self.describe(evaluation),)
        found = []
        if evaluation.split == "validation":
            found.append(
                "The temperature was fitted on the images on which loss and calibration error are measured, so both "
                "are optimistic."
            )
        if self.before and evaluation.loss > self.before.loss:
            found.append(
                f"Calibration made the probabilities worse: on the {evaluation.split} split, the loss is "
                f"{evaluation.loss:.4f} instead of {self.before.loss:.4f}. The temperature was fitted on {self.images} "
                "validation images, which also selected the best epoch. Use more validation images, or set "
                "spec.evaluate.calibration to none."
            )
        return tuple(found)


def fit_calibration(logits: Iterable[NDArray[np.float32]], labels: NDArray[np.int64], classes: int) -> Calibration:
    """Fit the temperature of a classifier on the validation split, or on evenly spaced images of a large one.

    Args:
        logits: Batches float32 (batch, 1) for two classes, otherwise (batch, classes), of all images in order.
        labels: int64 (images,), true class of each image.
        classes: Number of classes.

    Returns:
        The temperature, or why there is none.
    """
    chosen = spread_indices(len(labels), MAX_LOGIT_BYTES // (4 * classes))
    try:
        temperature = fit_temperature(_select_rows(logits, chosen), labels[chosen])
    except NotCalibratableError as error:
        return Calibration(temperature=None, images=len(chosen), reason=str(error))
    log.info("calibration", temperature=temperature, images=len(chosen), split="validation")
    return Calibration(temperature=temperature, images=len(chosen))


def require_same_classes(before: Predictions, after: Predictions) -> None:
    """Check that calibration did not change the predicted classes, which no positive temperature does.

    Classes whose logits are nearly equal may change places by rounding, but no class has more than half of the
    probability then.

    Raises:
        RuntimeError: If the class of an image changed that was predicted with more than half of the probability.
    """
    changed = np.flatnonzero((before.predicted != after.predicted) & (before.confidence > 0.51))
    if len(changed):
        raise RuntimeError(
            f"Calibration changed the predicted class of {len(changed)} of {len(before.predicted)} images. Nothing is "
            "published."
        )


def _select_rows(batches: Iterable[NDArray[np.float32]], chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    parts, first = list[NDArray[np.float32]](), 0
    for batch in batches:
        inside = chosen[(chosen >= first) & (chosen < first + len(batch))]
        parts.append(batch[inside - first])
        first += len(batch)
    return np.concatenate(parts)
