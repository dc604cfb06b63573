"""Definitions of all Prometheus series of a job: names, help texts, labels and units."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from topwork.clients.prometheus.gpus import GPU_METRICS

# From a tiny model on a GPU to a large base on a CPU.
STEP_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
UNITS = ("seconds", "bytes", "ratio", "watts", "celsius")

MAX_SERIES = 79
"""Maximum number of series of one process without its GPU series: with every stage, split, metric and reason.

Node 0 of several nodes has `CHIEF_SERIES` more.
"""
CHIEF_SERIES = 3
"""Number of series that only runs on several nodes have, on node 0."""
MAX_NODE_SERIES = 12
"""Maximum number of series of a node other than node 0, without its GPU series."""

NODE_FAMILIES = (
    "topwork_stage",
    "topwork_stage_running",
    "topwork_input_wait_seconds",
    "topwork_step_compute_seconds",
    "topwork_evaluation_images",
    "topwork_evaluation_seconds",
    "topwork_storage_bytes",
    "topwork_storage_retries",
    *GPU_METRICS,
)
"""Metric families that every node of a run exposes. All others describe the run, and only node 0 exposes them.

A sum over the processes of a run therefore counts no step, image, epoch or checkpoint twice.
"""

OUTCOME_FAMILIES = (
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
    "topwork_leaked_images",
    "topwork_label_issues",
    "topwork_images_rejected",
    "topwork_gates_failed",
)
"""Metric families that are pushed to a Pushgateway when a process ends.

A Pushgateway keeps series forever. Momentary values are therefore omitted, and so are counters of one process, which
would be added to the values that Prometheus scraped from the process itself.
"""

# Prometheus does not use the creation time of counters, and it would double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]


def unit_of(name: str) -> str:
    """Return the OpenMetrics unit that a metric name ends with; empty if it has none."""
    return next((unit for unit in UNITS if name.endswith(f"_{unit}")), "")


class DeferredGauge:
    """A gauge without labels that is exposed only after its first value: an initial 0 would look like a measurement."""

    def __init__(self, gauge: Gauge, registry: CollectorRegistry) -> None:
        """Create the gauge without registering it.

        Args:
            gauge: The gauge, in no registry.
            registry: Registry that receives the gauge with its first value.
        """
        self.gauge, self._registry = gauge, registry
        self._lock, self._is_registered = threading.Lock(), False

    def set(self, value: float) -> None:
        """Set the value."""
        self.gauge.set(value)
        if not self._is_registered:
            with self._lock:
                if not self._is_registered:
                    self._registry.register(self.gauge)
                    self._is_registered = True


class MetricFamilies:
    """All Prometheus series of one job. Each job gets its own, so that no value of the previous job remains visible."""

    def __init__(self, gpus: Collector | None = None, nodes: int = 1) -> None:
        """Create all series. Counters start at 0, otherwise Prometheus would miss their first increase.

        Args:
            gpus: Collector of GPU series; None without a GPU.
            nodes: Number of nodes of the run. Only runs on several nodes expose series that compare nodes.
        """
        self.registry = CollectorRegistry()
        self.info = Info(
            "topwork_stage",
            "The stage that this process runs (`stage`), its `version` of topwork and its number of `gpus`.",
            registry=self.registry,
        )
        self._create_stage_series()
        self._create_training_series()
        self._create_result_series()
        self._create_storage_series()
        self._create_node_series()
        if nodes > 1:
            self.registry.register(self.evaluation_images)
            self.registry.register(self.evaluation_seconds)
            self.nodes.set(nodes)
        if gpus:
            self.registry.register(gpus)

    def _create_stage_series(self) -> None:
        self.running = self._gauge("stage_running", "1 while the stage is running, otherwise 0.", "stage")
        self.stage_start = self._gauge(
            "stage_start_timestamp_seconds", "Unix time of the first start of the stage, in any process.", "stage"
        )
        self.stage_seconds = self._gauge(
            "stage_duration_seconds", "Wall time of a finished stage, from its first start to its end.", "stage"
        )
        self.exit_code = self._gauge(
            "exit_code",
            "Exit code of the process: 0 success, 2 invalid spec or data, 3 gate not met, 75 storage or network "
            "failure, 143 stopped, 1 a bug. Absent while the process runs.",
            "stage",
        )
        self.last_progress = self._deferred_gauge(
            "last_progress_timestamp_seconds",
            "Unix time of the last progress: a step, an image, bytes transferred, a checkpoint.",
        )

    def _create_training_series(self) -> None:
        self.epoch = self._gauge("epoch", "Number of completed epochs.", "stage")
        self.epochs_planned = self._gauge("epochs_planned", "Maximum number of epochs.", "stage")
        self.steps = self._counter("steps", "Training steps completed by this process.")
        self.images = self._counter(
            "images", "Images trained on by this process. On several nodes, node 0 counts the images of all nodes."
        )
        self.step_seconds = Histogram(
            "topwork_step_duration_seconds",
            "Wall time of a training step, including the wait for input.",
            buckets=STEP_DURATION_BUCKETS,
            unit="seconds",
            registry=self.registry,
        )
        self.input_wait = self._counter("input_wait_seconds", "Time that training steps waited for input.")
        self.step_compute = self._counter(
            "step_compute_seconds", "Time of training steps, excluding their wait for input."
        )
        self.learning_rate = self._deferred_gauge("learning_rate", "Learning rate of the last step.")
        self.loss_not_finite = self._counter(
            "loss_not_finite", "Number of times that the loss or a weight became NaN or infinite."
        )
        self.parameters = self._gauge("parameters", "Number of model parameters.", "trainable")
        self.replicas = self._deferred_gauge("replicas", "Number of model replicas trained in parallel.")

    def _create_result_series(self) -> None:
        self.loss = self._gauge("loss", "Loss in the last epoch or evaluation.", "split")
        self.metric = self._gauge("metric", "Metric value in the last epoch or evaluation.", "name", "split")
        self.best = self._gauge(
            "best_metric", "Metric value of the best epoch, whose weights are kept.", "stage", "name", "split"
        )
        self.gates_failed = self._deferred_gauge(
            "gates_failed", "Number of gates that the evaluation did not meet. Absent before the evaluation."
        )
        self.dataset_images = self._deferred_gauge("dataset_images", "Number of images in the stored dataset.")
        self.leaked_images = self._deferred_gauge(
            "leaked_images", "Evaluated images with an exact or near duplicate in the train split."
        )
        self.label_issues = self._deferred_gauge("label_issues", "Images whose class is probably wrong.")
        self.rejected = self._counter(
            "images_rejected", "Images excluded from the dataset. Later stages repeat the count.", "reason"
        )

    def _create_storage_series(self) -> None:
        self.storage_bytes = self._counter(
            "storage_bytes", "Bytes transferred to and from object storage by this process.", "direction"
        )
        for direction in ("download", "upload"):
            self.storage_bytes.labels(direction)
        self.storage_retries = self._counter("storage_retries", "Retried requests to object storage.")
        self.checkpoint = self._deferred_gauge(
            "checkpoint_last_success_timestamp_seconds", "Unix time at which the last checkpoint was stored."
        )
        self.checkpoints = self._counter("checkpoints", "Checkpoints stored by this process.")
        self.checkpoint_seconds = self._deferred_gauge(
            "checkpoint_duration_seconds",
            "Time taken to write and upload the last checkpoint, in parallel with training.",
        )

    def _create_node_series(self) -> None:
        self.nodes = self._deferred_gauge("nodes", "Number of nodes of a run on several nodes.")
        self.evaluation_images = Counter(
            "topwork_evaluation_images", "Images of the validation split evaluated by this node.", registry=None
        )
        self.evaluation_seconds = Counter(
            "topwork_evaluation_seconds",
            "Time in which this node read and evaluated its images of the validation split, without communication.",
            unit="seconds",
            registry=None,
        )

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"topwork_{name}", help_text, labels, unit=unit_of(name), registry=self.registry)

    def _deferred_gauge(self, name: str, help_text: str) -> DeferredGauge:
        gauge = Gauge(f"topwork_{name}", help_text, unit=unit_of(name), registry=None)
        return DeferredGauge(gauge, self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"topwork_{name}", help_text, labels, unit=unit_of(name), registry=self.registry)


def samples_of(gauge: Gauge) -> Iterator[Sample]:
    """Yield the samples that a gauge exposes."""
    for family in gauge.collect():
        yield from family.samples


class LabeledRegistry(CollectorRegistry):
    """A view of another registry that adds the labels of the job to every series.

    Adding them here makes joins and relabeling rules unnecessary, on a laptop as well as in a cluster.
    """

    def __init__(
        self,
        source: Callable[[], Collector],
        labels: Callable[[], Mapping[str, str]],
        families: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        """Create the view.

        Args:
            source: Returns the registry to expose; called at every scrape, because each job has its own registry.
            labels: Returns the labels of the job.
            families: Returns the names of the metric families to expose; None exposes all.
        """
        super().__init__()
        self._source, self._labels, self._families = source, labels, families

    def collect(self) -> Iterable[Metric]:
        """Yield all exposed metric families with their series."""
        labels, exposed = self._labels(), self._families()
        for family in self._source().collect():
            if exposed is not None and family.name not in exposed:
                continue
            # A family without samples has no meaning for a reader and would remain in a Pushgateway.
            if family.samples:
                family.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
                yield family
