"""What a container of a job tells: lines of JSON while it runs, and its termination message when it ends."""

import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Never

from topwork.cli.runtime.environment import keep_secrets
from topwork.cli.runtime.exit_codes import BUG, failure_of
from topwork.cli.runtime.shutdown import hand_over, linger
from topwork.cli.runtime.signals import ignore_signals
from topwork.cluster.names import StageName
from topwork.cluster.termination_message import Ending
from topwork.errors import Stopped
from topwork.progress import Fact, LineProgress
from topwork.redaction import without_secrets

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.spec import TransferJob


class Container:
    """One container of a pod.

    Attributes:
        stage: Its stage.
        log: Where it tells how it goes.
        run: Name of the run, as soon as it is known.
        metrics: Its metrics, as soon as there are any: they know how far the stage has come.
        job: Its job, as soon as that is read.
    """

    def __init__(self, stage: StageName, termination_log: Path) -> None:
        """Take over standard error, for lines of JSON.

        Args:
            stage: Its stage.
            termination_log: File of the termination message; Kubernetes makes it, and where it is not, none is left.
        """
        self.stage = stage
        # A descriptor of its own: what is said while TensorFlow's start-up talk is kept away must arrive, too.
        self.log = LineProgress(os.fdopen(os.dup(2), "w"), as_json=True)
        self.run = ""
        self.metrics: Metrics | None = None
        self.job: TransferJob | None = None
        self._termination_log = termination_log
        self._ending: Ending | None = None
        self._lock = threading.Lock()
        logging.basicConfig(level=logging.WARNING, handlers=[_Lines(self.log)])
        logging.captureWarnings(True)
        # Python's resource tracker outlives the process, cleans up after it, and shall not speak of it.
        given = os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (given, "ignore:resource_tracker:UserWarning")))

    def done(self, *, metric: tuple[str, float] | None = None, model: str | None = None, **facts: Fact) -> None:
        """Tell that the stage is done.

        Args:
            metric: Name and value of what counts; None takes the best one of the training.
            model: Where the published model lies.
            facts: What else the last line says.
        """
        told: dict[str, Fact] = dict(zip(("metric", "value"), metric, strict=True)) if metric else {}
        if self._end("done", 0, **told, model=model):
            self.log.note("done", stage=self.stage, run=self.run, **({"model": model} if model else {}), **facts)

    def failed(self, error: BaseException) -> int:
        """Tell why the stage ended before it was done.

        Args:
            error: Why; what is none of topwork's is a bug and keeps its traceback.

        Returns:
            The exit code: that of the message, should the stage be done and the process be stopped on its last steps.
        """
        ignore_signals()
        keep_secrets()
        known = failure_of(error)
        code = known.exit_code if known else _exit_code(error)
        text = without_secrets(str(known) if known else f"{type(error).__name__}: {error}")
        stopped = isinstance(known, Stopped)
        if self._end("stopped" if stopped else "failed", code, error=text):
            level = {} if stopped else {"level": "error"}
            self.log.note(text, stage=self.stage, run=self.run, exit_code=code, **level)
            if known is None:
                self.log.text("".join(traceback.format_exception(error)))
        return self._ending.exit_code if self._ending else code

    def overdue(self, why: str) -> Never:
        """End the process as stopped, from another thread than the one that does not come to it.

        Args:
            why: What the message says.
        """
        if self._end("stopped", Stopped.exit_code, error=why):
            self.log.note(why, stage=self.stage, run=self.run, exit_code=Stopped.exit_code)
        self.leave(self._ending.exit_code if self._ending else Stopped.exit_code)

    def part(self, *, lingers: bool) -> None:
        """Do what is left for who watches the metrics, once the end is told.

        Args:
            lingers: Whether the port stays open for a last scrape, as long as the job says.
        """
        if self.job is None or self.metrics is None or self._ending is None:
            return
        stopped = self._ending.exit_code == Stopped.exit_code
        hand_over(self.job, self.metrics, self.log, stopped=stopped)
        if lingers and not stopped:
            linger(self.job.spec.metrics.linger_seconds)

    def leave(self, code: int) -> Never:
        """End the process at once: all is said, and TensorFlow's own end takes seconds that could spoil the exit code.

        Args:
            code: Exit code.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _end(self, outcome: str, exit_code: int, **told: Fact) -> bool:
        """Leave the termination message; only the first one counts."""
        with self._lock:
            if self._ending:
                return False
            reached = self.metrics.reached(self.stage)._asdict() if self.metrics else {}
            facts = {"stage": self.stage, "run": self.run, "outcome": outcome, "exit_code": exit_code}
            if self.metrics:
                self.metrics.exit_code(self.stage, exit_code)
            self._ending = Ending.model_validate({**facts, **reached, **told})
            with suppress(OSError):
                if self._termination_log.exists():
                    self._termination_log.write_text(self._ending.text(), "utf-8")
            return True


class _Lines(logging.Handler):
    """Turns what libraries log, and Python's warnings, into lines of JSON."""

    def __init__(self, log: LineProgress) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        # Formatted where secrets are taken out: surroundings.prepare_process.
        traced = {"traceback": record.exc_text} if record.exc_text else {}
        self._log.note(record.getMessage(), level=record.levelname.lower(), logger=record.name, **traced)


def _exit_code(error: BaseException) -> int:
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else BUG
