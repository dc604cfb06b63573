"""The metrics that stages report, exposed over HTTP for Prometheus."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, start_http_server

from topwork.clients.prometheus.gpus import open_gpu_collector
from topwork.clients.prometheus.search import LocalSearchCollector
from topwork.clients.prometheus.series import (
    NODE_FAMILIES,
    OUTCOME_FAMILIES,
    LabeledRegistry,
    MetricFamilies,
    samples_of,
)


class StageProgress(NamedTuple):
    """Progress of a training stage: completed epochs and the best metric, named as in the training history."""

    epochs: int | None = None
    metric: str | None = None
    value: float | None = None


class Metrics:
    """The metrics of the job that this process runs. Every exposed series has the labels `transferjob` and `run`.

    If several nodes train a run, every series also has the label `node`. Nodes other than node 0 expose only the series
    in `NODE_FAMILIES`, and push nothing: the results of the run come from node 0.

    Example:
        ```python
        metrics = Metrics()
        metrics.start_job(job="cats", run="cats-0f1e2d3c", stage="transfer", version="0.1.0")
        metrics.serve(9102)
        with metrics.track_stage("transfer"):
            metrics.record_step(images=64, seconds=0.25)
        ```
    """

    def __init__(self, *, gpus: bool = True, visible_devices: str | None = None) -> None:
        """Create all series.

        Args:
            gpus: Whether to report the GPUs of this machine.
            visible_devices: GPUs to report, in the format of CUDA_VISIBLE_DEVICES; None reports all.
        """
        self._gpus = open_gpu_collector(visible_devices) if gpus else None
        self._families = MetricFamilies(self._gpus)
        self._labels: dict[str, str] = {}
        self._node_label: dict[str, str] = {}
        self._is_chief = True
        self._restored_stages: set[str] = set()
        self.labeled_registry = LabeledRegistry(
            lambda: self._families.registry,
            lambda: self._labels | self._node_label,
            lambda: None if self._is_chief else NODE_FAMILIES,
        )
        """The series of the job."""
        self._search = LocalSearchCollector()
        self.outcome_registry = LabeledRegistry(
            lambda: self._families.registry,
            lambda: self._labels,
            lambda: OUTCOME_FAMILIES if self._is_chief else (),
        )
        """The series that are pushed to a Pushgateway; none on a node other than node 0."""

    @property
    def registry(self) -> CollectorRegistry:
        """The series without the labels of the job."""
        return self._families.registry

    @property
    def labels(self) -> dict[str, str]:
        """Labels that identify the run: `transferjob` and `run`; empty before `start_job`."""
        return dict(self._labels)

    @property
    def is_chief(self) -> bool:
        """Whether this process reports the results of the run: the only node, or node 0."""
        return self._is_chief

    def serve(self, port: int, address: str = "0.0.0.0") -> int:  # noqa: S104 - Prometheus scrapes from outside
        """Serve the series over HTTP in a background thread; clients that accept OpenMetrics receive it.

        Args:
            port: TCP port; 0 selects a free port.
            address: Address to listen on.

        Returns:
            The port.

        Raises:
            OSError: If the port is in use.
        """
        registry = CollectorRegistry()
        registry.register(self.labeled_registry)
        registry.register(self._search)
        server, _ = start_http_server(port, address, registry=registry)
        return int(server.server_port)

    def start_job(self, *, job: str, run: str, stage: str, version: str, node: int = 0, nodes: int = 1) -> None:
        """Set the job that this process runs, and drop all series of the previous job.

        Args:
            job: Name of the job.
            run: Name of the run.
            stage: Stage that the process runs; `run` for all stages.
            version: Version of topwork.
            node: Index of this node, from 0.
            nodes: Number of nodes that train the run.
        """
        families = MetricFamilies(self._gpus, nodes)
        families.info.info({"stage": stage, "version": version, "gpus": str(self._gpus.count if self._gpus else 0)})
        self._labels = {"transferjob": job, "run": run}
        self._node_label, self._is_chief = {"node": str(node)} if nodes > 1 else {}, node == 0
        self._families, self._restored_stages = families, set()
        self.record_progress()

    # ── Stages ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def track_stage(self, name: str) -> Iterator[None]:
        """Report a stage as running, and its duration at the end unless `restore_stage` has set it."""
        families = self._families
        families.stage_start.labels(name).set_to_current_time()
        families.running.labels(name).set(1)
        self.record_progress()
        try:
            yield
        finally:
            families.running.labels(name).set(0)
            self.record_progress()
            if name not in self._restored_stages:
                elapsed = datetime.now(UTC) - self.stage_start_time(name)
                families.stage_seconds.labels(name).set(elapsed.total_seconds())

    def stage_start_time(self, name: str) -> datetime:
        """Return when a stage was first started; the current time if it was not."""
        for sample in samples_of(self._families.stage_start):
            if sample.labels["stage"] == name:
                return datetime.fromtimestamp(sample.value, UTC)
        return datetime.now(UTC)

    def set_stage_start(self, stage: str, started: datetime) -> None:
        """Set the start time of a stage that an earlier process started and this one resumes."""
        self._families.stage_start.labels(stage).set(started.timestamp())

    def restore_stage(self, name: str, started: datetime, finished: datetime) -> None:
        """Set the start time and duration of a stage that an earlier process finished."""
        self._restored_stages.add(name)
        self._families.stage_start.labels(name).set(started.timestamp())
        self._families.stage_seconds.labels(name).set((finished - started).total_seconds())

    def stage_progress(self, stage: str) -> StageProgress:
        """Return the progress of a stage, as reported to this object."""
        epochs = next(
            (int(sample.value) for sample in samples_of(self._families.epoch) if sample.labels["stage"] == stage), None
        )
        for sample in samples_of(self._families.best):
            if sample.labels["stage"] == stage:
                split, name = sample.labels["split"], sample.labels["name"]
                return StageProgress(epochs, name if split == "train" else f"{split}_{name}", sample.value)
        return StageProgress(epochs)

    def set_exit_code(self, stage: str, code: int) -> None:
        """Set the exit code of the process."""
        self._families.exit_code.labels(stage).set(code)

    def record_progress(self) -> None:
        """Record that the process made progress at this moment."""
        self._families.last_progress.set(time.time())

    # ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────

    def set_planned_epochs(self, stage: str, epochs: int) -> None:
        """Set the maximum number of epochs of a stage."""
        self._families.epochs_planned.labels(stage).set(epochs)

    def set_epoch(self, stage: str, epoch: int) -> None:
        """Set the number of completed epochs of a stage."""
        self._families.epoch.labels(stage).set(epoch)

    def record_step(self, images: int, seconds: float) -> None:
        """Record a training step: its number of images, and its duration including the wait for input."""
        families = self._families
        families.steps.inc()
        families.images.inc(images)
        families.step_seconds.observe(seconds)

    def record_step_time(self, input_wait_seconds: float, compute_seconds: float) -> None:
        """Add the time that one or more steps spent waiting for input, and the time spent computing."""
        self._families.input_wait.inc(input_wait_seconds)
        self._families.step_compute.inc(compute_seconds)

    def record_evaluation_speed(self, images: int, seconds: float) -> None:
        """Record how fast this node evaluated images of the validation split, to find slow nodes.

        Training steps take equally long on all nodes, because each step waits for the slowest node. An evaluation
        without communication shows the speed of each node.

        Args:
            images: Number of images that this node evaluated, including padding.
            seconds: Time to read and evaluate them, excluding all communication between nodes.
        """
        self._families.evaluation_images.inc(images)
        self._families.evaluation_seconds.inc(seconds)

    def count_non_finite_loss(self) -> None:
        """Count a loss or weight that became NaN or infinite."""
        self._families.loss_not_finite.inc()

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the last step."""
        self._families.learning_rate.set(value)

    def set_parameters(self, trainable: int, frozen: int) -> None:
        """Set the number of trainable and frozen model parameters."""
        self._families.parameters.labels("true").set(trainable)
        self._families.parameters.labels("false").set(frozen)

    def set_replicas(self, count: int) -> None:
        """Set the number of model replicas."""
        self._families.replicas.set(count)

    def record_checkpoint(self, seconds: float) -> None:
        """Record that a checkpoint is now complete in storage, and how long writing it took."""
        self._families.checkpoint.set(time.time())
        self._families.checkpoint_seconds.set(seconds)
        self._families.checkpoints.inc()
        self.record_progress()

    # ── Results ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def set_loss(self, split: str, value: float) -> None:
        """Set the loss of the last epoch or evaluation on a split."""
        self._families.loss.labels(split).set(value)

    def set_metric(self, name: str, split: str, value: float) -> None:
        """Set a metric of the last epoch or evaluation on a split."""
        self._families.metric.labels(name, split).set(value)

    def set_evaluation(self, split: str, values: Mapping[str, float]) -> None:
        """Set all results of an evaluation on a split, including the loss."""
        for name, value in values.items():
            if name == "loss":
                self.set_loss(split, value)
            else:
                self.set_metric(name, split, value)

    def set_best_metric(self, stage: str, name: str, split: str, value: float) -> None:
        """Set a metric of the best epoch of a stage, whose weights are kept."""
        self._families.best.labels(stage, name, split).set(value)

    def set_failed_gates(self, count: int) -> None:
        """Set the number of gates that the evaluation did not meet."""
        self._families.gates_failed.set(count)

    def set_search(self, name: str, trials: Mapping[str, int], metric: str, best: float | None) -> None:
        """Set the state of the search that this process runs. Its series remain when the next trial starts.

        Args:
            name: `metadata.name` of the search.
            trials: Number of trials by state.
            metric: Metric of the search.
            best: Its value on the validation split, of the best complete trial; None before.
        """
        self._search.set(name, trials, metric, best)

    # ── Dataset and storage ─────────────────────────────────────────────────────────────────────────────────────────

    def set_dataset_images(self, images: int) -> None:
        """Set the number of images in the stored dataset."""
        self._families.dataset_images.set(images)

    def set_leaked_images(self, images: int) -> None:
        """Set the number of evaluated images with an exact or near duplicate in the train split."""
        self._families.leaked_images.set(images)

    def set_label_issues(self, images: int) -> None:
        """Set the number of images whose class is probably wrong."""
        self._families.label_issues.set(images)

    def init_rejection_reasons(self, reasons: Iterable[str]) -> None:
        """Expose a counter at 0 for each reason for rejecting an image."""
        for reason in reasons:
            self._families.rejected.labels(reason)

    def count_rejected_images(self, reason: str, count: int = 1) -> None:
        """Count rejected images by a reason from a fixed list."""
        self._families.rejected.labels(reason).inc(count)

    def count_storage_bytes(self, direction: str, count: int) -> None:
        """Count transferred bytes; `direction` is upload or download."""
        self._families.storage_bytes.labels(direction).inc(count)
        self.record_progress()

    def count_storage_retry(self) -> None:
        """Count one retried request to storage."""
        self._families.storage_retries.inc()


def serve_empty_page(port: int, address: str = "0.0.0.0") -> int:  # noqa: S104 - Prometheus scrapes from outside
    """Serve a metrics page without series in a background thread, so that scrapes of finished stages succeed.

    Args:
        port: TCP port; 0 selects a free port.
        address: Address to listen on.

    Returns:
        The port.

    Raises:
        OSError: If the port is in use.
    """
    server, _ = start_http_server(port, address, registry=CollectorRegistry())
    return int(server.server_port)
