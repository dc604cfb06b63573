"""Compares the metrics of two classifiers on the same images."""

from collections.abc import Iterable

import numpy as np

from topwork.report.evaluation import MetricsSection
from topwork.report.statistics.bootstrap import ScoredImages, bootstrap_p_value, resample
from topwork.report.statistics.shares import loss_p_value
from topwork.spec.evaluation import LOWER_IS_BETTER

# Metrics that are a share of the images.
SHARES = ("accuracy", "top5")


class WorseTest(MetricsSection):
    """One-sided paired test of whether a model is worse than another one on the same images.

    Attributes:
        images: Number of images.
        p_value: Probability of so large a disadvantage if the model were not worse.
        gained: Number of images that only this model gets right; None for metrics that are not a share of the images.
        lost: Number of images that only the other model gets right; None for such metrics.
    """

    images: int
    p_value: float
    gained: int | None = None
    lost: int | None = None


def count_differences(metric: str, first: ScoredImages, second: ScoredImages) -> tuple[int, int]:
    """Count the images that only one of two classifiers gets right.

    Args:
        metric: accuracy or top5.
        first: The first classifier.
        second: The second classifier, on the same images.

    Returns:
        Number of images that only the second one gets right, and that only the first one gets right.
    """
    before, after = first.is_right(metric), second.is_right(metric)
    return int(np.count_nonzero(after & ~before)), int(np.count_nonzero(before & ~after))


def run_worse_tests(metrics: Iterable[str], model: ScoredImages, other: ScoredImages) -> dict[str, WorseTest]:
    """Test for several metrics whether a model is worse than another one.

    Shares of images have McNemar's exact test, other metrics a paired bootstrap test.

    Args:
        metrics: Names of the metrics, which are defined for both.
        model: The model.
        other: The other one, on the same images.

    Returns:
        One test per metric, without metrics that cannot be resampled; see `resamples_of`.
    """
    tests, names, images = {}, tuple(metrics), len(model.labels)
    for name in names:
        if name in SHARES:
            gained, lost = count_differences(name, other, model)
            tests[name] = WorseTest(images=images, p_value=loss_p_value(gained, lost), gained=gained, lost=lost)
    once = np.ones(images, np.int64)
    for name, (ours, its) in resample((model, other), [name for name in names if name not in SHARES]).items():
        sign = -1.0 if name in LOWER_IS_BETTER else 1.0
        gain = sign * (model.measure(name, once) - other.measure(name, once))
        tests[name] = WorseTest(images=images, p_value=bootstrap_p_value(gain, sign * (ours - its), images))
    return tests
