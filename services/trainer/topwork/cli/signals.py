"""SIGTERM and Ctrl-C, turned into the wish to stop; imported before anything heavy."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from topwork.errors import Stopped
from topwork.stopping import STOPPED, StopNow, StopSignal

NUMBERS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.1


@contextmanager
def stopped_by_signals(stop: StopSignal) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into the wish to stop; a second one ends the process as it would without.

    Args:
        stop: Where the wish goes.

    Raises:
        Stopped: When the wish was granted.
    """

    def ask(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop.ask()

    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    except StopNow:
        raise Stopped(STOPPED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Let nothing disturb the last moments of a process that has said how it ended."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_overdue(stop: StopSignal, seconds: float, end: Callable[[], None]) -> None:
    """See to it that a stop is granted: the main thread may be deep in a library that hears no signal for minutes.

    A thread of its own learns of the signal from the interpreter's wakeup file. It waits for as long as training
    holds the wish off, and then calls `end`.

    Args:
        stop: The wish.
        seconds: Time that the main thread has to end the process itself.
        end: Ends the process.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reading, 1)[0] not in NUMBERS:
            pass
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if stop.is_held():
                deadline = time.monotonic() + seconds
            time.sleep(POLL_SECONDS)
        end()

    threading.Thread(target=watch, name="stop", daemon=True).start()
