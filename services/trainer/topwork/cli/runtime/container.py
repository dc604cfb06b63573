"""A container of a job: JSON log, termination message, exit code and last metrics."""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Never

import structlog

from topwork.cli.runtime.environment import register_environment_secrets, silence_resource_tracker
from topwork.cli.runtime.logging import LogFormat, configure_logging
from topwork.cli.runtime.shutdown import EXIT_CODE_BUG, push_to_pushgateway, to_topwork_error, wait_for_last_scrape
from topwork.cli.runtime.signals import ignore_stop_signals
from topwork.cluster.names import StageName
from topwork.cluster.termination_message import TerminationMessage
from topwork.errors import Stopped, TopworkError, limit_message
from topwork.nodes.group import NodeGroup
from topwork.progress import Fact
from topwork.redaction import redact

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.spec import TransferJob

log = structlog.get_logger(__name__)

LOG_TIMEOUT_SECONDS = 1.0


class Container:
    """One container of a pod.

    Attributes:
        stage: The stage that it runs.
        run: Name of the run, once it is known.
        metrics: Metrics of the stage, once they exist; the termination message repeats the best metric.
        job: The job, once it is read.
        nodes: The nodes that run the stage together.
        eviction_error: Returns the error of a stopped process whose pod is evicted for lack of disk space; set in pods.
    """

    def __init__(self, stage: StageName, termination_log: Path) -> None:
        """Configure logging to write one JSON object per line to standard error.

        Args:
            stage: The stage that it runs.
            termination_log: File of the termination message. Kubernetes creates it; if it does not exist, no message
                is written.
        """
        self.stage = stage
        self.run = ""
        self.metrics: Metrics | None = None
        self.job: TransferJob | None = None
        self.nodes = NodeGroup()
        self.eviction_error: Callable[[], TopworkError | None] = lambda: None
        self._termination_log = termination_log
        self._message: TerminationMessage | None = None
        self._lock = threading.Lock()
        # A duplicate of file descriptor 2 still works while `suppress_stderr` redirects the original.
        configure_logging(LogFormat.json, os.fdopen(os.dup(2), "w"))
        silence_resource_tracker()

    def report_success(
        self,
        *,
        metric: tuple[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        images_of: str | None = None,
        model: str | None = None,
        weights_from: str | None = None,
        **facts: Fact,
    ) -> None:
        """Log that the stage is complete, and write the termination message.

        Args:
            metric: Name and value of the main metric; None selects the best metric of the training.
            metrics: Metrics on the validation split of a run that publishes nothing.
            images_of: Identifies the images of such a run; see `identify_split_images`.
            model: URI of the published model.
            weights_from: Stage and epoch that the weights of the trained model come from.
            **facts: Further fields of the log line.
        """
        fields: dict[str, Fact | Mapping[str, float]] = {}
        if metric:
            fields |= zip(("metric", "value"), metric, strict=True)
        if metrics:
            fields |= {"metrics": metrics, "dataset": images_of}
        results = {name: text for name, text in (("model", model), ("weights_from", weights_from)) if text}
        if self._write_termination_message("done", 0, **fields, **results):
            log.info("done", stage=self.stage, run=self.run, **results, **(metrics or {}), **facts)

    def report_failure(self, error: BaseException) -> int:
        """Log why the stage ended early, and write the termination message.

        Args:
            error: The exception that ended it. An unexpected one is logged with its traceback.

        Returns:
            The exit code. It is 0 if the stage was complete and only the shutdown was interrupted.
        """
        ignore_stop_signals()
        register_environment_secrets()
        known = to_topwork_error(error)
        if isinstance(known, Stopped):
            known = self.eviction_error() or known
        code = known.exit_code if known else _exit_code(error)
        text = limit_message(redact(str(known) if known else f"{type(error).__name__}: {error}"))
        stopped = isinstance(known, Stopped)
        if self._write_termination_message("stopped" if stopped else "failed", code, error=text):
            fields = {"stage": self.stage, "run": self.run, "exit_code": code}
            if stopped:
                log.info(text, **fields)
            else:
                log.error(text, **fields, exc_info=None if known else error)
        # If the stage was already complete, this node has left, and the others learn nothing.
        self.nodes.fail(known or error)
        return self._message.exit_code if self._message else code

    def exit_after_timeout(self, reason: str) -> Never:
        """End the process as stopped, from another thread, because the main thread did not end in time.

        Args:
            reason: Error text of the termination message.
        """
        self.exit_from_thread(Stopped(reason))

    def exit_from_thread(self, error: TopworkError) -> Never:
        """End the process from another thread, because the main thread did not end in time.

        Args:
            error: Why the stage ended: a stop request, or the failure of another node.
        """
        stopped = isinstance(error, Stopped)
        try:
            text = limit_message(redact(str(error)))
            if self._write_termination_message("stopped" if stopped else "failed", error.exit_code, error=text):
                fields = {"stage": self.stage, "run": self.run, "exit_code": error.exit_code}
                # The main thread may hold the lock of the log, for example if nothing reads standard error.
                report = log.info if stopped else log.error
                writer = threading.Thread(target=report, args=(text,), kwargs=fields, daemon=True)
                writer.start()
                writer.join(LOG_TIMEOUT_SECONDS)
            self.nodes.fail(error)
        finally:
            # An exception would only end this thread, and the process would run until SIGKILL.
            self.exit(self._message.exit_code if self._message else error.exit_code)

    def draft_failure(self, error: TopworkError | None) -> None:
        """Write the termination message that applies if the process ends without running any further Python code.

        Args:
            error: The error; None to delete the draft.
        """
        with self._lock:
            if self._message is None:
                self._write(self._create_message("failed", error.exit_code, error=str(error)) if error else None)

    def publish_outcome(self, *, wait_for_scrape: bool) -> None:
        """Push the outcome to the Pushgateway, and keep the metrics port open for a last scrape.

        Args:
            wait_for_scrape: Whether to keep the port open for `spec.metrics.lingerSeconds`.
        """
        if self.job is None or self.metrics is None or self._message is None:
            return
        stopped = self._message.exit_code == Stopped.exit_code
        push_to_pushgateway(self.job, self.metrics, stopped=stopped)
        if wait_for_scrape and not stopped:
            wait_for_last_scrape(self.job.spec.metrics.linger_seconds)

    def exit(self, code: int) -> Never:
        """End the process immediately: TensorFlow's own shutdown takes seconds and could change the exit code.

        Args:
            code: Exit code.
        """
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nothing reads it any more
                stream.flush()
        os._exit(code)

    def _write_termination_message(self, outcome: str, exit_code: int, **fields: Fact | Mapping[str, float]) -> bool:
        """Write the termination message, unless one was written before; return whether it was written."""
        with self._lock:
            if self._message:
                return False
            if self.metrics:
                self.metrics.set_exit_code(self.stage, exit_code)
            self._message = self._create_message(outcome, exit_code, **fields)
            self._write(self._message)
            return True

    def _create_message(self, outcome: str, exit_code: int, **fields: Fact | Mapping[str, float]) -> TerminationMessage:
        common = {"stage": self.stage, "run": self.run, "outcome": outcome, "exit_code": exit_code}
        node = {"node": self.nodes.index} if self.nodes.count > 1 else {}
        progress = self.metrics.stage_progress(self.stage)._asdict() if self.metrics else {}
        return TerminationMessage.model_validate({**common, **node, **progress, **fields})

    def _write(self, message: TerminationMessage | None) -> None:
        with suppress(OSError):
            if self._termination_log.exists():
                self._termination_log.write_text(message.to_json() if message else "", "utf-8")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code
    return EXIT_CODE_BUG
