"""Prometheus series of TransferSearches: `topwork search` exposes those of its search, the controller those of all."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

TRIAL_STATES = ("running", "paused", "complete", "pruned", "failed")


class SearchFamilies:
    """Metric families of searches."""

    def __init__(self, labels: Sequence[str]) -> None:
        """Create families without series.

        Args:
            labels: Names of the labels that identify a search.
        """
        self.trials = GaugeMetricFamily(
            "topwork_search_trials", "Number of trials of the search by their state.", labels=[*labels, "state"]
        )
        self.best = GaugeMetricFamily(
            "topwork_search_best",
            "Value of the metric of the search (`name`) on the validation split, of the best complete trial. Absent "
            "before.",
            labels=[*labels, "name"],
        )

    def all(self) -> list[Metric]:
        """Return all families."""
        return [self.trials, self.best]

    def add(self, labels: Sequence[str], trials: Mapping[str, int], metric: str, best: float | None) -> None:
        """Add the series of a search.

        Args:
            labels: Values of the labels that identify it.
            trials: Number of trials by state; states without trials may be missing.
            metric: Name of its metric.
            best: Value of the metric of the best trial; None before a trial is complete.
        """
        for state in TRIAL_STATES:
            self.trials.add_metric([*labels, state], trials.get(state, 0))
        if best is not None:
            self.best.add_metric([*labels, metric], best)


class LocalSearchCollector(Collector):
    """Collects the series of the search that this process runs; none without a search."""

    def __init__(self) -> None:
        self._search: tuple[str, dict[str, int], str, float | None] | None = None

    def set(self, name: str, trials: Mapping[str, int], metric: str, best: float | None) -> None:
        """Set the state of the search. Arguments are those of `SearchFamilies.add`, with the name of the search."""
        self._search = (name, dict(trials), metric, best)

    def collect(self) -> Iterator[Metric]:
        """Yield the families with the current series."""
        if self._search is None:
            return
        name, trials, metric, best = self._search
        families = SearchFamilies(["transfersearch"])
        families.add([name], trials, metric, best)
        yield from families.all()
