"""What a stage may touch beside its arguments, handed down by the command line."""

from dataclasses import dataclass, field
from pathlib import Path

from topwork.edge.metrics import Metrics
from topwork.edge.storage import Storage
from topwork.progress import Progress
from topwork.stopping import StopSignal


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
