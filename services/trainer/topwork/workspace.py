"""The workspace of a run: storage, metrics, progress display and scratch directory, passed to every stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.cancellation import StopRequest
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.nodes.group import NodeGroup
from topwork.progress import Fact, Followers, NoFollowers, Progress, Tracker


class RecentResults:
    """The latest results of expensive computations in this process: the next run may need the same again.

    There is one result of each kind: those of other inputs are dropped.
    """

    def __init__(self) -> None:
        """Start without results."""
        self._results: dict[str, tuple[str, Any]] = {}

    def find(self, kind: str, key: str) -> Any:
        """Return a result; None if the latest one of its kind has another key.

        Args:
            kind: What was computed.
            key: Digest of everything that the result depends on.
        """
        latest, result = self._results.get(kind, ("", None))
        return result if latest == key else None

    def keep(self, kind: str, key: str, result: Any) -> None:
        """Keep a result instead of the latest one of its kind."""
        self._results[kind] = (key, result)

    def drop(self, kind: str) -> None:
        """Drop the latest result of a kind, if there is one."""
        self._results.pop(kind, None)


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
        followers: Services that the chief reports its epochs to.
        recent: Results that the next run of this process may use again, if it gets the same object.
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
    followers: Followers = field(default_factory=NoFollowers)
    recent: RecentResults = field(default_factory=RecentResults)

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
