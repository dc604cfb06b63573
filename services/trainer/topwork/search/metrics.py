"""The direction of the metric of a search."""

from topwork.spec.evaluation import LOWER_IS_BETTER
from topwork.spec.search import SearchMetric


def is_minimized(metric: SearchMetric) -> bool:
    """Return whether lower values of a metric are better."""
    return metric in LOWER_IS_BETTER
