"""The workspace of a run: storage, metrics, progress display and scratch directory, passed to every stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from topwork.cancellation import StopRequest
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.nodes.group import NodeGroup
from topwork.progress import Fact, Progress, Tracker


@dataclass(frozen=True)
class Workspace:
    """Everything that a stage uses besides the job and the results of earlier stages.

    Attributes:
        storage: Object storage of the job; keys are relative to `spec.storage`.
        metrics: Prometheus metrics, updated by the stages.
        progress: Progress display for the user.
        scratch: Local directory of this run; its contents may be lost between two processes.
        replicas: Number of model replicas on this node; None for one per visible GPU, or one on the CPU.
        scratch_limit: Size limit of the scratch volume in bytes; the cluster evicts a pod that exceeds it.
        dataset: Key prefix of the dataset that the user pinned; empty to use the source as it is now.
        attempt: Identifies the Job of a pod: all its pods use the dataset that the first one found. Empty outside a
            cluster.
        stop: Stop request. When it is set, training writes a checkpoint and raises `Stopped`.
        nodes: The nodes that train the run.
    """

    storage: Storage
    metrics: Metrics
    progress: Progress
    scratch: Path
    replicas: int | None = None
    scratch_limit: int | None = None
    dataset: str = ""
    attempt: str = ""
    stop: StopRequest = field(default_factory=StopRequest)
    nodes: NodeGroup = field(default_factory=NodeGroup)

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show the progress of an operation to the user and in the metrics while the block runs.

        Args:
            what: Name of the operation, such as `transfer`.
            total: Number of items; None if unknown.
        """
        with self.progress.track(what, total) as tracker:
            yield _MeteredTracker(tracker, self.metrics)


class _MeteredTracker:
    """Also records each step in the metrics, to distinguish a slow operation from a hanging one."""

    def __init__(self, tracker: Tracker, metrics: Metrics) -> None:
        self._tracker, self._metrics = tracker, metrics

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Add completed items."""
        self._metrics.record_progress()
        self._tracker.advance(count, **facts)
