"""All series of one job in one process: their names, meanings and labels; base units, no unbounded label."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# From a tiny model on a GPU to a large base on a processor.
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
UNITS = ("seconds", "bytes", "ratio", "watts", "celsius")

MOST_SERIES = 77
"""Series of one process at most, without those of its GPUs: every stage, split, metric and reason at once."""

OUTCOME = (
    "topwork_stage",
    "topwork_exit_code",
    "topwork_stage_start_timestamp_seconds",
    "topwork_stage_duration_seconds",
    "topwork_epoch",
    "topwork_epochs_planned",
    "topwork_loss",
    "topwork_metric",
    "topwork_best_metric",
    "topwork_parameters",
    "topwork_replicas",
    "topwork_dataset_images",
    "topwork_images_rejected",
    "topwork_gates_failed",
)
"""Families that say what came of a job: what a Pushgateway keeps. It shows them for good, so none tells of a moment,
and none is a count of one process, which would be added to what was scraped of it."""

# When a counter began says nothing that Prometheus uses, and would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]


def unit_of(name: str) -> str:
    """Give the unit that a name ends with, for OpenMetrics; empty for plain numbers."""
    return next((unit for unit in UNITS if name.endswith(f"_{unit}")), "")


class Late:
    """A gauge without labels that is shown from its first value on: the 0 before would be taken for one."""

    def __init__(self, gauge: Gauge, registry: CollectorRegistry) -> None:
        """Keep a gauge back.

        Args:
            gauge: The gauge, in no registry.
            registry: Where it goes with its first value.
        """
        self.gauge, self._registry = gauge, registry
        self._lock, self._shown = threading.Lock(), False

    def set(self, value: float) -> None:
        """Set its value."""
        self.gauge.set(value)
        if not self._shown:
            with self._lock:
                if not self._shown:
                    self._registry.register(self.gauge)
                    self._shown = True


class Series:
    """The series of one job; another job has its own, so that nothing of the one before is shown as its."""

    def __init__(self, gpus: Collector | None = None) -> None:
        """Make all series; counters stand at 0 from the start, or their first growth would not be seen.

        Args:
            gpus: Figures of the GPUs; None without one.
        """
        self.registry = CollectorRegistry()
        self.info = Info(
            "topwork_stage",
            "What this process runs: `stage`, `version`, and `gpus` that are its own.",
            registry=self.registry,
        )
        self._stages()
        self._training()
        self._results()
        self._storage()
        if gpus:
            self.registry.register(gpus)

    def _stages(self) -> None:
        self.running = self._gauge("stage_running", "1 while the stage runs.", "stage")
        self.stage_start = self._gauge(
            "stage_start_timestamp_seconds", "Unix time at which the stage was first started.", "stage"
        )
        self.stage_seconds = self._gauge(
            "stage_duration_seconds", "Wall time of the ended stage, from its first start to its end.", "stage"
        )
        self.exit_code = self._gauge(
            "exit_code",
            "How the process ended: 0 done, 2 wrong spec or data, 3 gate not met, 75 storage or network, 143 stopped, "
            "1 a bug; absent before.",
            "stage",
        )
        self.last_progress = self._late(
            "last_progress_timestamp_seconds",
            "Unix time of the last sign that work goes on: a step, an image, bytes moved, a checkpoint.",
        )

    def _training(self) -> None:
        self.epoch = self._gauge("epoch", "Epochs that are complete.", "stage")
        self.epochs_planned = self._gauge("epochs_planned", "Epochs at most.", "stage")
        self.steps = self._counter("steps", "Training steps done by this process.")
        self.images = self._counter("images", "Training images seen by this process.")
        self.step_seconds = Histogram(
            "topwork_step_duration_seconds",
            "Wall time of a training step, with its wait for input.",
            buckets=STEP_SECONDS,
            unit="seconds",
            registry=self.registry,
        )
        self.input_wait = self._counter("input_wait_seconds", "Time in which training stood still for want of input.")
        self.step_compute = self._counter("step_compute_seconds", "Time of training steps, less their wait for input.")
        self.learning_rate = self._late("learning_rate", "Learning rate of the last step.")
        self.loss_not_finite = self._counter("loss_not_finite", "Times that a loss or a weight was no number any more.")
        self.parameters = self._gauge("parameters", "Parameters of the model.", "trainable")
        self.replicas = self._late("replicas", "Replicas that train in step.")

    def _results(self) -> None:
        self.loss = self._gauge("loss", "Loss of the last epoch or evaluation.", "split")
        self.metric = self._gauge("metric", "Metric of the last epoch or evaluation.", "name", "split")
        self.best = self._gauge("best_metric", "Metric of the epoch whose weights are kept.", "stage", "name", "split")
        self.gates_failed = self._late("gates_failed", "Gates that the evaluation did not meet; absent before it.")
        self.dataset_images = self._late("dataset_images", "Images of the stored dataset.")
        self.rejected = self._counter(
            "images_rejected", "Images left out of the dataset; later stages repeat the count.", "reason"
        )

    def _storage(self) -> None:
        self.storage_bytes = self._counter(
            "storage_bytes", "Bytes moved from and to object storage by this process.", "direction"
        )
        for direction in ("download", "upload"):
            self.storage_bytes.labels(direction)
        self.storage_retries = self._counter("storage_retries", "Requests to object storage that were tried again.")
        self.checkpoint = self._late(
            "checkpoint_last_success_timestamp_seconds", "Unix time at which the last checkpoint was stored."
        )
        self.checkpoints = self._counter("checkpoints", "Checkpoints stored by this process.")
        self.checkpoint_seconds = self._late(
            "checkpoint_duration_seconds", "Time that writing and storing the last checkpoint took, beside training."
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"topwork_{name}", text, labels, unit=unit_of(name), registry=self.registry)

    def _late(self, name: str, text: str) -> Late:
        return Late(Gauge(f"topwork_{name}", text, unit=unit_of(name), registry=None), self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"topwork_{name}", text, labels, unit=unit_of(name), registry=self.registry)


def samples(gauge: Gauge) -> Iterator[Sample]:
    """Give what a gauge shows."""
    for family in gauge.collect():
        yield from family.samples


class Page(CollectorRegistry):
    """Reads another registry anew each time, and puts the labels of the job on every series.

    Done here and by nobody else: without a join and without a rule of relabelling, on a laptop as in a cluster.
    """

    def __init__(
        self,
        source: Callable[[], Collector],
        labels: Callable[[], Mapping[str, str]],
        only: Collection[str] = (),
    ) -> None:
        """Show what a registry holds.

        Args:
            source: Gives the registry; another one once another job has begun.
            labels: Gives the labels of the job.
            only: Names of the families that are shown; empty for all.
        """
        super().__init__()
        self._source, self._labels, self._only = source, labels, frozenset(only)

    def collect(self) -> Iterable[Metric]:
        """Give all families with their series."""
        return self._collect()

    def _collect(self) -> Iterator[Metric]:
        labels = self._labels()
        for family in self._source().collect():
            if self._only and family.name not in self._only:
                continue
            # A family without a series says nothing, and would stand in a Pushgateway without a meaning.
            if family.samples:
                family.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
                yield family
