"""What a stage may touch beside its arguments, handed down by the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from topwork.cancellation import StopSignal
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.progress import Fact, Progress, Tracker


@dataclass(frozen=True)
class Workspace:
    """The surroundings of a run.

    Attributes:
        storage: Object storage of the job; every key is relative to `spec.storage`.
        metrics: Prometheus series, filled by the stages.
        progress: What the user sees while a stage runs.
        scratch: Local folder of this run; may be lost at any time between two processes.
        replicas: Replicas of the model; None is one on each visible GPU, or one on the processor.
        scratch_limit: Bytes that the scratch volume may hold, where the cluster ends a pod that goes beyond.
        stop: The wish to stop; training then writes its checkpoint and raises `Stopped`.
    """

    storage: Storage
    metrics: Metrics
    progress: Progress
    scratch: Path
    replicas: int | None = None
    scratch_limit: int | None = None
    stop: StopSignal = field(default_factory=StopSignal)

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Follow work of `total` pieces (None: unknown), before a person's eyes and for who watches from afar."""
        with self.progress.track(what, total) as shown:
            yield _Watched(shown, self.metrics)


class _Watched:
    """Tells the metrics of each piece, too: what goes on slowly and what hangs look the same otherwise."""

    def __init__(self, shown: Tracker, metrics: Metrics) -> None:
        self._shown, self._metrics = shown, metrics

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Say that `count` more are done."""
        self._metrics.progress()
        self._shown.advance(count, **facts)
