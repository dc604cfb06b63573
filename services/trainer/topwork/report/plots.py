"""Plots of the report, as SVG that uses the text color of the page and therefore suits light and dark themes."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from topwork.registry.stage_results import HistoryRow
from topwork.report.evaluation import CalibrationBin

# Placeholder for the text color of the page; no plot uses this color otherwise.
INK = "#010203"
TRAINING, VALIDATION, GAP = "#4c8dff", "#f08a24", "#e5484d"
STYLE = {
    "svg.fonttype": "none",  # keep text as text: uses the font of the page and can be searched
    "svg.hashsalt": "topwork",  # reproducible output
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#8b949e",
    "grid.alpha": 0.25,
    "axes.grid": True,
    "legend.frameon": False,
}


def plot_history(history: Sequence[HistoryRow]) -> str:
    """Plot loss and accuracy over the epochs of all stages.

    Args:
        history: One row per epoch.

    Returns:
        An `<svg>` element, or an empty string without epochs.
    """
    if not history:
        return ""

    def draw(figure: Figure) -> None:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            _curve(axes, history, name)

    return draw_svg(draw, (10.0, 3.4))


def plot_reliability(bins: Sequence[CalibrationBin], uncalibrated: Sequence[CalibrationBin] = ()) -> str:
    """Plot accuracy against confidence.

    Args:
        bins: The non-empty confidence bins.
        uncalibrated: Those before calibration, which are drawn as a line; empty without calibration.

    Returns:
        An `<svg>` element.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        centers = [(b.low + b.high) / 2 for b in bins]
        widths = [0.92 * (b.high - b.low) for b in bins]
        max_images = max(b.images for b in bins)
        for center, width, b in zip(centers, widths, bins, strict=True):
            axes.bar(center, b.accuracy, width, color=TRAINING, alpha=0.3 + 0.6 * b.images / max_images, linewidth=0)
        if uncalibrated:
            _reliability_line(axes, uncalibrated, VALIDATION, "before calibration")
            _reliability_line(axes, bins, GAP, "after calibration")
            axes.legend(loc="upper left")
        else:
            axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o", color=GAP, markersize=4)
        axes.plot([0, 1], [0, 1], "--", color=INK, linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", aspect="equal")

    return draw_svg(draw, (4.4, 4.2))


def plot_confusion_matrix(confusion: Sequence[Sequence[int]]) -> str:
    """Plot a confusion matrix with many classes as an image; each row is normalized by its class.

    Args:
        confusion: Number of images by true class (rows) and predicted class (columns).

    Returns:
        An `<svg>` element.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
        # Transparent to opaque: empty cells stay dark on a dark page.
        colors = LinearSegmentedColormap.from_list("share", [to_rgba(TRAINING, 0.04), to_rgba(TRAINING, 1.0)])
        axes.imshow(shares, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")

    return draw_svg(draw, (4.6, 4.5))


def _curve(axes: Axes, history: Sequence[HistoryRow], name: str) -> None:
    epochs = range(1, len(history) + 1)
    for key, label, color in ((name, "training", TRAINING), (f"validation_{name}", "validation", VALIDATION)):
        if any(key in row for row in history):
            values = [float(row.get(key, math.nan)) for row in history]
            axes.plot(epochs, values, "o-", color=color, label=label, markersize=3, linewidth=1.6)
    for epoch, stage in _stage_starts(history):
        if epoch > 1:
            axes.axvline(epoch - 0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(stage, (epoch - 0.4, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=9, alpha=0.7)
    axes.set(title=name, xlabel="epoch", xlim=(0.5, len(history) + 0.5))
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")


def _reliability_line(axes: Axes, bins: Sequence[CalibrationBin], color: str, label: str) -> None:
    confidence, accuracy = [b.confidence for b in bins], [b.accuracy for b in bins]
    axes.plot(confidence, accuracy, "o-", color=color, label=label, markersize=4, linewidth=1.2)


def _stage_starts(history: Sequence[HistoryRow]) -> list[tuple[int, str]]:
    stages = [str(row["stage"]) for row in history]
    return [(n + 1, stage) for n, stage in enumerate(stages) if n == 0 or stage != stages[n - 1]]


def draw_svg(draw: Callable[[Figure], None], inches: tuple[float, float]) -> str:
    """Draw a figure in the style of the report.

    Args:
        draw: Draws on the figure.
        inches: Width and height.

    Returns:
        An `<svg>` element.
    """
    settings: dict[str, Any] = STYLE
    with rc_context(settings):
        # Figure without pyplot: no global state, and no display needed.
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
