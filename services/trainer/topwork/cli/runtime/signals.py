"""SIGTERM and Ctrl-C, turned into the wish to stop; imported before anything heavy."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

from topwork.cancellation import STOPPED, StopNow, StopSignal
from topwork.errors import Stopped

NUMBERS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.1
AGAIN_SECONDS = 0.5
MARGIN_SECONDS = 5.0
"""Kept of the grace period for the end itself: the message, and a node that is under load."""


@contextmanager
def stopped_by_signals(stop: StopSignal, *, patient: bool = False) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into the wish to stop, and ask again until it is heard.

    Code of other languages that calls Python drops an exception now and then: pydantic did, and the stage went on. So
    does Python itself in callbacks and finalizers; that it dropped the wish is nothing to print.

    Args:
        stop: Where the wish goes.
        patient: Whether a second signal changes nothing, since the process ends in time by itself; it ends the
            process as it would without, otherwise.

    Raises:
        Stopped: When the wish was granted.
    """

    def ask(number: int, _frame: FrameType | None) -> None:
        if number in NUMBERS and not patient:
            signal.signal(number, before[signal.Signals(number)])
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        if not _is_heard(sys.exception()):
            stop.ask()

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not issubclass(what.exc_type, StopNow):
            tell_dropped(what)

    tell_dropped, sys.unraisablehook = sys.unraisablehook, dropped
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    except StopNow:
        raise Stopped(STOPPED) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = tell_dropped


def _is_heard(handled: BaseException | None) -> bool:
    """Whether the main thread is on its way out: what it cleans up there must not be interrupted again."""
    while handled is not None:
        if isinstance(handled, StopNow | Stopped):
            return True
        handled = handled.__context__
    return False


def ignore_signals() -> None:
    """Let nothing disturb the last moments of a process that has said how it ended."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_overdue(
    stop: StopSignal, seconds: float, end: Callable[[], None], *, grace_seconds: float | None = None
) -> None:
    """See to it that a stop is granted: the main thread may be deep in a library that hears no signal for minutes.

    A thread of its own learns of the signal from the interpreter's wakeup file. It waits for as long as training
    holds the wish off, but no longer than the grace period allows, and then calls `end`.

    Args:
        stop: The wish.
        seconds: Time that the main thread has to end the process itself.
        end: Ends the process.
        grace_seconds: Time from the signal to SIGKILL; None where nobody kills.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1)[0] not in NUMBERS:
            pass
        deadline = time.monotonic() + seconds
        latest = inf if grace_seconds is None else time.monotonic() + grace_seconds - MARGIN_SECONDS
        while time.monotonic() < min(deadline, latest):
            if stop.is_held():
                deadline = time.monotonic() + seconds
            time.sleep(POLL_SECONDS)
        end()

    threading.Thread(target=watch, name="stop", daemon=True).start()
