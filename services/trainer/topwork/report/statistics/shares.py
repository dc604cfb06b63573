"""Intervals and exact tests for shares of images, such as the accuracy."""

import math
from collections.abc import Sequence
from statistics import NormalDist

Interval = tuple[float, float]


def share_interval(count: int, total: int, confidence: float) -> Interval:
    """Return the Wilson score interval of a share.

    Unlike a bootstrap interval, it is neither empty nor too narrow if all images, or none, are classified correctly
    (Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial Proportion").

    Args:
        count: Number of images that count.
        total: Number of images, at least 1.
        confidence: Confidence level in (0, 1).

    Returns:
        Lower and upper bound in 0..1.

    Example:
        >>> tuple(round(bound, 3) for bound in share_interval(20, 20, 0.95))
        (0.839, 1.0)
    """
    z = _quantile(confidence)
    share, shrinkage = count / total, 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / shrinkage
    half = z / shrinkage * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def paired_difference_interval(gained: int, lost: int, total: int, confidence: float) -> Interval:
    """Return the interval of the difference of two shares of the same images.

    This is the Wald interval after adding half an image to each of the four cells (Agresti and Min 2005, "Simple
    improved confidence intervals for comparing matched proportions"). It is not empty if no image differs.

    Args:
        gained: Number of images that count only for the second classifier.
        lost: Number of images that count only for the first classifier.
        total: Number of images, at least 1.
        confidence: Confidence level in (0, 1).

    Returns:
        Lower and upper bound of the second share minus the first, in -1..1.
    """
    difference, size = gained - lost, total + 2
    half = _quantile(confidence) * math.sqrt(gained + lost + 1 - difference**2 / size) / size
    return max(-1.0, difference / size - half), min(1.0, difference / size + half)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    The test asks how often the images that only one of two equally good classifiers gets right would be divided at
    least as unevenly.

    Args:
        gained: Number of images that only the second classifier gets right.
        lost: Number of images that only the first classifier gets right.

    Returns:
        The p-value in (0, 1]; 1 if no image differs.

    Example:
        >>> mcnemar_p_value(1, 5)
        0.21875
    """
    return min(1.0, 2 * loss_p_value(min(gained, lost), max(gained, lost)))


def loss_p_value(gained: int, lost: int) -> float:
    """Return the one-sided p-value of McNemar's exact test: that a classifier that is not worse loses so many images.

    Args:
        gained: Number of images that only the second classifier gets right.
        lost: Number of images that only the first classifier gets right.

    Returns:
        The probability of at most `gained` heads in `gained + lost` throws of a coin; small if the second is worse.
    """
    total = gained + lost
    if gained > lost:  # fewer terms
        return 1.0 - (loss_p_value(lost - 1, gained + 1) if lost else 0.0)
    terms = (
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2))
        for k in range(gained + 1)
    )
    return min(1.0, math.fsum(terms))


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of tests, by Holm's method (1979).

    Args:
        p_values: One p-value per test.

    Returns:
        The corrected p-values, in the same order. If all below 0.05 are accepted, the probability that at least one of
        them is a coincidence is at most 5 %.

    Example:
        >>> correct_p_values([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
