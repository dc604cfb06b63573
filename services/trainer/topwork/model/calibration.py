"""Temperature scaling: one number that makes the confidence of a classifier agree with its accuracy.

The logits are divided by the temperature that minimizes the cross-entropy on held-out images (Guo et al. 2017, "On
Calibration of Modern Neural Networks"). A positive factor keeps the order of the logits, so the predicted classes stay
the same.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from topwork.model.probabilities import rows_per_block

# Networks need temperatures of about 0.5 to 5. Beyond these bounds, the images do not determine a temperature.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
# Newton's method needs about 6 steps; a bisection of the whole range to full precision needs 60.
MAX_STEPS = 100
# Relative change of the temperature that ends the search.
PRECISION = 1e-9


class NotCalibratableError(Exception):
    """The images do not determine a temperature; the message is a clause with the reason."""


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Find the temperature that minimizes the mean cross-entropy of softmax(logits / temperature).

    The cross-entropy is a convex function of the inverse temperature. This is Newton's method for the root of its
    derivative, with bisection where a step leaves the interval that contains the root.

    Args:
        logits: float32 (images, 1) for two classes, where a positive logit means class 1, otherwise (images, classes).
        labels: int64 (images,), true class of each image.

    Returns:
        The temperature, between 0.05 and 20. Above 1, the classifier was overconfident.

    Raises:
        NotCalibratableError: If no temperature in this range is best.

    Example:
        >>> fit_temperature(np.array([[3.0], [3.0], [-3.0], [3.0]], np.float32), np.array([1, 1, 0, 0]))
        2.730717679880512
    """
    if not len(labels):
        raise NotCalibratableError("there are no images")
    if not np.isfinite(logits).all():
        raise NotCalibratableError("the classifier predicts NaN or infinite logits")
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if _derivatives(logits, labels, low)[0] >= 0:
        raise NotCalibratableError("the predicted classes are hardly better than guesses")
    if _derivatives(logits, labels, high)[0] <= 0:
        raise NotCalibratableError(
            "all images are classified correctly, or nearly all of them: the more confident the probabilities, the "
            "lower the loss, without a limit"
        )
    inverse = 1.0
    for _ in range(MAX_STEPS):
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        previous, inverse = inverse, newton if low < newton < high else (low + high) / 2
        if abs(inverse - previous) <= PRECISION * inverse:
            break
    return float(1 / inverse)


def _derivatives(logits: NDArray[np.float32], labels: NDArray[np.int64], inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean cross-entropy by the inverse temperature.

    They are the mean, over the images, of E(z) - z[label] and of Var(z), for the logits z and the predicted
    probabilities at this temperature.
    """
    slope = curvature = 0.0
    for z, own in _blocks(logits, labels):
        weights = np.exp(inverse * z)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = (weights * z).sum(axis=1)
        slope += float((mean - z[np.arange(len(z)), own]).sum())
        curvature += float((weights * (z - mean[:, np.newaxis]) ** 2).sum())
    return slope / len(labels), curvature / len(labels)


def _blocks(
    logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Yield logits in float64, one for each class, of which the largest of each image is 0, and their labels."""
    rows = rows_per_block(2 * logits.shape[1])
    for start in range(0, len(labels), rows):
        z = logits[start : start + rows].astype(np.float64)
        if z.shape[1] == 1:
            z = np.concatenate([np.zeros_like(z), z], axis=1)
        yield z - z.max(axis=1, keepdims=True), labels[start : start + rows]
