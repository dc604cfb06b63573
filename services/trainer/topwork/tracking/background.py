"""Sends the records of runs to a service in the background, so that an outage of the service does not delay a run."""

import threading
from typing import Protocol

import structlog

from topwork.errors import SettingError, TopworkError, quote_error
from topwork.redaction import redact
from topwork.tracking.run_record import RunRecord

log = structlog.get_logger(__name__)


class Service(Protocol):
    """A service that follows runs."""

    name: str

    def send(self, record: RunRecord) -> None:
        """Send what the service does not have of a run yet; raises an exception if it cannot be reached."""


class BackgroundSender:
    """Sends the newest record of each run in a thread.

    A record contains all epochs so far. A record that could not be sent is therefore replaced by the next one of its
    run, and nothing is lost.
    """

    def __init__(self, service: Service) -> None:
        """Start the thread.

        Args:
            service: The service; only this thread uses it.
        """
        self._service = service
        self._changed = threading.Condition()
        self._pending: dict[str, RunRecord] = {}
        self._has_news = self._is_closing = False
        # Runs whose last record could not be sent.
        self._failing: set[str] = set()
        # A daemon: a request that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracking-{service.name}", daemon=True)
        self._thread.start()

    def submit(self, record: RunRecord) -> None:
        """Send a record soon. Returns at once.

        Args:
            record: The run; it replaces an earlier record of the same run.
        """
        with self._changed:
            self._pending[record.job.run] = record
            self._has_news = True
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Send what is left, and end the thread.

        Args:
            seconds: How long to wait for the service.

        Returns:
            Whether everything was sent.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            return not self._pending and not self._thread.is_alive()

    def _work(self) -> None:
        is_closing = False
        while not is_closing:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._is_closing)
                records, is_closing = list(self._pending.values()), self._is_closing
                self._has_news = False
            for record in records:
                if not self._send(record):
                    break

    def _send(self, record: RunRecord) -> bool:
        """Send a record, and report the start and the end of an outage; return whether other records can be sent."""
        run = record.job.run
        try:
            self._service.send(record)
        except Exception as error:  # a follower never stops a run
            if not self._failing:
                reason = (
                    str(error) if isinstance(error, TopworkError) else f"{type(error).__name__}: {quote_error(error)}"
                )
                log.warning("tracking interrupted", service=self._service.name, reason=redact(reason))
            self._failing.add(run)
            return isinstance(error, SettingError)  # the service has rejected this record
        if self._failing == {run}:
            log.info("tracking resumed", service=self._service.name)
        self._failing.discard(run)
        with self._changed:
            if self._pending.get(run) is record:
                del self._pending[run]
        return True
