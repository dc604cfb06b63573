"""What a stage may touch beside its arguments, handed down by the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from topwork.edge.metrics import Metrics
from topwork.edge.storage import Storage
from topwork.errors import Stopped
from topwork.progress import Progress

STOPPED = "Stopped. Start the same job again to go on."


class StopSignal:
    """The wish to stop, as SIGTERM brings it.

    A stage may be ended at any moment, so the wish is granted at once, by raising `Stopped` where the main thread
    is. Training alone holds it off, until its step is ended and its checkpoint written.
    """

    def __init__(self) -> None:
        self._asked = False
        self._held = False

    def ask(self) -> None:
        """Ask to stop; call it in the main thread, from a signal handler.

        Raises:
            Stopped: Unless the wish is held off.
        """
        self._asked = True
        if not self._held:
            raise Stopped(STOPPED)

    def is_set(self) -> bool:
        """Whether somebody asked to stop."""
        return self._asked

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the wish off while the block runs; the block looks at `is_set` and ends in its own way.

        Raises:
            Stopped: At the end of a block that did not.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._asked:
            raise Stopped(STOPPED)


@dataclass(frozen=True)
class Workspace:
    """The surroundings of a run.

    Attributes:
        storage: Object storage of the job; every key is relative to `spec.storage`.
        metrics: Prometheus series, filled by the stages.
        progress: What the user sees while a stage runs.
        scratch: Local folder of this run; may be lost at any time between two processes.
        replicas: Replicas of the model; None is one on each visible GPU, or one on the processor.
        stop: The wish to stop; training then writes its checkpoint and raises `Stopped`.
    """

    storage: Storage
    metrics: Metrics
    progress: Progress
    scratch: Path
    replicas: int | None = None
    stop: StopSignal = field(default_factory=StopSignal)
