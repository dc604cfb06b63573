"""Failed background writes of a stage: logged at once, tried again, and an error of the stage if they persist."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from topwork.disk_space import disk_full_error
from topwork.errors import TopworkError, UnavailableError

log = structlog.get_logger(__name__)

MIN_ATTEMPTS = 3
"""Consecutive failed attempts after which a stage may fail."""
MAX_INTERVALS = 3
"""Multiple of `spec.compute.checkpointMinutes` for which attempts must have failed until a stage fails."""
MAX_SECONDS = 3600.0
"""Upper limit of that time, in seconds."""


@dataclass(frozen=True)
class _Series:
    """Consecutive failed attempts.

    Attributes:
        attempts: Their number.
        start: Time at which the first one started.
        error: Error of the last one.
    """

    attempts: int
    start: float
    error: BaseException


class WriteFailures:
    """Consecutive failures to store what a stage needs in order to resume.

    Training survives an outage, but not for long: without checkpoints, a killed pod loses its work. A stage fails when
    at least `MIN_ATTEMPTS` attempts in a row failed, and `MAX_INTERVALS` checkpoint intervals (at most `MAX_SECONDS`)
    have passed since the first of them started.
    """

    def __init__(self, what: str, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without failures.

        Args:
            what: What is written, such as "checkpoint"; part of the messages.
            minutes: `spec.compute.checkpointMinutes`.
            clock: Returns the time in seconds.
        """
        self._what, self._clock = what, clock
        self._max_seconds = min(MAX_INTERVALS * 60 * minutes, MAX_SECONDS)
        # Replaced as a whole: the background thread writes it, and the main thread reads it.
        self._series: _Series | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._series is not None

    def record_success(self) -> None:
        """Record that an attempt succeeded."""
        self._series = None

    def record_failure(self, error: BaseException, start: float, **facts: object) -> None:
        """Record and log that an attempt failed.

        Args:
            error: Any error; one that nobody expected is logged with its traceback.
            start: Time at which the attempt started.
            **facts: Further fields of the log line.
        """
        first = self._series
        self._series = _Series(first.attempts + 1 if first else 1, first.start if first else start, error)
        known = _known_error(error)
        log.warning(
            f"{self._what} not stored",
            **facts,
            failed_attempts=self._series.attempts,
            reason=str(known or _describe(error)),
            exc_info=None if known else error,
        )

    def check(self) -> None:
        """Fail the stage if writes have failed for too long.

        Raises:
            UnavailableError: So that the Job is retried, possibly on another node.
            TopworkError: With exit code 2 if the last error is one that a retry cannot fix.
        """
        series = self._series
        if series is None or series.attempts < MIN_ATTEMPTS or self._clock() - series.start < self._max_seconds:
            return
        known = _known_error(series.error)
        kind = type(known) if known and known.exit_code != UnavailableError.exit_code else UnavailableError
        raise kind(
            f"No {self._what} could be stored in {series.attempts} attempts over "
            f"{(self._clock() - series.start) / 60:.0f} minutes, so all work since then would be lost if this process "
            f"ended. What was stored before is kept: start the same job again to resume. Last error: "
            f"{known or _describe(series.error)}"
        ) from series.error


def _known_error(error: BaseException) -> TopworkError | None:
    return error if isinstance(error, TopworkError) else disk_full_error(error)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
