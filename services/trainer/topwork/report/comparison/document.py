"""Renders a comparison as a single self-contained HTML file."""

from collections.abc import Sequence

import numpy as np

from topwork.data.local_dataset import Split
from topwork.report.comparison.result import ChangedImage, Comparison, Estimate
from topwork.report.pictures import thumbnail
from topwork.report.template_rendering import render_template

# Pictures of newly correct, and of newly misclassified images, of each model.
MAX_PICTURES = 24


def render_comparison(comparison: Comparison, images: Split) -> str:
    """Render a comparison as HTML.

    Args:
        comparison: The comparison.
        images: Its images.

    Returns:
        HTML. Names of classes and files are untrusted and escaped.
    """

    def illustrate(changed: Sequence[ChangedImage]) -> list[tuple[ChangedImage, str]]:
        shown = changed[:MAX_PICTURES]
        return [(image, thumbnail(images.load_images(np.array([image.index]))[0])) for image in shown]

    filters = {"estimate": format_estimate, "difference": format_difference, "percent": "{:.1%}".format}
    return render_template("comparison.html.j2", filters, {"comparison": comparison, "illustrate": illustrate})


def format_estimate(estimate: Estimate) -> str:
    """Format a metric with its interval, such as `0.9312 [0.9100, 0.9480]`."""
    return f"{estimate.value:z.4f}" + _interval(estimate, "z.4f")


def format_difference(estimate: Estimate) -> str:
    """Format a difference with its interval, such as `+0.0088 [-0.0120, +0.0296]`."""
    return f"{estimate.value:+z.4f}" + _interval(estimate, "+z.4f")


def _interval(estimate: Estimate, form: str) -> str:
    return "" if estimate.low is None else f" [{estimate.low:{form}}, {estimate.high:{form}}]"
