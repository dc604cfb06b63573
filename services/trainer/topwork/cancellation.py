"""Stop requests: how SIGTERM and Ctrl-C interrupt the work in progress."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from topwork.errors import Stopped

STOPPED_MESSAGE = "Stopped. Start the same job again to resume."


class StopInterrupt(BaseException):
    """Unwinds the main thread after a stop request; `stop_on_signals` turns it into `Stopped`.

    Like KeyboardInterrupt, it is not an `Exception`: many libraries catch every `Exception` to retry a request or to
    continue without an optional module.
    """


class StopRequest:
    """A request to stop, usually from SIGTERM.

    A request interrupts the main thread immediately with `StopInterrupt`, because most stages can be stopped at any
    moment. Training defers it until the current step has finished and its checkpoint is written.

    Example:
        with stop.deferred():
            for step in steps:
                train(step)
                if stop.is_set():
                    save_checkpoint()
                    break
    """

    def __init__(self) -> None:
        self._requested: float | None = None
        self._is_deferred = False

    def set(self) -> None:
        """Request a stop. Call this in the main thread, from a signal handler.

        Raises:
            StopInterrupt: Unless the request is deferred.
        """
        if self._requested is None:
            self._requested = time.monotonic()
        if not self._is_deferred:
            raise StopInterrupt

    def is_set(self) -> bool:
        """Whether a stop was requested."""
        return self._requested is not None

    def seconds_since_request(self) -> float | None:
        """Time since the first request in seconds; None if there was none."""
        return None if self._requested is None else time.monotonic() - self._requested

    def is_deferred(self) -> bool:
        """Whether the running work handles stop requests itself."""
        return self._is_deferred

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer stop requests while the block runs. The block polls `is_set` and returns early.

        Raises:
            Stopped: At the end of the block, if a stop was requested.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.is_set():
            raise Stopped(STOPPED_MESSAGE)
