"""The wish to stop: how it reaches the work that goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from topwork.errors import Stopped

STOPPED = "Stopped. Start the same job again to go on."


class StopNow(BaseException):
    """Unwinds the main thread when somebody asked to stop; whoever listens to the signals turns it into `Stopped`.

    No `Exception`: libraries catch those by the dozen, to try a request again or to do without a module.
    """


class StopSignal:
    """The wish to stop, as SIGTERM brings it.

    A stage may be ended at any moment, so the wish is granted at once, by raising `StopNow` where the main thread
    is. Training alone holds it off, until its step is ended and its checkpoint written.
    """

    def __init__(self) -> None:
        self._asked = False
        self._held = False

    def ask(self) -> None:
        """Ask to stop; call it in the main thread, from a signal handler.

        Raises:
            StopNow: Unless the wish is held off.
        """
        self._asked = True
        if not self._held:
            raise StopNow

    def is_set(self) -> bool:
        """Whether somebody asked to stop."""
        return self._asked

    def is_held(self) -> bool:
        """Whether training is about to stop in its own way."""
        return self._held

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
