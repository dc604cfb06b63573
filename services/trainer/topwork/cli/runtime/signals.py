"""Signal handling: SIGTERM and Ctrl-C become a stop request. Imported before any heavy library."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

from topwork.cancellation import STOPPED_MESSAGE, StopInterrupt, StopRequest
from topwork.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.1
REPEAT_SECONDS = 0.5
RESERVED_SECONDS = 5.0
"""Part of the grace period that is kept for the shutdown itself: the termination message, on a loaded node."""


@contextmanager
def stop_on_signals(stop: StopRequest, *, ignore_repeats: bool = False) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a stop request, and repeat it until it takes effect.

    Native code that calls Python may discard an exception (pydantic does), and Python discards those of callbacks and
    finalizers. The request is therefore repeated, and a discarded `StopInterrupt` is not reported.

    Args:
        stop: The stop request.
        ignore_repeats: Whether a second signal is ignored, because the process is guaranteed to end in time. Otherwise
            it has its default effect.

    Raises:
        Stopped: When a stop was requested.
    """

    def request_stop(number: int, _frame: FrameType | None) -> None:
        if number in STOP_SIGNALS and not ignore_repeats:
            signal.signal(number, previous_handlers[signal.Signals(number)])
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
        if not _is_unwinding(sys.exception()):
            stop.set()

    def report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, StopInterrupt):
            previous_hook(unraisable)

    previous_hook, sys.unraisablehook = sys.unraisablehook, report_unraisable
    previous_handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    for number in previous_handlers:
        signal.signal(number, request_stop)
    try:
        yield
    except BaseException as error:
        if _is_interrupt(error, stop):
            raise Stopped(STOPPED_MESSAGE) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = previous_hook


def _is_interrupt(error: BaseException, stop: StopRequest) -> bool:
    """Whether an exception is the `StopInterrupt` of a request, or the one that native code raises in its place.

    If pybind11 creates an exception when the signal arrives, it raises a RuntimeError that names both.
    """
    return isinstance(error, StopInterrupt) or (
        stop.is_set() and isinstance(error, RuntimeError) and StopInterrupt.__name__ in str(error)
    )


def _is_unwinding(handled: BaseException | None) -> bool:
    """Whether the main thread is already stopping: its cleanup must not be interrupted."""
    while handled is not None:
        if isinstance(handled, StopInterrupt | Stopped):
            return True
        handled = handled.__context__
    return False


def ignore_stop_signals() -> None:
    """Ignore further signals in a process that has written its termination message."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_stop_watchdog(
    stop: StopRequest, seconds: float, on_timeout: Callable[[], None], *, grace_seconds: float | None = None
) -> None:
    """End the process if the main thread does not: it may be deep in a library that handles no signal for minutes.

    A thread learns of the signal through the interpreter's wakeup file descriptor. It waits as long as training defers
    the request, but no longer than the grace period allows, and then calls `on_timeout`.

    Args:
        stop: The stop request.
        seconds: Time for the main thread to end the process.
        on_timeout: Ends the process.
        grace_seconds: Time from the signal to SIGKILL; None if nothing kills the process.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1)[0] not in STOP_SIGNALS:
            pass
        deadline = time.monotonic() + seconds
        latest = inf if grace_seconds is None else time.monotonic() + grace_seconds - RESERVED_SECONDS
        while time.monotonic() < min(deadline, latest):
            if stop.is_deferred():
                deadline = time.monotonic() + seconds
            time.sleep(POLL_SECONDS)
        on_timeout()

    threading.Thread(target=watch, name="stop", daemon=True).start()
