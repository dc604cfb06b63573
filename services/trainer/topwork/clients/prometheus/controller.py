"""Prometheus metrics of the controller: its TransferJobs and TransferSearches, its reconciles and its work queue."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from topwork.clients.prometheus.search import SearchFamilies
from topwork.clients.prometheus.series import unit_of

STATES = ("Pending", "Running", "Suspended", "Complete", "Failed", "Cancelled")
# From a finished TransferJob, which needs no request, to one whose requests time out.
RECONCILE_DURATION_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TRANSFERJOB_SERIES = 13
"""Maximum number of series of a TransferJob."""
TRANSFERJOB_LABELS = ("namespace", "transferjob")
"""Labels of every series of a TransferJob, in addition to those of its family."""
SEARCH_LABELS = ("namespace", "transfersearch")
"""Labels of every series of a TransferSearch, in addition to those of its family."""
MAX_SEARCH_SERIES = 6
"""Maximum number of series of a TransferSearch."""


@dataclass(frozen=True)
class TransferJobSample:
    """What the metrics report about a TransferJob.

    Attributes:
        namespace: Its namespace.
        name: Its name.
        run: Name of its current run; empty if there is none, because its spec was not accepted.
        state: State as in its status, such as Running.
        stage: Stage that runs, or that ran last; empty before the first one.
        model: URI of the published model; empty before it is published.
        queue: LocalQueue of Kueue that admits its Job; empty without a queue.
        gpus: Number of GPUs that the run requests.
        created: Unix time at which it was created.
        started: Unix time at which the current run was created; None before.
        completed: Unix time at which the current run finished; None before.
        gpu_seconds: GPU-seconds of all attempts of all runs so far.
        team: Value of its label `team`; empty without the label.
    """

    namespace: str
    name: str
    run: str
    state: str
    stage: str
    model: str
    queue: str
    gpus: int
    created: float
    started: float | None
    completed: float | None
    gpu_seconds: float
    team: str = ""


@dataclass(frozen=True)
class TransferSearchSample:
    """What the metrics report about a TransferSearch.

    Attributes:
        namespace: Its namespace.
        name: Its name.
        trials: Number of trials by state.
        metric: Its metric.
        best: Value of the metric of the best complete trial; None before.
    """

    namespace: str
    name: str
    trials: Mapping[str, int]
    metric: str
    best: float | None


class TransferSearchCollector(Collector):
    """Collects the series of all TransferSearches at scrape time.

    Args:
        samples: Returns the current sample of each TransferSearch. Called in the thread of the scrape.
    """

    def __init__(self, samples: Callable[[], Iterable[TransferSearchSample]]) -> None:
        self._samples = samples

    def describe(self) -> Iterator[Metric]:
        """Yield the metric families without series."""
        return iter(SearchFamilies(SEARCH_LABELS).all())

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families with the series of every TransferSearch."""
        families = SearchFamilies(SEARCH_LABELS)
        for sample in self._samples():
            families.add([sample.namespace, sample.name], sample.trials, sample.metric, sample.best)
        return iter(families.all())


class TransferJobCollector(Collector):
    """Collects the series of all TransferJobs at scrape time, so that a deleted TransferJob has no series.

    Args:
        samples: Returns the current sample of each TransferJob. Called in the thread of the scrape.
    """

    def __init__(self, samples: Callable[[], Iterable[TransferJobSample]]) -> None:
        self._samples = samples

    def describe(self) -> Iterator[Metric]:
        """Yield the metric families without series."""
        return iter(_TransferJobFamilies().all())

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families with the series of every TransferJob."""
        families = _TransferJobFamilies()
        for sample in self._samples():
            families.add(sample)
        return iter(families.all())


class _TransferJobFamilies:
    """Metric families of TransferJobs."""

    def __init__(self) -> None:
        self.info = InfoMetricFamily(
            "topwork_transferjob",
            "The current `run` of a TransferJob, the URI of its published `model`, and its `queue` and `team`.",
            labels=[*TRANSFERJOB_LABELS, "run", "queue", "model", "team"],
        )
        self.state = self._gauge("state", "1 for the current state of the TransferJob, 0 for all others.", "state")
        self.stage = self._gauge("stage", "1 for the stage that runs, or that ran last.", "stage")
        self.created = self._gauge("created_timestamp_seconds", "Unix time at which the TransferJob was created.")
        self.started = self._gauge("started_timestamp_seconds", "Unix time at which the current run was created.")
        self.completed = self._gauge(
            "completed_timestamp_seconds", "Unix time at which the current run finished. Absent before."
        )
        self.gpus = self._gauge("gpus", "Number of GPUs that the current run requests.")
        self.gpu_seconds = CounterMetricFamily(
            "topwork_transferjob_gpu_seconds",
            "Number of GPUs times the seconds for which pods held them, over all attempts of all runs.",
            labels=TRANSFERJOB_LABELS,
            unit="seconds",
        )

    def all(self) -> list[Metric]:
        """Return all families."""
        return list(vars(self).values())

    def add(self, sample: TransferJobSample) -> None:
        """Add the series of a TransferJob."""
        labels = [sample.namespace, sample.name]
        info = {"run": sample.run, "queue": sample.queue, "model": sample.model, "team": sample.team}
        self.info.add_metric(labels, dict(zip(TRANSFERJOB_LABELS, labels, strict=True)) | info)
        for state in STATES:
            self.state.add_metric([*labels, state], sample.state == state)
        if sample.stage:
            self.stage.add_metric([*labels, sample.stage], 1)
        self.created.add_metric(labels, sample.created)
        if sample.started is not None:
            self.started.add_metric(labels, sample.started)
        if sample.completed is not None:
            self.completed.add_metric(labels, sample.completed)
        self.gpus.add_metric(labels, sample.gpus)
        self.gpu_seconds.add_metric(labels, sample.gpu_seconds)

    @staticmethod
    def _gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(
            f"topwork_transferjob_{name}", help_text, labels=[*TRANSFERJOB_LABELS, *labels], unit=unit_of(name)
        )


class ControllerMetrics:
    """The metrics of the controller, in a registry of their own. Thread-safe.

    Only the leader exposes TransferJobs and TransferSearches, so that the sum over all replicas is correct.

    Example:
        ```python
        metrics = ControllerMetrics(samples=lambda: [], version="0.2.0")
        metrics.set_leader(True)
        metrics.observe_reconcile("ok", seconds=0.02)
        body, content_type = metrics.page()
        ```
    """

    def __init__(
        self,
        samples: Callable[[], Iterable[TransferJobSample]],
        version: str,
        searches: Callable[[], Iterable[TransferSearchSample]] = tuple,
    ) -> None:
        """Create all series. Counters start at 0, otherwise Prometheus would miss their first increase.

        Args:
            samples: Returns the current sample of each TransferJob; called at each scrape while this process leads.
            version: Version of topwork.
            searches: Returns the current sample of each TransferSearch.
        """
        self.registry = CollectorRegistry()
        self._is_leading = False
        self.registry.register(TransferJobCollector(lambda: samples() if self._is_leading else ()))
        self.registry.register(TransferSearchCollector(lambda: searches() if self._is_leading else ()))
        self.info = self._gauge("info", "Version of topwork of the controller.", "version")
        self.info.labels(version).set(1)
        self.leader = self._gauge("leader", "1 while this process holds the Lease and reconciles, otherwise 0.")
        self.reconciles = Counter(
            "topwork_controller_reconciles", "Reconciles by result: ok or error.", ["result"], registry=self.registry
        )
        for result in ("ok", "error"):
            self.reconciles.labels(result)
        self.reconcile_seconds = Histogram(
            "topwork_controller_reconcile_duration_seconds",
            "Duration of a reconcile.",
            buckets=RECONCILE_DURATION_BUCKETS,
            unit="seconds",
            registry=self.registry,
        )
        self.queue_depth = self._gauge("queue_depth", "Number of TransferJobs and TransferSearches that are due.")
        self.queue_oldest = self._gauge(
            "queue_oldest_seconds", "Seconds for which the oldest of them has been due; 0 if none is."
        )

    def observe_reconcile(self, result: Literal["ok", "error"], seconds: float) -> None:
        """Record a reconcile: whether it succeeded, and its duration."""
        self.reconciles.labels(result).inc()
        self.reconcile_seconds.observe(seconds)

    def set_queue(self, depth: int, oldest_seconds: float) -> None:
        """Set the number of TransferJobs and TransferSearches that are due, and for how long the oldest has been due.

        Call it before `page`: the age of a stuck entry grows although nothing else happens.
        """
        self.queue_depth.set(depth)
        self.queue_oldest.set(oldest_seconds)

    def set_leader(self, leading: bool) -> None:
        """Set whether this process holds the Lease."""
        self._is_leading = leading
        self.leader.set(leading)

    def page(self) -> tuple[bytes, str]:
        """Return the metrics page in the Prometheus text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"topwork_controller_{name}", help_text, labels, unit=unit_of(name), registry=self.registry)
