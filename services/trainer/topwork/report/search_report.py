"""The HTML report of a search: `searches/<search id>/report.html`."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from topwork.clients.s3.storage import Storage
from topwork.registry import versions
from topwork.registry.searches import report_key
from topwork.registry.versions import Version
from topwork.report import search_plots
from topwork.report.template_rendering import render_template
from topwork.search.importance import Importance, parameter_importance
from topwork.search.metrics import is_minimized
from topwork.search.parameter_names import format_parameter, short_names
from topwork.search.search_id import search_id
from topwork.search.study import Study
from topwork.search.trials import Trial
from topwork.spec.search import TransferSearch
from topwork.spec.yaml_output import dump_yaml

CALIBRATED = ("loss", "calibrationError")
"""Metrics that `spec.evaluate.calibration` changes."""


@dataclass(frozen=True)
class SearchResults:
    """What the report shows.

    Attributes:
        search: The search.
        trials: Its trials.
        best: The best complete trial; None before one is complete.
        end_reason: Why no further run starts; empty while there can be one.
        importance: Importance of the parameters.
        published: URI of the published model; None before, or if it did not meet the gates.
        version: The published version; None if there is none, or if its storage can't be read.
    """

    search: TransferSearch
    trials: tuple[Trial, ...]
    best: Trial | None
    end_reason: str
    importance: Importance
    published: str | None
    version: Version | None

    @property
    def metric(self) -> str:
        """The metric of the search."""
        return self.search.spec.metric

    @property
    def test_value(self) -> float | None:
        """Value of the metric of the published model on the test split; None if it is not published or not read."""
        return self.version.metrics.get(self.metric) if self.version else None

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials by state, the most frequent first."""
        return dict(Counter(trial.state for trial in self.trials).most_common())

    @property
    def selection_note(self) -> str:
        """What the values mean."""
        if self.best is None or self.best.value is None:
            return "No trial is complete, so there is no best one yet."
        complete = self.counts["complete"]
        chosen = f"the best of {complete} complete trials" if complete > 1 else "the only complete trial"
        note = f"{self.metric} {self.best.value:.4f} on the validation split is {chosen}. "
        if complete > 1:
            direction = "a higher" if is_minimized(self.search.spec.metric) else "a lower"
            note += f"The same images selected it, so the value is optimistic: expect {direction} one on other images. "
        if self.version is None and self.published:
            return f"{note}{self.published} was not read for this report: its card has the value on the test split."
        if self.version is None:
            return f"{note}No model of this search is published, so there is no value on the test split."
        if self.test_value is None:
            return f"{note}The metrics of {self.version.uri} do not include {self.metric}."
        value = f"the published model has {self.metric} {self.test_value:.4f} on its {self.version.images} images."
        if self.version.split != "test":
            return f"{note}There is no test split: {value} It is optimistic, too: these images selected the model."
        if self.metric in CALIBRATED and self.search.spec.template.evaluate.calibration != "none":
            value += " It is calibrated, and the trials are not, so the two values cannot be compared."
        return f"{note}The test split took no part in the search: {value}"


def store_report(search: TransferSearch, study: Study, storage: Storage) -> str:
    """Render the report of a search, and store it.

    Args:
        search: The search.
        study: Its trials.
        storage: Storage of the search.

    Returns:
        URI of the report.
    """
    key = report_key(search_id(search))
    content = render_search_report(read_results(search, study, storage)).encode()
    storage.write(key, content, content_type="text/html; charset=utf-8")
    return storage.uri_of(key)


def read_results(search: TransferSearch, study: Study, storage: Storage | None) -> SearchResults:
    """Collect what the report shows.

    Args:
        search: The search.
        study: Its trials.
        storage: Storage of the search, for the published version; None if it can't be read.
    """
    version = None
    if study.published and storage:
        name, number = study.published.rstrip("/").split("/")[-2:]
        version = versions.read_version(storage, name, int(number))
    importance = parameter_importance(search, study.trials)
    return SearchResults(search, study.trials, study.best, study.end_reason, importance, study.published, version)


def render_search_report(results: SearchResults) -> str:
    """Render the report as a single self-contained HTML file.

    Args:
        results: What it shows.

    Returns:
        HTML. Names and values of parameters are escaped.
    """
    content = results.search.model_dump(mode="json", by_alias=True, exclude_unset=True)
    variables = {
        "results": results,
        "search": results.search,
        "id": search_id(results.search),
        "names": short_names(results.search.spec.space),
        "figures": _figures(results),
        "seconds": sum(trial.seconds for trial in results.trials),
        "gpu_seconds": sum(trial.gpu_seconds for trial in results.trials),
        "spec": dump_yaml([content]),
    }
    filters = {"value": _format_value, "duration": _format_duration, "parameter": format_parameter}
    return render_template("search.html.j2", filters, variables)


def _figures(results: SearchResults) -> dict[str, Markup]:
    trials, metric, space = results.trials, results.metric, results.search.spec.space
    names, lower = short_names(space), is_minimized(results.search.spec.metric)
    shares = {names[path]: share for path, share in results.importance.shares.items()}
    figures = {
        "history": search_plots.plot_history(trials, metric, lower_is_better=lower),
        "importance": search_plots.plot_importance(shares),
        "parallel": search_plots.plot_parallel_coordinates(trials, space, names, metric, lower_is_better=lower),
        "rungs": search_plots.plot_rungs(trials, metric),
        "cost": search_plots.plot_cost(trials),
    }
    return {name: Markup(svg) for name, svg in figures.items()}  # noqa: S704 - generated and escaped by matplotlib


def _format_value(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
