"""Prometheus series of a run; with `edge.gpus` the only module that knows prometheus_client."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.samples import Sample

from topwork.edge.gpus import visible_gpus

# From a tiny model on a GPU to a large base on a processor.
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Reached(NamedTuple):
    """How far a training stage has come: complete epochs, and the best metric by its name in the history."""

    epochs: int | None = None
    metric: str | None = None
    value: float | None = None


class Metrics:
    """All series of one process, in a registry of their own; base units, no unbounded label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._info = Info("topwork_stage", "Run and versions of this process.", registry=self.registry)
        self._running = self._gauge("stage_running", "1 while the stage runs.", "stage")
        self._stage_seconds = self._gauge("stage_duration_seconds", "Wall time of the finished stage.", "stage")
        self._epoch = self._gauge("epoch", "Epochs that are complete.", "stage")
        self._epochs_planned = self._gauge("epochs_planned", "Epochs at most.", "stage")
        self._steps = self._counter("steps", "Training steps done by this process.")
        self._images = self._counter("images", "Training images seen by this process.")
        self._step_seconds = Histogram(
            "topwork_step_duration_seconds",
            "Wall time of a training step.",
            buckets=STEP_SECONDS,
            registry=self.registry,
        )
        self._input_wait = self._counter("input_wait_seconds", "Time that training waited for its next batch.")
        self._loss = self._gauge("loss", "Loss of the last epoch.", "split")
        self._metric = self._gauge("metric", "Metric of the last epoch or evaluation.", "name", "split")
        self._best = self._gauge("best_metric", "Metric of the epoch whose weights are kept.", "stage", "name", "split")
        self._learning_rate = self._gauge("learning_rate", "Learning rate of the last step.")
        self._parameters = self._gauge("parameters", "Parameters of the model.", "trainable")
        self._replicas = self._gauge("replicas", "Replicas that train in step.")
        self._rejected = self._counter("images_rejected", "Images left out of the dataset.", "reason")
        self._storage_bytes = self._counter("storage_bytes", "Bytes moved from and to object storage.", "direction")
        self._storage_retries = self._counter("storage_retries", "Requests to object storage that were tried again.")
        self._checkpoint = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "Unix time at which the last checkpoint was stored."
        )
        if gpus := visible_gpus():
            self.registry.register(gpus)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"topwork_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"topwork_{name}", text, labels, registry=self.registry)

    def serve(self, port: int, address: str = "0.0.0.0") -> int:  # noqa: S104 - Prometheus scrapes from outside
        """Serve the series over HTTP from a thread of its own.

        Args:
            port: TCP port; 0 takes a free one.
            address: Address to listen on.

        Returns:
            The port.

        Raises:
            OSError: If the port is taken.
        """
        server, _ = start_http_server(port, address, registry=self.registry)
        return int(server.server_port)

    def describe(self, **labels: str) -> None:
        """Say what this process runs: `topwork_stage_info{job=…, run=…, version=…}`."""
        self._info.info(labels)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Mark a stage as running, and keep how long it took."""
        started = time.monotonic()
        self._running.labels(name).set(1)
        try:
            yield
        finally:
            self._running.labels(name).set(0)
            self._stage_seconds.labels(name).set(time.monotonic() - started)

    def epochs_planned(self, stage: str, epochs: int) -> None:
        """Say how many epochs a stage will train at most."""
        self._epochs_planned.labels(stage).set(epochs)

    def epoch(self, stage: str, epoch: int) -> None:
        """Say that `epoch` epochs of a stage are complete."""
        self._epoch.labels(stage).set(epoch)

    def step(self, images: int, seconds: float, input_wait_seconds: float) -> None:
        """Count one training step of `images` images, and how long it took and waited."""
        self._steps.inc()
        self._images.inc(images)
        self._step_seconds.observe(seconds)
        self._input_wait.inc(input_wait_seconds)

    def loss(self, split: str, value: float) -> None:
        """Set the loss of the last epoch on a split."""
        self._loss.labels(split).set(value)

    def metric(self, name: str, split: str, value: float) -> None:
        """Set a metric of the last epoch or evaluation on a split."""
        self._metric.labels(name, split).set(value)

    def evaluation(self, split: str, values: Mapping[str, float]) -> None:
        """Set what an evaluation on a split has measured, the loss among it."""
        for name, value in values.items():
            if name == "loss":
                self.loss(split, value)
            else:
                self.metric(name, split, value)

    def best(self, stage: str, name: str, split: str, value: float) -> None:
        """Set a metric of the epoch of a stage whose weights are kept."""
        self._best.labels(stage, name, split).set(value)

    def reached(self, stage: str) -> Reached:
        """Say how far a stage has come, by what was told here."""
        epochs = [sample.value for sample in _samples(self._epoch) if sample.labels["stage"] == stage]
        for sample in _samples(self._best):
            if sample.labels["stage"] == stage:
                split, name = sample.labels["split"], sample.labels["name"]
                metric = name if split == "train" else f"{split}_{name}"
                return Reached(int(epochs[0]) if epochs else None, metric, sample.value)
        return Reached(int(epochs[0]) if epochs else None)

    def learning_rate(self, value: float) -> None:
        """Set the learning rate of the last step."""
        self._learning_rate.set(value)

    def parameters(self, trainable: int, frozen: int) -> None:
        """Set how many parameters the model trains, and how many it keeps."""
        self._parameters.labels("true").set(trainable)
        self._parameters.labels("false").set(frozen)

    def replicas(self, count: int) -> None:
        """Set how many replicas train in step."""
        self._replicas.set(count)

    def rejected(self, reason: str, count: int = 1) -> None:
        """Count images that were left out, by a reason from a fixed list."""
        self._rejected.labels(reason).inc(count)

    def storage_bytes(self, direction: str, count: int) -> None:
        """Count bytes moved; `direction` is upload or download."""
        self._storage_bytes.labels(direction).inc(count)

    def storage_retry(self) -> None:
        """Count one request that was tried again."""
        self._storage_retries.inc()

    def checkpoint_saved(self) -> None:
        """Say that a checkpoint is complete in storage now."""
        self._checkpoint.set_to_current_time()


def _samples(gauge: Gauge) -> Iterator[Sample]:
    for family in gauge.collect():
        yield from family.samples
