"""Plots of the report of a search, as SVG."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from topwork.report.plots import GAP, INK, TRAINING, VALIDATION, draw_svg
from topwork.search.parameter_names import format_parameter
from topwork.search.trials import Trial, TrialState
from topwork.spec.search import Parameter

COLORS: dict[TrialState, str] = {
    "complete": TRAINING,
    "pruned": VALIDATION,
    "paused": VALIDATION,
    "running": VALIDATION,
}
QUIET = "#8b949e"
SPREAD = LinearSegmentedColormap.from_list("spread", [QUIET, TRAINING])
MAX_TICK_CHARACTERS = 16
MAX_TICKS = 12


def plot_history(trials: Sequence[Trial], metric: str, *, lower_is_better: bool) -> str:
    """Plot the value of each trial, and the best value so far.

    Args:
        trials: All trials.
        metric: Metric of the search.
        lower_is_better: Whether a lower value is better.

    Returns:
        An `<svg>` element, or an empty string without values.
    """
    valued = [trial for trial in trials if trial.value is not None]
    complete = [trial for trial in valued if trial.state == "complete"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for state, color in COLORS.items():
            points = [(trial.number, trial.value) for trial in valued if trial.state == state]
            if points:
                filled = color if state == "complete" else "none"
                numbers, values = zip(*points, strict=True)
                axes.scatter(numbers, values, s=26, edgecolors=color, facecolors=filled, label=state, zorder=3)
        if complete:
            best = list(accumulate((trial.value or 0.0 for trial in complete), min if lower_is_better else max))
            axes.step([trial.number for trial in complete], best, where="post", color=INK, linewidth=1, label="best")
        _mark_failures(axes, trials)
        axes.set(xlabel="trial", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    return _draw(draw, (10.0, 3.4)) if valued else ""


def plot_importance(importance: Mapping[str, float]) -> str:
    """Plot the share of each parameter in the variation of the metric.

    Args:
        importance: Share of each parameter by its name, from 0 to 1.

    Returns:
        An `<svg>` element, or an empty string without parameters.
    """
    ordered = sorted(importance.items(), key=lambda entry: entry[1])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh([name for name, _ in ordered], [100 * share for _, share in ordered], color=TRAINING, height=0.6)
        axes.set(xlabel="importance in %", xlim=(0, max(1.0, *(108 * share for _, share in ordered))))
        axes.grid(visible=False, axis="y")

    return _draw(draw, (10.0, 0.8 + 0.36 * len(ordered))) if ordered else ""


def plot_parallel_coordinates(
    trials: Sequence[Trial],
    space: Mapping[str, Parameter],
    names: Mapping[str, str],
    metric: str,
    *,
    lower_is_better: bool,
) -> str:
    """Plot each complete trial as a line through its values of all parameters and of the metric.

    Args:
        trials: All trials.
        space: The parameters by their path.
        names: Short name of each parameter.
        metric: Metric of the search.
        lower_is_better: Whether a lower value is better.

    Returns:
        An `<svg>` element, or an empty string without complete trials.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    ranked = sorted(complete, key=lambda trial: trial.value or 0.0, reverse=lower_is_better)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        columns = [_parameter_axis(parameter) for parameter in space.values()]
        outcome = _NumberAxis([float(trial.value or 0.0) for trial in ranked], logarithmic=False)
        for rank, trial in enumerate(ranked):
            heights = [
                column.height(trial.params[path]) if path in trial.params else math.nan
                for path, column in zip(space, columns, strict=True)
            ]
            is_best = rank == len(ranked) - 1
            color = GAP if is_best else to_hex(SPREAD(rank / max(1, len(ranked) - 1)))
            heights.append(outcome.height(trial.value))
            width = 2.0 if is_best else 0.9
            axes.plot(range(len(heights)), heights, "o-", color=color, linewidth=width, markersize=3, alpha=0.85)
        _label_columns(axes, [*columns, outcome], [*(names[path] for path in space), metric])

    return _draw(draw, (max(6.0, 1.7 * (len(space) + 1)), 4.0)) if complete else ""


def plot_rungs(trials: Sequence[Trial], metric: str) -> str:
    """Plot the value of each trial over the epochs of its runs.

    Args:
        trials: All trials.
        metric: Metric of the search.

    Returns:
        An `<svg>` element, or an empty string if no trial was continued.
    """
    continued = any(len(trial.results) > 1 for trial in trials)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for trial in trials:
            if trial.results:
                color = COLORS.get(trial.state, GAP)
                points = [(result.epochs, result.value) for result in trial.results]
                axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, linewidth=1.2, alpha=0.8)
        axes.set(xlabel="epochs", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw(draw, (10.0, 3.4)) if continued else ""


def plot_cost(trials: Sequence[Trial]) -> str:
    """Plot the duration of each trial, one segment for each of its runs.

    Args:
        trials: All trials.

    Returns:
        An `<svg>` element, or an empty string without runs.
    """
    own = [trial for trial in trials if trial.results and trial.equal_to is None]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for trial in own:
            ends = list(accumulate((result.seconds for result in trial.results), initial=0.0))
            for index, result in enumerate(trial.results):
                axes.bar(
                    trial.number, result.seconds, 0.8, ends[index], color=TRAINING, alpha=0.9 if index % 2 else 0.6
                )
        axes.set(xlabel="trial", ylabel="seconds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw(draw, (10.0, 2.6)) if own else ""


class _NumberAxis:
    """Positions of numbers between 0 and 1."""

    def __init__(
        self, values: Sequence[float], *, logarithmic: bool, bounds: tuple[float, float] | None = None
    ) -> None:
        self._low, self._high = bounds or (min(values), max(values))
        self._scale: Callable[[float], float] = math.log if logarithmic else float

    def height(self, value: Any) -> float:
        """Return the position of a value."""
        low, high = self._scale(self._low), self._scale(self._high)
        return (self._scale(value) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return positions and texts of the labels."""
        ends = [(0.0, format_parameter(self._low)), (1.0, format_parameter(self._high))]
        return ends if self._high > self._low else [(0.5, ends[0][1])]


class _ChoiceAxis:
    """Positions of the values of a choice, in the order of the spec."""

    def __init__(self, choices: Sequence[Any]) -> None:
        self._texts = [format_parameter(choice) for choice in choices]

    def height(self, value: Any) -> float:
        """Return the position of a value."""
        return self._texts.index(format_parameter(value)) / max(1, len(self._texts) - 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return positions and texts of the labels; of many choices, only the first and the last."""
        shown = range(len(self._texts)) if len(self._texts) <= MAX_TICKS else (0, len(self._texts) - 1)
        return [(index / max(1, len(self._texts) - 1), self._texts[index][:MAX_TICK_CHARACTERS]) for index in shown]


def _parameter_axis(parameter: Parameter) -> "_NumberAxis | _ChoiceAxis":
    if parameter.choice is not None:
        return _ChoiceAxis(parameter.choice)
    bounds = parameter.log_uniform or parameter.uniform or parameter.int
    assert bounds
    return _NumberAxis(bounds, logarithmic=parameter.log_uniform is not None)


def _label_columns(axes: Axes, columns: Sequence["_NumberAxis | _ChoiceAxis"], names: Sequence[str]) -> None:
    for index, column in enumerate(columns):
        axes.axvline(index, color=INK, linewidth=0.8)
        for height, text in column.ticks():
            axes.annotate(text, (index, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.3, len(names) - 0.4), ylim=(-0.06, 1.06), yticks=[])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _mark_failures(axes: Axes, trials: Sequence[Trial]) -> None:
    failed = [trial.number for trial in trials if trial.state == "failed"]
    if failed:
        bottom = axes.get_xaxis_transform()
        axes.scatter(failed, [0.03] * len(failed), marker="x", s=26, color=GAP, transform=bottom, label="failed")


def _draw(draw: Callable[[Figure], None], inches: tuple[float, float]) -> str:
    # Names of choices are text, not formulas.
    with rc_context({"text.parse_math": False}):
        return draw_svg(draw, inches)
