"""Prometheus series of a run; with `edge.gpus` and its own parts the only module that knows prometheus_client."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, start_http_server

from topwork.clients.prometheus.gpus import visible_gpus
from topwork.clients.prometheus.series import OUTCOME, Page, Series, samples


class Reached(NamedTuple):
    """How far a training stage has come: complete epochs, and the best metric by its name in the history."""

    epochs: int | None = None
    metric: str | None = None
    value: float | None = None


class Metrics:
    """The series of the job that this process runs; each leaves it with the labels `transferjob` and `run`."""

    def __init__(self, *, gpus: bool = True, only_gpus: str | None = None) -> None:
        """Make all series.

        Args:
            gpus: Whether the GPUs that are seen belong to this process.
            only_gpus: Those of them that do, as CUDA_VISIBLE_DEVICES names them; None for all.
        """
        self._gpus = visible_gpus(only_gpus) if gpus else None
        self._series = Series(self._gpus)
        self._labels: dict[str, str] = {}
        self._repeated: set[str] = set()
        self.page = Page(lambda: self._series.registry, lambda: self._labels)
        """What the port serves."""
        self.outcome = Page(lambda: self._series.registry, lambda: self._labels, OUTCOME)
        """What came of the job, for a Pushgateway."""

    @property
    def registry(self) -> CollectorRegistry:
        """The series without the labels of the job."""
        return self._series.registry

    @property
    def labels(self) -> dict[str, str]:
        """Labels that every series leaves with: `transferjob` and `run`, once `describe` was called."""
        return dict(self._labels)

    def serve(self, port: int, address: str = "0.0.0.0") -> int:  # noqa: S104 - Prometheus scrapes from outside
        """Serve the series over HTTP from a thread of its own, as OpenMetrics to who asks for it.

        Args:
            port: TCP port; 0 takes a free one.
            address: Address to listen on.

        Returns:
            The port.

        Raises:
            OSError: If the port is taken.
        """
        server, _ = start_http_server(port, address, registry=self.page)
        return int(server.server_port)

    def describe(self, *, job: str, run: str, stage: str, version: str) -> None:
        """Say what this process runs from now on; nothing of another job before it is shown any more.

        Args:
            job: Name of the job.
            run: Name of the run.
            stage: Stage that the process is for; `run` for all of them.
            version: Version of topwork.
        """
        series = Series(self._gpus)
        series.info.info({"stage": stage, "version": version, "gpus": str(self._gpus.count if self._gpus else 0)})
        self._labels = {"transferjob": job, "run": run}
        self._series, self._repeated = series, set()
        self.progress()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Mark a stage as running, and keep how long it took unless that is told of an earlier process."""
        series = self._series
        series.stage_start.labels(name).set_to_current_time()
        series.running.labels(name).set(1)
        self.progress()
        try:
            yield
        finally:
            series.running.labels(name).set(0)
            self.progress()
            if name not in self._repeated:
                began = datetime.now(UTC) - self.stage_started(name)
                series.stage_seconds.labels(name).set(began.total_seconds())

    def stage_started(self, name: str) -> datetime:
        """Say when a stage was first started; now, if nobody has told."""
        for sample in samples(self._series.stage_start):
            if sample.labels["stage"] == name:
                return datetime.fromtimestamp(sample.value, UTC)
        return datetime.now(UTC)

    def resumed(self, stage: str, started: datetime) -> None:
        """Say that an earlier process had started a stage that goes on here."""
        self._series.stage_start.labels(stage).set(started.timestamp())

    def repeat_stage(self, name: str, started: datetime, finished: datetime) -> None:
        """Tell of a stage that an earlier process has ended."""
        self._repeated.add(name)
        self._series.stage_start.labels(name).set(started.timestamp())
        self._series.stage_seconds.labels(name).set((finished - started).total_seconds())

    def exit_code(self, stage: str, code: int) -> None:
        """Say how the process has ended."""
        self._series.exit_code.labels(stage).set(code)

    def progress(self) -> None:
        """Say that work goes on."""
        self._series.last_progress.set(time.time())

    def epochs_planned(self, stage: str, epochs: int) -> None:
        """Say how many epochs a stage will train at most."""
        self._series.epochs_planned.labels(stage).set(epochs)

    def epoch(self, stage: str, epoch: int) -> None:
        """Say that `epoch` epochs of a stage are complete."""
        self._series.epoch.labels(stage).set(epoch)

    def step(self, images: int, seconds: float) -> None:
        """Count one training step of `images` images, and how long it took with its wait."""
        series = self._series
        series.steps.inc()
        series.images.inc(images)
        series.step_seconds.observe(seconds)

    def spent(self, input_wait_seconds: float, compute_seconds: float) -> None:
        """Add what some steps have spent standing still for want of input, and what on computing."""
        self._series.input_wait.inc(input_wait_seconds)
        self._series.step_compute.inc(compute_seconds)

    def loss(self, split: str, value: float) -> None:
        """Set the loss of the last epoch on a split."""
        self._series.loss.labels(split).set(value)

    def loss_not_finite(self) -> None:
        """Count a loss, or a weight, that is no number any more."""
        self._series.loss_not_finite.inc()

    def metric(self, name: str, split: str, value: float) -> None:
        """Set a metric of the last epoch or evaluation on a split."""
        self._series.metric.labels(name, split).set(value)

    def evaluation(self, split: str, values: Mapping[str, float]) -> None:
        """Set what an evaluation on a split has measured, the loss among it."""
        for name, value in values.items():
            if name == "loss":
                self.loss(split, value)
            else:
                self.metric(name, split, value)

    def gates_failed(self, count: int) -> None:
        """Say how many gates the evaluation did not meet."""
        self._series.gates_failed.set(count)

    def best(self, stage: str, name: str, split: str, value: float) -> None:
        """Set a metric of the epoch of a stage whose weights are kept."""
        self._series.best.labels(stage, name, split).set(value)

    def reached(self, stage: str) -> Reached:
        """Say how far a stage has come, by what was told here."""
        epochs = [sample.value for sample in samples(self._series.epoch) if sample.labels["stage"] == stage]
        for sample in samples(self._series.best):
            if sample.labels["stage"] == stage:
                split, name = sample.labels["split"], sample.labels["name"]
                metric = name if split == "train" else f"{split}_{name}"
                return Reached(int(epochs[0]) if epochs else None, metric, sample.value)
        return Reached(int(epochs[0]) if epochs else None)

    def learning_rate(self, value: float) -> None:
        """Set the learning rate of the last step."""
        self._series.learning_rate.set(value)

    def parameters(self, trainable: int, frozen: int) -> None:
        """Set how many parameters the model trains, and how many it keeps."""
        self._series.parameters.labels("true").set(trainable)
        self._series.parameters.labels("false").set(frozen)

    def replicas(self, count: int) -> None:
        """Set how many replicas train in step."""
        self._series.replicas.set(count)

    def dataset(self, images: int) -> None:
        """Set how many images the stored dataset has."""
        self._series.dataset_images.set(images)

    def rejectable(self, reasons: Iterable[str]) -> None:
        """Name all reasons that an image can be left out for, so that each is shown from now on."""
        for reason in reasons:
            self._series.rejected.labels(reason)

    def rejected(self, reason: str, count: int = 1) -> None:
        """Count images that were left out, by a reason from a fixed list."""
        self._series.rejected.labels(reason).inc(count)

    def storage_bytes(self, direction: str, count: int) -> None:
        """Count bytes moved; `direction` is upload or download."""
        self._series.storage_bytes.labels(direction).inc(count)
        self.progress()

    def storage_retry(self) -> None:
        """Count one request that was tried again."""
        self._series.storage_retries.inc()

    def checkpoint_saved(self, seconds: float) -> None:
        """Say that a checkpoint is complete in storage now, and how long that took."""
        self._series.checkpoint.set(time.time())
        self._series.checkpoint_seconds.set(seconds)
        self._series.checkpoints.inc()
        self.progress()


def serve_nothing(port: int, address: str = "0.0.0.0") -> int:  # noqa: S104 - likewise
    """Answer on a port with a page without series, from a thread of its own.

    Args:
        port: TCP port; 0 takes a free one.
        address: Address to listen on.

    Returns:
        The port.

    Raises:
        OSError: If the port is taken.
    """
    server, _ = start_http_server(port, address, registry=CollectorRegistry())
    return int(server.server_port)
